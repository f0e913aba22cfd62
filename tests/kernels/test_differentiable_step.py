"""The kernels of the differentiable steps against torch's operations.

Run twice by scripts/test: as it is, which tries the numba passes, and with TRITON_INTERPRET=1, which tries the Triton
kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaopt.functional.rprop_step import rprop_step
from metaopt.kernels import differentiable as dispatch
from metaopt.kernels import support
from tests.kernels.steps import CASES, F64, UNROLLS, Problem, assert_near, hypergradient, operations

INTERPRETED = support.interpreted()
if INTERPRETED:
    pytest.importorskip("triton", reason="triton's wheels are for Linux")
    from metaopt.kernels.gpu import differentiable
    from metaopt.kernels.gpu.differentiable import BLOCK
else:
    pytest.importorskip("numba", reason='it comes with pip install "metaopt[fused]"')
    from metaopt.kernels.cpu import differentiable, threads
    from metaopt.kernels.cpu.tiles import TILE as BLOCK

# The interpreter computes with numpy, which warns of a division by 0 that a GPU takes in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ON_CPU = pytest.mark.skipif(INTERPRETED, reason="of the numba passes")

F32 = torch.float32
SIZES = (1, 1000, BLOCK, BLOCK + 1, 3 * BLOCK + 7)

CASE = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that have been launched, over however few elements."""
    monkeypatch.setattr(dispatch, "LEAST", 1)
    found: list[str] = []
    launch = differentiable._launch
    monkeypatch.setattr(
        differentiable, "_launch", lambda kernel, *args: (found.append(kernel.__name__), launch(kernel, *args))[1]
    )
    return found


@CASE
@pytest.mark.parametrize("size", SIZES)
def test_results_and_gradients_are_those_of_the_operations(case: str, size: int, launches: list[str]) -> None:
    problem = Problem(case, size)
    for got, wanted in zip(problem.step(problem.inputs), problem.module.composed(problem.inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-15)
    wanted = problem.gradients(problem.module.composed)
    for name, got in problem.gradients(problem.step).items():
        assert got.isfinite().all()
        assert_near(got, wanted[name], 1e-12, name)
    assert launches == ["forward", "forward", "backward"]


@CASE
def test_a_value_for_each_element(case: str, launches: list[str]) -> None:
    problem = Problem(case, BLOCK + 3, each=True)
    wanted = problem.gradients(problem.module.composed)
    for name, got in problem.gradients(problem.step).items():
        assert_near(got, wanted[name], 1e-12, name)
    assert launches == ["forward", "backward"]


@CASE
def test_single_precision(case: str) -> None:
    """A few units in the last place from torch's operations; a sum, of their terms."""
    problem = Problem(case, 2 * BLOCK + 1, F32)
    got = problem.step(problem.inputs), problem.gradients(problem.step)
    with operations():
        wanted = problem.step(problem.inputs), problem.gradients(problem.step)
    for mine, theirs in zip(got[0], wanted[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=4e-7, atol=1e-7)
    for name, theirs in wanted[1].items():
        assert got[1][name].dtype == F32
        summed = theirs.dim() == 0
        torch.testing.assert_close(got[1][name], theirs, rtol=1e-5 if summed else 2e-6, atol=1e-4 if summed else 1e-6)


def test_sums_over_blocks_are_added_in_double_precision() -> None:
    """2^24 and then ones, which added to it in float32 would be lost."""
    problem = Problem("rprop", 5 * BLOCK, F32)
    above = torch.full((5 * BLOCK,), 9.0)
    inputs = problem.inputs._replace(grad=torch.zeros_like(above), step_size=above)
    inputs = inputs._replace(largest=inputs.largest.requires_grad_())
    size = rprop_step(inputs)[2]
    cotangent = torch.zeros(5 * BLOCK)
    cotangent[0], cotangent[BLOCK::BLOCK] = 2.0**24, 1.0
    (gradient,) = torch.autograd.grad(size, inputs.largest, cotangent)
    assert gradient == 2.0**24 + 4.0


@ON_CPU
@pytest.mark.parametrize("case", ["adamw, maximize", "rprop"])
def test_threads_share_the_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(case, 2 * threads.BLOCK + 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = problem.step(problem.inputs), problem.gradients(problem.step)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shared = problem.step(problem.inputs), problem.gradients(problem.step)
    assert all(torch.equal(mine, other) for mine, other in zip(shared[0], alone[0], strict=True))
    for name, gradient in alone[1].items():
        assert_near(shared[1][name], gradient, 1e-13, name)


@ON_CPU
def test_few_elements_wait_for_no_compiler(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST", 7)
    for size in (6, 7):
        problem = Problem("adam", size)
        problem.gradients(problem.step)
        assert launches == (["forward", "backward"] if size == 7 else [])


@pytest.mark.parametrize("case", ["radam, maximize", "adam, without eps", "adamw, maximize", "rprop"])
@pytest.mark.parametrize("count", [0, 1])
def test_only_what_is_asked_for_is_written(case: str, count: int) -> None:
    """Of all inputs one, or all but one."""
    problem = Problem(case, 10)
    everything = problem.gradients(problem.step)
    for name in problem.learned:
        names = [name] if count else [other for other in problem.learned if other != name]
        got = problem.gradients(problem.step, names)
        assert all(torch.equal(got[key], everything[key]) for key in names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e200, 0.0])
@pytest.mark.parametrize("case", ["radam", "adam", "rprop"])
def test_what_is_not_finite_stays_where_it_arose(case: str, value: float) -> None:
    problem = Problem(case, 10)
    problem.inputs.grad[3] = value
    got = *problem.step(problem.inputs), *problem.gradients(problem.step).values()
    with operations():
        wanted = *problem.step(problem.inputs), *problem.gradients(problem.step).values()
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("case", ["radam, maximize", "adamw, maximize", "rprop"])
def test_a_derivative_that_is_differentiated_again_takes_the_operations(case: str, launches: list[str]) -> None:
    problem = Problem(case, 20)
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}

    def second(step: Callable[..., Any]) -> list[Tensor]:
        inputs = problem.with_learned(lambda x: x.clone().requires_grad_())
        leaves = [getattr(inputs, name) for name in problem.learned]
        cotangents = [c.clone().requires_grad_() for c in problem.cotangents]
        first = torch.autograd.grad(step(inputs), leaves, cotangents, create_graph=True, **options)
        assert "backward" not in launches
        smooth = sum(g.sin().sum() for g in first if g.requires_grad)
        return list(torch.autograd.grad(smooth, [*leaves, *cotangents], **options))

    wanted = second(problem.module.composed)
    for got, other in zip(second(problem.step), wanted, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-12)
    assert launches[0] == "forward"


@pytest.mark.parametrize("case", ["adam", "rprop"])
def test_cotangents_may_have_any_strides(case: str, launches: list[str]) -> None:
    problem = Problem(case, 30)
    problem.cotangents = [torch.ones(1, dtype=F64).expand(30), torch.randn(60, dtype=F64)[::2], problem.cotangents[2]]
    wanted = problem.gradients(problem.module.composed)
    for name, got in problem.gradients(problem.step).items():
        assert_near(got, wanted[name], 1e-12, name)
    assert launches == ["forward", "backward"]


@pytest.mark.parametrize("case", ["adam", "rprop"])
def test_what_a_kernel_cannot_take_goes_through_the_operations(case: str, launches: list[str]) -> None:
    problem = Problem(case, 6)
    coefficient = problem.learned[-1]
    strided = problem.with_learned(lambda x: x.repeat_interleave(2)[::2], problem.learned[:1])
    mixed = problem.with_learned(lambda x: x.expand(6).clone(), [coefficient])
    half = problem.with_learned(torch.Tensor.half)
    empty = problem.with_learned(lambda x: x[:0], problem.learned[:4])
    other = problem.with_learned(torch.Tensor.float, [coefficient])
    for inputs in (strided, mixed, half, empty, other):
        for got, wanted in zip(problem.step(inputs), problem.module.composed(inputs), strict=True):
            torch.testing.assert_close(got, wanted)
    assert launches == []


def test_without_their_compiler_the_operations_stand_for_the_kernels(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "_installed", lambda module: False)
    problem = Problem("adam", 6)
    problem.gradients(problem.step)
    assert launches == []


TRANSFORMS: dict[str, Any] = {
    "vmap": lambda function: lambda x: torch.vmap(function)(torch.stack([x, 0.5 * x])),
    "vmap of grad": lambda function: lambda x: torch.vmap(torch.func.grad(lambda x: function(x).sum()))(x.expand(2)),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
}


@pytest.mark.parametrize("case", ["adam", "rprop"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_see_the_operations(case: str, transform: str) -> None:
    problem = Problem(case, 4)
    name = problem.learned[-1]

    def derived(step: Callable[..., Any]) -> Tensor:
        function = lambda x: step(problem.inputs._replace(**{name: x}))[0]  # noqa: E731
        result: Tensor = TRANSFORMS[transform](function)(getattr(problem.inputs, name))
        return result

    torch.testing.assert_close(derived(problem.step), derived(problem.module.composed))


@pytest.mark.parametrize("case", ["adam", "rprop"])
def test_batched_cotangents_and_tangents_are_not_lost_backward(case: str) -> None:
    problem = Problem(case, 4)
    name = problem.learned[-1]

    def leaf(inputs: Any) -> Any:
        return getattr(inputs, name)

    def batched(step: Callable[..., Any]) -> Tensor:
        inputs = problem.with_learned(lambda x: x.clone().requires_grad_(), [name])
        basis = torch.eye(4, dtype=F64)
        return torch.autograd.grad(step(inputs)[0], leaf(inputs), basis, is_grads_batched=True)[0]

    def forward_over_reverse(step: Callable[..., Any]) -> Tensor:
        inputs = problem.with_learned(lambda x: x.clone().requires_grad_(), [name])
        with forward_ad.dual_level():
            moving = forward_ad.make_dual(*problem.cotangents[:2])
            (gradient,) = torch.autograd.grad(step(inputs)[0], leaf(inputs), moving)
            tangent: Tensor | None = forward_ad.unpack_dual(gradient).tangent
        assert tangent is not None
        return tangent

    for derived in (batched, forward_over_reverse):
        torch.testing.assert_close(derived(problem.step), derived(problem.module.composed))


@pytest.mark.parametrize("name", UNROLLS)
def test_a_hypergradient_is_the_same_with_and_without(name: str, launches: list[str]) -> None:
    steps = UNROLLS[name][-1]
    got = hypergradient(name)
    assert launches == ["forward"] * steps + ["backward"] * steps
    with operations():
        wanted = hypergradient(name)
    assert len(launches) == 2 * steps
    assert len(got) == len(wanted) > 2
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
