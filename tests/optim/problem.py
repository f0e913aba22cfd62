"""One small problem for the drop-ins, and three ways to train on it: torch's, ours, and the functional one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt import functional, optim

F64 = torch.float64
STEPS = 14  # RAdam rectifies from the sixth

PAIRS: list[tuple[Any, Any]] = [(optim.RAdam, torch.optim.RAdam), (optim.Rprop, torch.optim.Rprop)]
FUNCTIONAL: dict[Any, Any] = {optim.RAdam: functional.radam, optim.Rprop: functional.rprop}


class Problem:
    """Regression by a tanh network whose last input is 0 in training and not in validation.

    The weights of that input have gradients of exactly 0 and do reach the meta-loss.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        self.x, self.x_val = normal(10, 4), normal(6, 4)
        self.x[:, 3] = 0.0
        self.y, self.y_val = (torch.sin(x[:, 0] - x[:, 1]) for x in (self.x, self.x_val))
        self.start = {"hidden": 0.7 * normal(3, 4), "bias": 0.3 * normal(3), "out": normal(3), "shift": normal(())}

    @staticmethod
    def _error(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(x @ params["hidden"].T + params["bias"])
        return (hidden @ params["out"] + params["shift"] - y).square().mean()

    def loss(self, params: Mapping[str, Tensor]) -> Tensor:
        return self._error(params, self.x, self.y)

    def meta_loss(self, params: Mapping[str, Tensor]) -> Tensor:
        return self._error(params, self.x_val, self.y_val)


PROBLEM = Problem()


def leaves() -> dict[str, Tensor]:
    """The initial parameters, fresh, to differentiate with respect to."""
    return {name: p.clone().requires_grad_() for name, p in PROBLEM.start.items()}


def differentiable_steps(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    steps: int = STEPS,
    *,
    sign: float = 1.0,
    create_graph: bool = True,
    absent: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """As one unrolls an optimizer of torch's: non-leaf parameters, which the loss reads as clones.

    The gradient is that of the clones: a parameter that was not stepped also reaches the loss through the steps of the
    others.
    """
    for step in range(steps):
        read = {name: p.clone() for name, p in params.items()}
        grads = torch.autograd.grad(sign * PROBLEM.loss(read), list(read.values()), create_graph=create_graph)
        for (name, p), grad in zip(params.items(), grads, strict=True):
            p.grad = None if name in (absent or {}).get(step, ()) else grad
        optimizer.step()


def plain_steps(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], steps: int = STEPS, *, sign: float = 1.0
) -> None:
    """As one trains."""
    for _ in range(steps):
        optimizer.zero_grad()
        (sign * PROBLEM.loss(params)).backward()
        optimizer.step()


def functional_steps(
    opt: Any,
    params: Mapping[str, Tensor],
    hyper: Mapping[str, Any],
    steps: int = STEPS,
    *,
    sign: float = 1.0,
    absent: Mapping[int, Sequence[str]] | None = None,
) -> dict[str, Tensor]:
    """By the functional optimizer."""
    stepped = dict(params)
    state = opt.init(stepped, **hyper)
    for step in range(steps):
        grads = torch.func.grad(lambda p: sign * PROBLEM.loss(p))(stepped)
        grads.update(dict.fromkeys((absent or {}).get(step, ())))
        stepped, state = opt.step(stepped, grads, state, **hyper)
    return stepped


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in hyperparameters, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | Sequence):
        for item in values.values() if isinstance(values, Mapping) else values:
            yield from tensors(item)


def learned(values: Any) -> Any:
    """The same values as fresh float64 tensors to differentiate with respect to."""
    if isinstance(values, Mapping):
        return {name: learned(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(learned(value) for value in values)
    return torch.as_tensor(values, dtype=F64).clone().requires_grad_()


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    scale = float(expected.detach().abs().max()) or 1.0
    return float((actual.detach() - expected.detach()).abs().max()) / scale


def name_of(value: Any) -> str:
    if isinstance(value, type):
        return f"{value.__module__.split('.')[0]}.{value.__name__}"
    return ",".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, Mapping) else repr(value)
