"""torch.compile without graph breaks: the same numbers and derivatives as eager, and one compilation for all steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from metaopt.functional import radam
from tests.functional.cases import F64, FIRST_CASES, Case, Problem, pack

pytestmark = pytest.mark.filterwarnings(
    # Dynamo looks at the .grad of every input.
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
)
# Inductor imports modules of torch that are scripted, by a torch.jit that warns that it is old.
scripted = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Without it the cases, which share code, would reach the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare_one_step(case: Case, backend: str, params: dict[str, Tensor]) -> None:
    """The sixth step (RAdam's first rectified one), with derivatives by all hyperparameters and all parameters."""
    hyper = {key: torch.tensor(value, dtype=F64, requires_grad=True) for key, value in case.elements.items()}
    gradients = [{name: torch.randn_like(p) for name, p in params.items()} for _ in range(6)]
    opt = case.opt

    def step(params: Any, grads: Any, state: Any, hyper: Any) -> Any:
        return opt.step(params, grads, state, **pack(hyper))

    def results(final: Callable[..., Any]) -> tuple[Any, ...]:
        start = {name: p.clone().requires_grad_() for name, p in params.items()}
        current, state = start, opt.init(start, **pack(hyper))
        for grads in gradients[:-1]:
            current, state = step(current, grads, state, hyper)
        current, state = final(current, gradients[-1], state, hyper)
        loss = sum((torch.view_as_real(p) if p.is_complex() else p).sin().sum() for p in current.values())
        return current, state, torch.autograd.grad(loss, [*hyper.values(), *start.values()])

    compiled = results(torch.compile(step, fullgraph=True, backend=backend))
    expected = results(step)
    assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    assert bool(torch.stack(expected[2][: len(hyper)]).ne(0).all())


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_a_compiled_step_equals_the_eager_one(case: Case) -> None:
    params = Problem(torch.float32).params
    compare_one_step(
        case, "aot_eager", {name: params[name] for name in ("hidden.weight", "out.bias", "phase", "empty")}
    )


@needs_compiler
@scripted
@pytest.mark.parametrize("case", [case for case in FIRST_CASES if case.name in ("radam", "rprop")], ids=str)
def test_a_step_compiled_by_inductor_equals_the_eager_one(case: Case) -> None:
    params = Problem(torch.float32).params
    compare_one_step(case, "inductor", {name: params[name] for name in ("hidden.weight", "out.bias")})


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_one_compilation_serves_all_steps(case: Case) -> None:
    """Counters, hyperparameters (here of one parameter each) and a schedule's values are data, not constants."""
    last = list(case.opt.defaults)[-1]

    def schedule(step: Any) -> Any:
        value, factor = case.opt.defaults[last], 1 / (1 + 0.01 * step)
        return tuple(v * factor for v in value) if isinstance(value, tuple) else value * factor

    def step(params: Any, grads: Any, state: Any, lr: Any) -> Any:
        return case.opt.step(params, grads, state, **{last: schedule, "lr": lr})

    params = expected = Problem(torch.float32).params
    state = expected_state = case.opt.init(params)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for count in range(8):
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        lr = {name: torch.tensor(0.1 / (1 + count)) for name in params}
        with torch.compiler.set_stance("default" if count == 0 else "fail_on_recompile"):
            params, state = compiled(params, grads, state, lr)
        expected, expected_state = step(expected, grads, expected_state, lr)
    assert_close((params, state), (expected, expected_state), rtol=1e-5, atol=1e-6)


def test_a_gradient_inside_a_compiled_step_can_be_differentiated() -> None:
    """Of a loss that depends on the parameters to the third power, so that the second order counts."""
    start = {"x": torch.tensor([1.0, 2.0, 3.0])}
    lr = torch.tensor(0.05, dtype=F64, requires_grad=True)
    opt = radam(betas=(0.9, 0.99))

    def step(params: Any, state: Any, lr: Tensor) -> Any:
        return opt.step(params, torch.func.grad(lambda p: p["x"].pow(3).sum())(params), state, lr=lr)

    def hypergradient(later: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        params, state = step(start, opt.init(start), lr)
        for _ in range(6):
            params, state = later(params, state, lr)
        loss = params["x"].square().sum()
        return loss.detach(), torch.autograd.grad(loss, lr)[0]

    compiled = hypergradient(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert_close(compiled, hypergradient(step), rtol=1e-5, atol=1e-6)
