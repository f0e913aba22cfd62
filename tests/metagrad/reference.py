"""What estimators are compared with: a task with every kind of dependence, and unrolls written out by hand.

Nothing here comes from `metaopt.functional` or `metaopt.unroll`: the updates are the textbook's on plain tensors, and
the gradients ``torch.autograd.grad(..., create_graph=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt import Hyperparameters, Schedule
from metaopt.functional import REGISTRY

F64 = torch.float64

# Inside all domains, and such that each has an effect: some of Rprop's step sizes are clamped at either end.
STARTS: dict[str, dict[str, Any]] = {
    "radam": {"lr": 0.05, "betas": (0.8, 0.97), "eps": 0.01, "weight_decay": 0.05},
    "rprop": {"lr": 0.03, "etas": (0.5, 1.3), "step_sizes": (0.018, 0.08)},
    "adam": {"lr": 0.05, "betas": (0.8, 0.97), "eps": 0.01, "weight_decay": 0.05},
    "adamw": {"lr": 0.05, "betas": (0.8, 0.97), "eps": 0.01, "weight_decay": 0.05},
    "sgd": {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.05},
}


def learn_all(name: str, **more: Any) -> tuple[Any, Hyperparameters]:
    """An optimizer, and a module that learns all its hyperparameters from `STARTS`."""
    opt = REGISTRY[name]()
    return opt, Hyperparameters(opt, {**STARTS[name], **more})


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


class Regression:
    """A tanh network 3-4-1 in float64. The inner loss reads ``penalty``, the outer one ``outer``, if there are any."""

    def __init__(self) -> None:
        generator = seeded(7)
        self.x = torch.randn(30, 3, generator=generator, dtype=F64)
        self.y = torch.sin(2 * self.x[:, 0]) + 0.3 * self.x[:, 1] * self.x[:, 2]

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        shapes = {"in.weight": (4, 3), "in.bias": (4,), "out.weight": (4,)}
        return {name: 0.7 * torch.randn(shape, generator=generator, dtype=F64) for name, shape in shapes.items()}

    def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        index = torch.randint(20, (6,), generator=generator)
        return self.x[index], self.y[index]

    @staticmethod
    def error(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (torch.tanh(x @ params["in.weight"].T + params["in.bias"]) @ params["out.weight"] - y).square().mean()

    @staticmethod
    def norm(params: Mapping[str, Tensor]) -> Tensor:
        return sum((p.square().sum() for p in params.values()), torch.zeros((), dtype=F64))

    def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
        return self.error(params, *batch) + hyper.get("penalty", 0.0) * self.norm(params)

    def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
        return self.error(params, self.x[20:], self.y[20:]) + hyper.get("outer", 0.0) * self.norm(params)


Update = Callable[[Tensor, Tensor, dict[str, Any], int, Mapping[str, Any]], Tensor]


def radam(p: Tensor, g: Tensor, state: dict[str, Any], t: int, v: Mapping[str, Any]) -> Tensor:
    (b1, b2), g = v["betas"], g + v["weight_decay"] * p
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    unbiased = state["m"] / (1 - b1**t)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    if rho <= 5:
        return p - v["lr"] * unbiased
    r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).sqrt()
    return p - v["lr"] * unbiased * r * (1 - b2**t).sqrt() / (state["v"].sqrt() + v["eps"])


def rprop(p: Tensor, g: Tensor, state: dict[str, Any], t: int, v: Mapping[str, Any]) -> Tensor:
    size, prev = state.get("size", v["lr"] * torch.ones_like(p)), state.get("prev", torch.zeros_like(p))
    minus, plus = v["etas"]
    agreement = torch.sign(g * prev)
    factor = torch.where(agreement > 0, plus, torch.where(agreement < 0, minus, 1.0))
    lo, hi = v["step_sizes"]
    scaled = size * factor
    state["size"] = torch.where(scaled < lo, lo, torch.where(scaled > hi, hi, scaled))
    state["prev"] = torch.where(agreement < 0, 0.0, g)
    return p - torch.sign(state["prev"]) * state["size"]


def adam(p: Tensor, g: Tensor, state: dict[str, Any], t: int, v: Mapping[str, Any]) -> Tensor:
    b1, b2 = v["betas"]
    g = g + v["weight_decay"] * p
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    return p - v["lr"] * (state["m"] / (1 - b1**t)) / ((state["v"] / (1 - b2**t)).sqrt() + v["eps"])


def adamw(p: Tensor, g: Tensor, state: dict[str, Any], t: int, v: Mapping[str, Any]) -> Tensor:
    return adam(p, g, state, t, {**v, "weight_decay": 0.0}) - v["lr"] * v["weight_decay"] * p


def sgd(p: Tensor, g: Tensor, state: dict[str, Any], t: int, v: Mapping[str, Any]) -> Tensor:
    g = g + v["weight_decay"] * p
    state["b"] = g if t == 1 else v["momentum"] * state["b"] + (1 - v["dampening"]) * g
    return p - v["lr"] * state["b"]


UPDATES: dict[str, Update] = {"radam": radam, "rprop": rprop, "adam": adam, "adamw": adamw, "sgd": sgd}


def value_at(value: Any, name: str, step: int) -> Any:
    """The value for one parameter at one step."""
    if isinstance(value, tuple):
        return tuple(value_at(item, name, step) for item in value)
    if isinstance(value, dict):
        return value_at(value[name], name, step)
    return value.values[min(step, len(value) - 1)] if isinstance(value, Schedule) else value


def unroll(
    update: Update,
    task: Any,
    values: Mapping[str, Any],
    steps: int,
    objective: str = "final",
    truncation: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """The meta-loss, with the graph to ``values``."""
    params = {name: p.requires_grad_() for name, p in task.init(generator).items()}
    states: dict[str, dict[str, Any]] = {name: {} for name in params}
    total = torch.zeros((), dtype=F64)
    for step in range(steps):
        if truncation and step and step % truncation == 0:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
            states = {name: {key: x.detach() for key, x in state.items()} for name, state in states.items()}
        loss = task.loss(params, task.batch(step, generator), values)
        if objective == "inner":
            total = total + loss / steps
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        new = {}
        for (name, p), g in zip(params.items(), grads, strict=True):
            new[name] = update(p, g, states[name], step + 1, {k: value_at(v, name, step) for k, v in values.items()})
        params = new
        if objective == "mean":
            total = total + task.meta_loss(params, values) / steps
    return task.meta_loss(params, values) if objective == "final" else total


def finite_difference(f: Callable[[], float], p: Tensor, index: int = 0, h: float = 1e-3) -> float:
    """The derivative of ``f()`` with respect to one element of ``p``, of fourth order."""
    flat, at = p.data.view(-1), {}
    origin = flat[index].item()
    for k in (-2, -1, 1, 2):
        flat[index] = origin + k * h
        at[k] = f()
    flat[index] = origin
    assert math.isfinite(sum(at.values()))
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
