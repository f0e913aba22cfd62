"""The kernels of the differentiable steps against torch's operations: ``TRITON_INTERPRET=1``, see ``scripts/test``."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import metaopt
from metaopt.functional import moments_step as moments
from metaopt.functional import rprop_step as rprop
from metaopt.kernels.support import interpreted

pytest.importorskip("triton", reason="triton's wheels are for Linux")
from metaopt.kernels.gpu import differentiable

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="without TRITON_INTERPRET=1 a kernel needs a GPU"),
    # The interpreter computes with numpy, which warns of a division by 0 that a GPU takes in silence.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

F32, F64 = torch.float32, torch.float64
BLOCK = differentiable.BLOCK
SIZES = (1, 1000, BLOCK, BLOCK + 1, 3 * BLOCK + 7)

# name: the module, values of the coefficients, and flags
MOMENTS: dict[str, float] = {
    "beta1": 0.9, "weight1": 0.1, "beta2": 0.99, "weight2": 0.01, "step_size": 0.05, "eps": 1e-3
}  # fmt: skip
RPROP: dict[str, float] = {"eta_minus": 0.5, "eta_plus": 1.2, "smallest": 0.2, "largest": 1.5}
CASES: dict[str, tuple[ModuleType, dict[str, float], dict[str, bool]]] = {
    "radam": (moments, MOMENTS, {"rectified": True}),
    "radam, not rectified": (moments, {**MOMENTS, "eps": 1.0, "weight_decay": 0.1}, {"rectified": False}),
    "radam, maximize": (moments, {**MOMENTS, "weight_decay": 0.1}, {"rectified": True, "maximize": True}),
    "radam, decoupled": (moments, {**MOMENTS, "shrink": 0.8}, {"rectified": True}),
    "adam": (moments, {**MOMENTS, "root_correction": 0.3, "weight_decay": 0.1}, {}),
    "adam, without eps": (moments, {**MOMENTS, "root_correction": 0.3, "eps": 0.0}, {}),
    "adamw, maximize": (moments, {**MOMENTS, "root_correction": 0.3, "shrink": 0.8}, {"maximize": True}),
    "rprop": (rprop, RPROP, {}),
    "rprop, one step size": (rprop, {**RPROP, "smallest": 0.7, "largest": 0.7}, {}),
}
CASE = pytest.mark.parametrize("case", CASES)


class Problem:
    """A step's inputs, and cotangents of its results."""

    def __init__(self, case: str, size: int = 100, dtype: torch.dtype = F64, each: bool = False) -> None:
        self.module, values, flags = CASES[case]
        shape = (size,) if each else ()
        tensors = [torch.randn(size, dtype=dtype) for _ in range(4)]
        tensors[3].abs_()
        if self.module is rprop:
            tensors[1][::5] = 0.0
        elif values["eps"]:  # dead coordinates, where v' = 0
            for tensor in tensors[1:]:
                tensor[::5] = 0.0
            if "weight_decay" in values:
                tensors[0][::5] = 0.0
        fields: dict[str, Any] = dict.fromkeys(self.module.Inputs._fields)
        fields |= dict(zip(fields, tensors, strict=False))
        fields |= {name: torch.full(shape, value, dtype=dtype) for name, value in values.items()}
        if "maximize" in fields:
            fields["maximize"] = flags.get("maximize", False)
        if "rectified" in flags:
            fields["rectified"] = torch.full(shape, flags["rectified"])
        self.inputs = self.module.Inputs(**fields)
        self.cotangents = [torch.randn(size, dtype=dtype) for _ in range(3)]
        self.learned = [name for name, x in fields.items() if isinstance(x, Tensor) and x.is_floating_point()]

    def step(self, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (moments.moments_step if self.module is moments else rprop.rprop_step)(inputs)

    def with_learned(self, change: Callable[[Tensor], Tensor], names: list[str] | None = None) -> Any:
        names = self.learned if names is None else names
        return self.inputs._replace(**{name: change(getattr(self.inputs, name)) for name in names})

    def gradients(self, step: Callable[..., Any], names: list[str] | None = None) -> dict[str, Tensor]:
        """The gradient of the results' product with the cotangents, for each name."""
        names = self.learned if names is None else names
        inputs = self.with_learned(lambda x: x.clone().requires_grad_(), names)
        leaves = [getattr(inputs, name) for name in names]
        found = torch.autograd.grad(step(inputs), leaves, self.cotangents, materialize_grads=True, allow_unused=True)
        return dict(zip(names, found, strict=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that have been launched."""
    found: list[str] = []
    launch = differentiable._launch
    monkeypatch.setattr(
        differentiable, "_launch", lambda kernel, *args: (found.append(kernel.__name__), launch(kernel, *args))
    )
    return found


def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (moments, rprop):
        monkeypatch.setattr(module, "fits", lambda *args: False)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the largest element: a sum's rounding is that of its terms."""
    assert got.shape == wanted.shape
    scale = float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= tolerance * scale, what


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
def test_single_precision(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few units in the last place from torch's operations; a sum, of their terms."""
    problem = Problem(case, 2 * BLOCK + 1, F32)
    got = problem.step(problem.inputs), problem.gradients(problem.step)
    torch_alone(monkeypatch)
    for mine, theirs in zip(got[0], problem.step(problem.inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=4e-7, atol=1e-7)
    for name, wanted in problem.gradients(problem.step).items():
        if wanted.dim():
            torch.testing.assert_close(got[1][name], wanted, rtol=2e-6, atol=1e-6)
        else:
            assert got[1][name].dtype == F32
            assert abs(got[1][name] - wanted) <= 1e-5 * wanted.abs() + 1e-4


def test_sums_over_blocks_are_added_in_double_precision() -> None:
    """2^24 and then ones, which added to it in float32 would be lost."""
    problem = Problem("rprop", 5 * BLOCK, F32)
    above = torch.full((5 * BLOCK,), 9.0)
    inputs = problem.inputs._replace(grad=torch.zeros_like(above), step_size=above)
    inputs = inputs._replace(largest=inputs.largest.requires_grad_())
    size = rprop.rprop_step(inputs)[2]
    cotangent = torch.zeros(5 * BLOCK)
    cotangent[0], cotangent[BLOCK::BLOCK] = 2.0**24, 1.0
    (gradient,) = torch.autograd.grad(size, inputs.largest, cotangent)
    assert gradient == 2.0**24 + 4.0


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
def test_what_is_not_finite_stays_where_it_arose(case: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(case, 10)
    problem.inputs.grad[3] = value
    got = *problem.step(problem.inputs), *problem.gradients(problem.step).values()
    torch_alone(monkeypatch)
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
    for inputs in (strided, mixed, half, empty):
        for got, wanted in zip(problem.step(inputs), problem.module.composed(inputs), strict=True):
            torch.testing.assert_close(got, wanted)
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


class TwoTensors:
    """Least squares on a line, so that the tree has two tensors."""

    def init(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"weight": torch.ones(3, dtype=F64), "bias": torch.zeros(1, dtype=F64)}

    def batch(self, step: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(4, 3, dtype=F64, generator=generator)

    def loss(self, params: Any, batch: Tensor, hyper: Any) -> Tensor:
        target = batch.sin().sum(1)
        return (batch @ params["weight"] + params["bias"] - target).square().mean()

    def meta_loss(self, params: Any, hyper: Any) -> Tensor:
        return self.loss(params, torch.linspace(-1.0, 1.0, 12, dtype=F64).view(4, 3), hyper)


UNROLLS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "radam": (metaopt.functional.radam(), {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}, 7),
    "adamw": (metaopt.functional.adamw(), {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.1}, 5),
    "rprop": (metaopt.functional.rprop(), {"lr": 0.05, "etas": (0.5, 1.2), "step_sizes": (0.04, 0.08)}, 5),
    "adam, lr per parameter": (
        metaopt.functional.adam(),
        {"lr": metaopt.PerParameter(["weight", "bias"], 0.05), "betas": (0.8, 0.95)},
        5,
    ),
}


@pytest.mark.parametrize("name", UNROLLS)
def test_a_hypergradient_is_the_same_with_and_without(
    name: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAdam's first five steps are not rectified, and two more are."""
    opt, learn, steps = UNROLLS[name]

    def hypergradient() -> list[Tensor]:
        hyper = metaopt.Hyperparameters(opt, learn=learn)
        estimator = metaopt.metagrad.Unrolled(steps=steps, objective="mean")
        loss = estimator.backward(TwoTensors(), opt, hyper, torch.Generator().manual_seed(1))
        return [loss, *(p.grad for p in hyper.parameters() if p.grad is not None)]

    got = hypergradient()
    assert launches == ["forward"] * steps + ["backward"] * steps
    torch_alone(monkeypatch)
    wanted = hypergradient()
    assert len(launches) == 2 * steps
    assert len(got) == len(wanted) > 2
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
