"""torch.func, its old name functorch, and batched backward passes, against plain autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import functorch
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from metaopt.functional import REGISTRY
from tests.functional.cases import CASES, F64, FIRST_CASES, Case, Problem, pack, train

close = functools.partial(assert_close, rtol=1e-10, atol=1e-12)
STEPS = 7  # RAdam rectifies the 6th and the 7th

pytestmark = pytest.mark.filterwarnings("ignore:We've integrated functorch into PyTorch:FutureWarning")


BOTH_NAMES = [
    *(pytest.param(case, torch.func, id=f"torch.func-{case}") for case in FIRST_CASES),
    *(pytest.param(case, functorch, id=f"functorch-{case}") for case in FIRST_CASES if case.name in ("radam", "rprop")),
]


def numbers(case: Case) -> Tensor:
    return torch.tensor(list(case.elements.values()), dtype=F64)


def meta_loss(case: Case, problem: Problem, grad: Callable[..., Any] = torch.func.grad) -> Callable[[Tensor], Tensor]:
    """The loss after some steps as a function of the vector of all hyperparameters."""

    def function(vector: Tensor) -> Tensor:
        hyper = pack(dict(zip(case.elements, vector.unbind(), strict=True)))
        return problem.meta_loss(train(case, problem, STEPS, hyper, grad=grad)[0])

    return function


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def hessian_by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in first])


@pytest.mark.parametrize(("case", "func"), BOTH_NAMES)
class TestEveryTransform:
    def test_grad(self, case: Case, func: ModuleType, problem: Problem) -> None:
        function, x = meta_loss(case, problem, func.grad), numbers(case)
        close(func.grad(function)(x), by_autograd(function, x))

    def test_vmap_over_hyperparameters(self, case: Case, func: ModuleType, problem: Problem) -> None:
        function = meta_loss(case, problem, func.grad)
        batch = torch.stack([numbers(case), 0.99 * numbers(case), 0.98 * numbers(case)])
        close(func.vmap(function)(batch), torch.stack([function(x) for x in batch]))
        expected = torch.stack([by_autograd(function, x) for x in batch])
        close(func.vmap(func.grad(function))(batch), expected)
        assert not expected[0].equal(expected[1])

    def test_jvp(self, case: Case, func: ModuleType, problem: Problem) -> None:
        function, x = meta_loss(case, problem, func.grad), numbers(case)
        value, slope = func.jvp(function, (x,), (x,))
        close(value, function(x))
        close(slope, by_autograd(function, x) @ x)

    def test_jacrev_and_jacfwd(self, case: Case, func: ModuleType, problem: Problem) -> None:
        function, x = meta_loss(case, problem, func.grad), numbers(case)
        pair = lambda x: torch.stack([function(x), function(0.99 * x).sin()])  # noqa: E731
        expected = torch.stack([by_autograd(lambda x, i=i: pair(x)[i], x) for i in range(2)])
        close(func.jacrev(pair)(x), expected)
        close(func.jacfwd(pair)(x), expected)

    def test_hessian(self, case: Case, func: ModuleType, problem: Problem) -> None:
        function, x = meta_loss(case, problem, func.grad), numbers(case)
        expected = hessian_by_autograd(function, x)
        assert_close(func.hessian(function)(x), expected, rtol=1e-10, atol=1e-10)
        assert bool((expected.norm(dim=0) > 0).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_mode_equals_reverse_mode_in_every_variant(case: Case, problem: Problem) -> None:
    """With respect to the initial parameters and to all hyperparameters, those that are 0 too."""
    learned = {key: value for key, value in case.elements.items() if key not in case.refused | case.fixed}
    values = torch.tensor(list(learned.values()), dtype=F64)
    # Where weight decay is 0, weights without gradients change by 1 / eps as it does: their slopes are large.
    along = (values.clamp(min=1e-8), {name: torch.randn_like(p) for name, p in problem.params.items()})

    def function(vector: Tensor, params: dict[str, Tensor]) -> Tensor:
        hyper = pack({**case.elements, **dict(zip(learned, vector.unbind(), strict=True))})
        return problem.meta_loss(train(case, problem, STEPS, hyper, params)[0])

    _, slope = torch.func.jvp(function, (values, problem.params), along)
    grads = torch.func.grad(function, argnums=(0, 1))(values, problem.params)
    expected = grads[0] @ along[0] + sum((grads[1][name].conj() * p).sum().real for name, p in along[1].items())
    close(slope, expected)


def train_task(case: Case, params: dict[str, Tensor], x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
    hyper = pack(dict(zip(case.elements, vector.unbind(), strict=True)))
    opt = case.opt
    state = opt.init(params, **hyper)
    for _ in range(STEPS):
        grads = torch.func.grad(lambda p: case.sign * Problem.error(p, x, y))(params)
        params, state = opt.step(params, grads, state, **hyper)
    return Problem.error(params, x + 0.1, y)


@pytest.mark.parametrize(("case", "func"), BOTH_NAMES)
def test_vmap_over_tasks_equals_one_task_after_the_other(case: Case, func: ModuleType) -> None:
    """A batch of parameters and data, under one setting and under a setting each."""
    problems = [Problem(seed=seed) for seed in range(3)]
    stack = lambda items: torch.stack(list(items))  # noqa: E731
    params = {name: stack(p.params[name] for p in problems) for name in problems[0].params}
    x, y = stack(p.x for p in problems), stack(p.y for p in problems)
    shared, own = numbers(case), stack(numbers(case) * factor for factor in (1.0, 0.99, 0.98))
    one = functools.partial(train_task, case)
    gradient = func.grad(one, argnums=(0, 3))
    for vector, dim in ((shared, None), (own, 0)):
        losses = func.vmap(one, in_dims=(0, 0, 0, dim))(params, x, y, vector)
        grads = func.vmap(gradient, in_dims=(0, 0, 0, dim))(params, x, y, vector)
        for i, problem in enumerate(problems):
            start = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
            hyper = (vector if dim is None else vector[i]).clone().requires_grad_()
            loss = one(start, problem.x, problem.y, hyper)
            expected = torch.autograd.grad(loss, [*start.values(), hyper])
            close(losses[i], loss.detach())
            close([*(g[i] for g in grads[0].values()), grads[1][i]], list(expected))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_a_batched_state_gives_callables_an_integer_tensor(case: Case, problem: Problem) -> None:
    """Two copies of the training as one, step by step; the counters in the state are batched then."""
    seen: list[Any] = []
    last = list(case.opt.defaults)[-1]
    decay = lambda step, value: value * torch.tensor(0.99, dtype=F64) ** step  # noqa: E731

    def schedule(step: Any) -> Any:
        seen.append(step)
        value = case.opt.defaults[last]
        return tuple(decay(step, v) for v in value) if isinstance(value, tuple) else decay(step, value)

    opt, gradient = case.opt, torch.func.grad(lambda p: case.sign * problem.loss(p))
    params = {name: torch.stack([p, 0.5 * p]) for name, p in problem.params.items()}
    state = torch.func.vmap(opt.init)(params)
    starts = [{name: p[i] for name, p in params.items()} for i in range(2)]
    alone = [(start, opt.init(start)) for start in starts]
    for _ in range(4):
        grads = torch.func.vmap(gradient)(params)
        seen.clear()
        params, state = torch.func.vmap(lambda p, g, s: opt.step(p, g, s, **{last: schedule}))(params, grads, state)
        assert {step.dtype for step in seen} == {torch.int64}
        alone = [opt.step(p, gradient(p), s, **{last: schedule}) for p, s in alone]
    for i, (p, s) in enumerate(alone):
        close({name: batch[i] for name, batch in params.items()}, p)
        for field, batches in zip(s, state, strict=True):
            close({name: batch[i] for name, batch in batches.items()}, field)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_batched_backward_passes_equal_single_ones(case: Case, problem: Problem) -> None:
    def weights(vector: Tensor) -> Tensor:
        hyper = pack(dict(zip(case.elements, vector.unbind(), strict=True)))
        params = train(case, problem, STEPS, hyper)[0]
        return torch.cat([params["out.weight"], torch.view_as_real(params["phase"]).flatten()])

    x = numbers(case)
    batched = torch.autograd.functional.jacobian(weights, x, vectorize=True)
    close(batched, torch.autograd.functional.jacobian(weights, x))
    assert bool((batched.norm(dim=0) > 0).all())


@pytest.mark.parametrize("name", REGISTRY)
def test_vmap_around_a_large_step_that_is_not_batched(name: str) -> None:
    """The step is one for a kernel, and what is batched is read after it."""
    opt = REGISTRY[name]()
    params = {"w": torch.linspace(-1, 1, 5000, dtype=torch.float64)}
    grads, state = {"w": params["w"].sin()}, opt.init(params)

    def total(scale: Tensor) -> Tensor:
        stepped, _ = opt.step(params, grads, state)
        return (stepped["w"] * scale).square().sum()

    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(total)(scales), torch.stack([total(scale) for scale in scales]))
    torch.testing.assert_close(torch.func.grad(total)(scales[1]), total(scales[0]) * 4)
