"""Steps and unrolls on which the kernels of the differentiable steps are compared with torch's operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import metaopt
from metaopt.functional import moments_step as moments
from metaopt.functional import rprop_step as rprop

F64 = torch.float64

MOMENTS: dict[str, float] = {
    "beta1": 0.9, "weight1": 0.1, "beta2": 0.99, "weight2": 0.01, "step_size": 0.05, "eps": 1e-3
}  # fmt: skip
RPROP: dict[str, float] = {"eta_minus": 0.5, "eta_plus": 1.2, "smallest": 0.2, "largest": 1.5}
# The module of a step, values of its coefficients, and its flags.
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


class Problem:
    """A step's inputs, and cotangents of its results."""

    def __init__(
        self, case: str, size: int = 100, dtype: torch.dtype = F64, each: bool = False, device: Any = "cpu"
    ) -> None:
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
        fields = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in fields.items()}
        self.inputs = self.module.Inputs(**fields)
        self.cotangents = [torch.randn(size, dtype=dtype).to(device) for _ in range(3)]
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


@contextlib.contextmanager
def operations() -> Iterator[None]:
    """Here torch's operations stand for the kernels."""
    with mock.patch.object(moments, "fits", return_value=False), mock.patch.object(rprop, "fits", return_value=False):
        yield


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the largest element: a sum's rounding is that of its terms."""
    assert got.shape == wanted.shape
    scale = float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= tolerance * scale, what


class TwoTensors:
    """Least squares with an offset: a task whose parameters are two tensors."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device

    def init(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        ones = torch.ones(3, dtype=F64, device=self.device)
        return {"weight": ones, "bias": torch.zeros_like(ones[:1])}

    def batch(self, step: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(4, 3, dtype=F64, generator=generator).to(self.device)

    def loss(self, params: Any, batch: Tensor, hyper: Any) -> Tensor:
        target = batch.sin().sum(1)
        return (batch @ params["weight"] + params["bias"] - target).square().mean()

    def meta_loss(self, params: Any, hyper: Any) -> Tensor:
        return self.loss(params, torch.linspace(-1.0, 1.0, 12, dtype=F64, device=self.device).view(4, 3), hyper)


# An optimizer, what is learned, and steps: RAdam's first five are not rectified.
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


def hypergradient(name: str, device: Any = "cpu") -> list[Tensor]:
    """The meta-loss of an unroll, and the gradients of all that is learned."""
    opt, learn, steps = UNROLLS[name]
    hyper = metaopt.Hyperparameters(opt, learn=learn).to(device)
    estimator = metaopt.metagrad.Unrolled(steps=steps, objective="mean")
    loss = estimator.backward(TwoTensors(device), opt, hyper, torch.Generator().manual_seed(1))
    return [loss, *(p.grad for p in hyper.parameters() if p.grad is not None)]
