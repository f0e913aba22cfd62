"""Derivatives of an unrolled training against finite differences of torch.optim's own trajectories."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaopt.functional import radam
from tests.functional.cases import CASES, F64, FIRST_CASES, Case, Problem, pack, train, train_torch
from tests.functional.differences import Difference, derivative

# RAdam's first rectified step is the 6th; hidden.bias, which has no gradient now and then, gets there with the 9th.
STEPS = 12

INDICES = {str(case): index for index, case in enumerate(CASES)}
ELEMENTS = [
    pytest.param(case, element, id=f"{element}-{case}")
    for case in CASES
    for element in case.elements
    if element not in case.fixed | case.refused
]


def assert_equals_difference(derived: Tensor, expected: Difference, *, nonzero: bool = True) -> None:
    """Equal to 1e-7, where the difference itself is known to 1e-7 and so clearly not 0; or both of them 0."""
    scale = expected.value.norm()
    assert bool(derived.isfinite().all())
    if nonzero:
        assert expected.error.norm() <= 1e-7 * scale
        assert (derived - expected.value).norm() <= 1e-7 * scale
    else:
        assert bool((expected.value.abs() <= expected.error).all())
        assert bool((derived == 0).all())


def room(value: float) -> float:
    """How far a hyperparameter may move: a tenth of the way to 0 or 1, where most domains end."""
    return 0.1 * min(value, abs(1.0 - value))


@functools.cache
def hypergradients(index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of the meta-loss with respect to every hyperparameter and to the initial parameters."""
    case, problem = CASES[index], Problem()
    hyper = {key: torch.tensor(value, dtype=F64, requires_grad=True) for key, value in case.elements.items()}
    start = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    loss = problem.meta_loss(train(case, problem, STEPS, pack(hyper), start)[0])
    learned = {key: value for key, value in hyper.items() if key not in case.refused}
    grads = torch.autograd.grad(loss, [*learned.values(), *start.values()])
    return dict(zip(learned, grads, strict=False)), dict(zip(start, grads[len(learned) :], strict=True))


def torch_loss(case: Case, problem: Problem, hyper: Any = None, params: Mapping[str, Tensor] | None = None) -> Tensor:
    return problem.meta_loss(train_torch(case, problem, STEPS, hyper, params)[0]).detach()


@pytest.mark.parametrize(("case", "element"), ELEMENTS)
def test_hypergradient_equals_differences_of_torchs_training(case: Case, element: str, problem: Problem) -> None:
    def loss(value: float) -> Tensor:
        return torch_loss(case, problem, pack({**case.elements, element: value}))

    expected = derivative(loss, case.elements[element], lowest=float("-inf") if element == "dampening" else 0.0)
    derived = hypergradients(INDICES[str(case)])[0][element]
    assert_equals_difference(derived, expected, nonzero=element not in case.flat)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_by_initial_parameters_equals_differences_of_torchs_training(case: Case, problem: Problem) -> None:
    """Along a direction in which every element of every parameter moves, the complex ones' both parts too."""
    directions = {name: torch.randn_like(p) for name, p in problem.params.items()}

    def loss(shift: float) -> Tensor:
        params = {name: p + shift * directions[name] for name, p in problem.params.items()}
        return torch_loss(case, problem, None, params)

    grads = hypergradients(INDICES[str(case)])[1]
    derived = sum((grads[name].conj() * directions[name]).sum().real for name in grads)
    assert_equals_difference(derived, derivative(loss, 0.0, lowest=-1.0))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_gradient_by_every_single_initial_weight_is_nonzero(case: Case) -> None:
    """Also by the weights whose gradients are always 0: the validation loss reads them."""
    for name, grad in hypergradients(INDICES[str(case)])[1].items():
        parts = torch.view_as_real(grad) if grad.is_complex() else grad
        assert bool((parts != 0).all()), name


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_derivative_by_values_per_name_and_per_element_equals_differences(case: Case, problem: Problem) -> None:
    """Each hyperparameter a mapping, to a tensor of the weight's own shape, of a row's shape, or a 0-d one."""
    shapes = {"hidden.weight": (8, 5), "hidden.bias": (8,), "out.weight": (1,), "phase": (3,), "empty": (3,)}
    values = {
        key: {
            name: value + 0.02 * room(value) * torch.randn(shapes.get(name, ()), dtype=F64) for name in problem.params
        }
        for key, value in case.elements.items()
    }
    for tensor in tree_leaves(values):
        tensor.requires_grad_()
    loss = problem.meta_loss(train(case, problem, STEPS, pack(values))[0])
    for key, by_name in values.items():
        directions = {
            name: room(case.elements[key]) * (0.5 + torch.rand_like(tensor)) for name, tensor in by_name.items()
        }

        def shifted(
            shift: float,
            key: str = key,
            by_name: Mapping[str, Tensor] = by_name,
            directions: Mapping[str, Tensor] = directions,
        ) -> Tensor:
            moved = {name: tensor.detach() + shift * directions[name] for name, tensor in by_name.items()}
            fixed = {other: {n: t.detach() for n, t in item.items()} for other, item in values.items()}
            return problem.meta_loss(train(case, problem, STEPS, pack({**fixed, key: moved}))[0])

        used = {name: tensor for name, tensor in by_name.items() if name != "empty"}
        grads = torch.autograd.grad(loss, list(used.values()), retain_graph=True)
        derived = sum((grad * directions[name]).sum() for name, grad in zip(used, grads, strict=True))
        assert_equals_difference(torch.as_tensor(derived), derivative(shifted, 0.0, lowest=-1.0))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_derivative_through_callables_equals_differences_of_torchs_training(case: Case, problem: Problem) -> None:
    """Each hyperparameter decays; the derivative by its rate of decay weighs each step by its number."""
    start = 0.985

    def decaying(key: str, rate: Any) -> Callable[[int], Any]:
        return lambda step: case.elements[key] * rate**step

    # Rprop reads lr in init, at step 0, where the decay has no effect yet.
    keys = [key for key in case.elements if (case.name, key) != ("rprop", "lr")]
    rates = {key: torch.tensor(start, dtype=F64, requires_grad=True) for key in keys}
    hyper = {**case.elements, **{key: decaying(key, rate) for key, rate in rates.items()}}
    loss = problem.meta_loss(train(case, problem, STEPS, pack(hyper))[0])
    grads = dict(zip(rates, torch.autograd.grad(loss, list(rates.values())), strict=True))
    for key in keys:

        def by_torch(rate: float, key: str = key) -> Tensor:
            schedules = {other: decaying(other, start) for other in keys} | {key: decaying(key, rate)}
            at = lambda _, count: pack(  # noqa: E731
                {**case.elements, **{k: schedule(count) for k, schedule in schedules.items()}}
            )
            return torch_loss(case, problem, at)

        assert_equals_difference(grads[key], derivative(by_torch, start))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([(torch.view_as_real(x) if x.is_complex() else x).flatten() for x in tensors])


SMOOTH = [c for c in CASES if not c.flat | c.refused | c.fixed and all(c.elements.values())]
SECOND_ORDER = [c for c in SMOOTH if c in FIRST_CASES or c.name in ("radam", "rprop")]


@pytest.mark.parametrize("case", SECOND_ORDER, ids=str)
def test_second_derivatives_equal_differences_of_the_hypergradient(case: Case, problem: Problem) -> None:
    """The Hessian times a direction in which all hyperparameters and initial parameters move."""
    steps = 10
    origin = {key: torch.tensor(value, dtype=F64) for key, value in case.elements.items()}
    along = {key: room(value) for key, value in case.elements.items()}
    directions = {name: 0.1 * torch.randn_like(p) for name, p in problem.params.items()}

    def gradients(shift: float, *, create_graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        hyper = {key: (value + shift * along[key]).requires_grad_() for key, value in origin.items()}
        start = {name: (p + shift * directions[name]).requires_grad_() for name, p in problem.params.items()}
        loss = problem.meta_loss(train(case, problem, steps, pack(hyper), start)[0])
        inputs = [*hyper.values(), *start.values()]
        return inputs, list(torch.autograd.grad(loss, inputs, create_graph=create_graph))

    inputs, grads = gradients(0.0, create_graph=True)
    moves = [*along.values(), *directions.values()]
    slope = sum((grad.conj() * move).sum().real for grad, move in zip(grads, moves, strict=True))
    derived = flat(torch.autograd.grad(slope, inputs, materialize_grads=True))
    expected = derivative(lambda shift: flat(gradients(shift)[1]), 0.0, lowest=-1.0)
    assert_equals_difference(derived, expected)
    # A row of the Hessian each, which differ in size by orders of magnitude.
    for key, mine, theirs, error in zip(along, derived, *expected, strict=False):
        assert error <= 1e-7 * abs(theirs), key
        assert abs(mine - theirs) <= 1e-7 * abs(theirs) + error, key


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_only_a_sign_based_step_is_indifferent_to_gradients_without_a_graph(case: Case, problem: Problem) -> None:
    """Rprop says that it needs no second-order graph: with detached gradients its hypergradients are the same."""

    def detached(function: Callable[..., Tensor]) -> Callable[..., Any]:
        gradient = torch.func.grad(function)
        return lambda params: {name: g.detach() for name, g in gradient(params).items()}

    def derivatives(grad: Callable[..., Any]) -> list[Tensor]:
        hyper = {key: torch.tensor(value, dtype=F64, requires_grad=True) for key, value in case.elements.items()}
        start = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
        loss = problem.meta_loss(train(case, problem, STEPS, pack(hyper), start, grad=grad)[0])
        return list(torch.autograd.grad(loss, [*hyper.values(), *start.values()]))

    first, second = derivatives(detached), derivatives(torch.func.grad)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert same == (not case.opt.differentiates_gradients)


@pytest.mark.parametrize("case", [c for c in CASES if "step_sizes[0]" in c.fixed], ids=str)
def test_equal_bounds_of_a_step_size_have_one_sided_derivatives(case: Case, problem: Problem) -> None:
    """The lower one may only sink and the upper one only rise."""
    bound = case.elements["step_sizes[0]"]
    low, high = (hypergradients(INDICES[str(case)])[0][f"step_sizes[{i}]"] for i in range(2))
    sinking = derivative(
        lambda b: torch_loss(case, problem, {"step_sizes": (2 * bound - b, bound)}), bound, lowest=bound
    )
    rising = derivative(lambda b: torch_loss(case, problem, {"step_sizes": (bound, b)}), bound, lowest=bound)
    assert_equals_difference(low, Difference(-sinking.value, sinking.error))
    assert_equals_difference(high, rising)


@pytest.mark.parametrize("size", [1, 4099], ids=["operations", "kernel"])
def test_a_square_that_overflows_before_its_weight_is_no_nan(size: int) -> None:
    """(1 - beta2) g^2 is a float32 number and g^2 is not; nor does a step that is not rectified depend on either."""
    beta2 = torch.tensor(0.5, dtype=F64, requires_grad=True)
    opt = radam(betas=(0.9, beta2))
    params = torch.zeros(size)
    state = opt.init(params)
    params, state = opt.step(params, torch.full((size,), 2e19), state)
    assert bool(state.exp_avg_sq.isfinite().all())
    assert torch.autograd.grad(params.sum(), beta2)[0] == 0


def discontinuous(case: Case, problem: Problem, momentum: Tensor, lr: Tensor | None = None) -> Tensor:
    hyper = {"momentum": momentum, **({} if lr is None else {"lr": lr})}
    return problem.meta_loss(train(case, problem, 3, hyper)[0])


AT_ZERO_MOMENTUM = [case for case in CASES if "momentum" in case.refused]


@pytest.mark.parametrize("case", AT_ZERO_MOMENTUM, ids=str)
class TestDampenedSGDAtMomentumZero:
    """torch drops the buffer, and with it the dampening, at momentum 0 exactly: the loss jumps there."""

    def test_the_loss_jumps(self, case: Case, problem: Problem) -> None:
        at, above = (torch_loss(case, problem, {"momentum": momentum}) for momentum in (0.0, 1e-9))
        assert abs(at - above) > 1e-2

    def test_the_derivative_by_momentum_is_refused(self, case: Case, problem: Problem) -> None:
        momentum = torch.zeros((), dtype=F64, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"momentum=0.*no derivative with respect to momentum"):
            torch.autograd.grad(discontinuous(case, problem, momentum), momentum)
        with pytest.raises(RuntimeError, match=r"momentum=0.*no derivative with respect to momentum"):
            discontinuous(case, problem, momentum).backward()
        assert momentum.grad is None

    def test_under_a_transform_it_is_refused_or_nan(self, case: Case, problem: Problem) -> None:
        """Where no value can be read, nothing can be raised."""
        zero = torch.zeros((), dtype=F64)
        loss = functools.partial(discontinuous, case, problem)
        with pytest.raises(RuntimeError, match=r"momentum=0.*no derivative with respect to momentum"):
            torch.func.grad(loss)(zero)
        assert torch.func.jvp(loss, (zero,), (torch.ones_like(zero),))[1].isnan()
        batch = torch.tensor([0.0, 0.5], dtype=F64)
        derived = torch.func.vmap(torch.func.grad(loss))(batch)
        assert derived[0].isnan()
        assert derived[1] == torch.func.grad(loss)(batch[1])

    def test_the_other_derivatives_are_not(self, case: Case, problem: Problem) -> None:
        """Nor is the derivative by a momentum above 0."""
        momentum = torch.zeros((), dtype=F64, requires_grad=True)
        lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
        (derived,) = torch.autograd.grad(discontinuous(case, problem, momentum, lr), lr)
        (expected,) = torch.autograd.grad(discontinuous(case, problem, momentum.detach(), lr), lr)
        assert derived == expected != 0
        above = torch.tensor(0.1, dtype=F64, requires_grad=True)
        assert torch.autograd.grad(discontinuous(case, problem, above), above)[0] != 0
