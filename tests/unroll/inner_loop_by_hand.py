"""What `inner_loop` is compared with: textbook formulas, autograd.grad(create_graph=True), and small models to train.

Nothing here uses metaopt's own code, but for the drop-in classes in the table of optimizers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metaopt import optim

F64 = torch.float64


# The textbook. p: parameter, g: gradient, s: the parameter's own state, empty at first, h: hyperparameters and flags.


def sgd(p: Tensor, g: Tensor, s: dict[str, Any], h: Mapping[str, Any]) -> Tensor:
    g = (-g if h["maximize"] else g) + h["weight_decay"] * p
    s["b"] = h["momentum"] * s["b"] + (1 - h["dampening"]) * g if "b" in s else g
    return p - h["lr"] * (g + h["momentum"] * s["b"] if h["nesterov"] else s["b"])


def _moments(p: Tensor, g: Tensor, s: dict[str, Any], h: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The parameter after decoupled decay, the corrected first moment and the second one as it is."""
    (b1, b2), decay = h["betas"], h["weight_decay"]
    g = -g if h["maximize"] else g
    if h["decoupled_weight_decay"]:
        p = p - h["lr"] * decay * p
    else:
        g = g + decay * p
    s["t"] = s.get("t", 0) + 1
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g**2
    return p, s["m"] / (1 - b1 ** s["t"]), s["v"]


def adam(p: Tensor, g: Tensor, s: dict[str, Any], h: Mapping[str, Any]) -> Tensor:
    p, m, v = _moments(p, g, s, h)
    return p - h["lr"] * m / ((v / (1 - h["betas"][1] ** s["t"])) ** 0.5 + h["eps"])


def radam(p: Tensor, g: Tensor, s: dict[str, Any], h: Mapping[str, Any]) -> Tensor:
    p, m, v = _moments(p, g, s, h)
    b2, t = h["betas"][1], s["t"]
    last = 2 / (1 - b2) - 1
    rho = last - 2 * t * b2**t / (1 - b2**t)
    if rho <= 5:
        return p - h["lr"] * m
    r = ((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)) ** 0.5
    return p - h["lr"] * m * r * (1 - b2**t) ** 0.5 / (v**0.5 + h["eps"])


def rprop(p: Tensor, g: Tensor, s: dict[str, Any], h: Mapping[str, Any]) -> Tensor:
    (minus, plus), (low, high) = h["etas"], h["step_sizes"]
    g = -g if h["maximize"] else g
    same = torch.sign(g * s.get("g", 0.0))
    one = torch.ones_like(g)
    size = s.get("size", h["lr"]) * torch.where(same > 0, plus * one, torch.where(same < 0, minus * one, one))
    s["size"] = torch.where(size < low, low, torch.where(size > high, high, size))
    s["g"] = torch.where(same < 0, 0.0, g)
    return p - torch.sign(s["g"]) * s["size"]


RULES: dict[type[torch.optim.Optimizer], Callable[..., Tensor]] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.RAdam: radam,
    torch.optim.Rprop: rprop,
    optim.RAdam: radam,
    optim.Rprop: rprop,
}


class ByHand:
    """The loop that `inner_loop` stands for.

    Args:
        model: only read.
        optimizer: only read, and only its class and its groups: it must be fresh.
        hyper: one mapping per group, in place of the group's values.
        first_order: take gradients as constants.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        hyper: Sequence[Mapping[str, Any]],
        first_order: bool = False,
    ) -> None:
        assert not optimizer.state
        self.model, self.rule, self.first_order = model, RULES[type(optimizer)], first_order
        name_of = {p: name for name, p in model.named_parameters()}
        self.hyper: dict[str, Mapping[str, Any]] = {}
        for group, values in zip(optimizer.param_groups, hyper, strict=True):
            self.hyper.update({name_of[p]: {**group, **values} for p in group["params"] if p.requires_grad})
        live = dict(model.named_parameters())
        self.params: dict[str, Tensor] = {name: live[name].clone() for name in self.hyper}
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.states: dict[str, dict[str, Any]] = {name: {} for name in self.params}

    def __call__(self, *args: Any) -> Any:
        self.buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}  # updated in place
        return torch.func.functional_call(self.model, {**self.params, **self.buffers}, args)

    def step(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, list(self.params.values()), create_graph=True, allow_unused=True)
        for (name, p), g in zip(list(self.params.items()), grads, strict=True):
            if g is not None:
                g = g.detach() if self.first_order else g
                self.params[name] = self.rule(p, g, self.states[name], self.hyper[name])

    def detach(self) -> None:
        self.params = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        for state in self.states.values():
            state.update({key: value.detach() for key, value in state.items() if isinstance(value, Tensor)})


# Optimizers, and values to learn, which differ from the optimizer's own.


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, and the hyperparameters to learn."""

    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    learn: Mapping[str, Any]

    def __str__(self) -> str:
        flags = [name for name, value in self.options.items() if value is True]
        return "-".join([self.kind.__module__.split(".")[0], self.kind.__name__, *flags])

    @property
    def sign(self) -> float:
        return -1.0 if self.options.get("maximize") else 1.0

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return self.kind(params, **self.options)

    def values(self, factor: float = 1.0) -> dict[str, Any]:
        """Fresh tensors to differentiate with respect to."""

        def tensor(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(tensor(item) for item in value)
            return torch.tensor(factor * value if value < 0.3 else value, dtype=F64, requires_grad=True)

        return {name: tensor(value) for name, value in self.learn.items()}


_ADAM = {"betas": (0.8, 0.93), "eps": 1e-2, "weight_decay": 0.1}
_RPROP = {"lr": 0.02, "etas": (0.6, 1.3), "step_sizes": (0.015, 0.04)}
CASES = [
    Case(
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.2},
        {"lr": 0.2, "momentum": 0.7, "dampening": 0.1, "weight_decay": 0.05},
    ),
    Case(
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True},
        {"lr": 0.2, "momentum": 0.7, "weight_decay": 0.05},
    ),
    Case(torch.optim.Adam, {"lr": 0.01}, {"lr": 0.05, **_ADAM}),
    Case(torch.optim.AdamW, {"lr": 0.01, "maximize": True}, {"lr": 0.05, **_ADAM}),
    Case(torch.optim.RAdam, {"lr": 0.01}, {"lr": 0.03, **_ADAM}),
    Case(torch.optim.RAdam, {"lr": 0.01, "decoupled_weight_decay": True, "maximize": True}, {"lr": 0.03, **_ADAM}),
    Case(torch.optim.Rprop, {"lr": 0.01}, _RPROP),
    Case(optim.RAdam, {"lr": 0.01}, {"lr": 0.03, **_ADAM}),
    Case(optim.Rprop, {"lr": 0.01, "maximize": True}, _RPROP),
]
RPROPS = [case for case in CASES if RULES[case.kind] is rprop]
ONE_OF_EACH = [case for case in CASES if case.kind.__module__.startswith("torch") and not case.options.get("maximize")]


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in a mapping of hyperparameters, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | Sequence) and not isinstance(values, str):
        for item in values.values() if isinstance(values, Mapping) else values:
            yield from tensors(item)


# Models. Each makes its own data from a seed, and says which parameters form the optimizer's groups.


@dataclass
class Scenario:
    """A model with the groups of its optimizer and its data, the first batches to train on, the last to validate."""

    model: nn.Module
    groups: list[list[str]]
    batches: list[tuple[Tensor, Tensor]]
    training: list[tuple[Tensor, Tensor]] = field(init=False)
    validation: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        *self.training, self.validation = self.batches

    def optimizer(self, case: Case) -> torch.optim.Optimizer:
        live = dict(self.model.named_parameters())
        return case.optimizer([{"params": [live[name] for name in names]} for names in self.groups])


class ConvNet(nn.Module):
    """A convolution, batch normalization, dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)  # batch normalization would make a bias's gradient rounding noise
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1)).squeeze(1)


class Recurrent(nn.Module):
    """An LSTM, read out at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1]).squeeze(1)


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).sum(1)


class Layers(nn.Module):
    """Five layers, so that some may be frozen, some not the optimizer's, and some its second group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.tanh(layer(x))
        return self.d(x).sum(1)


def _scenario(model: nn.Module, shape: tuple[int, ...], groups: list[list[str]] | None = None) -> Scenario:
    model = model.double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    batches = []
    for _ in range(9):
        x = torch.randn(*shape, dtype=F64)
        batches.append((x, torch.sin(x.flatten(1)[:, 0]) + 0.3))
    return Scenario(model, groups or [[name for name, _ in model.named_parameters()]], batches)


def convolutional() -> Scenario:
    return _scenario(ConvNet(), (8, 2, 4, 4))


def recurrent() -> Scenario:
    return _scenario(Recurrent(), (6, 3, 2))


def tied() -> Scenario:
    return _scenario(Tied(), (6, 3))


def layered() -> Scenario:
    """Two groups; a frozen parameter in one of them; one that is not the optimizer's; one that the loss leaves out."""
    groups = [["a.weight", "b.weight", "unused.weight"], ["d.bias", "a.bias", "c.weight", "d.weight", "unused.bias"]]
    scenario = _scenario(Layers(), (6, 3), groups)
    live = dict(scenario.model.named_parameters())
    live["a.bias"].requires_grad_(False)  # the optimizer's
    live["c.bias"].requires_grad_(False)  # nobody's; b.bias is trainable, and not the optimizer's
    return scenario


SCENARIOS = [convolutional, recurrent, tied, layered]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean()


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = float(expected.detach().abs().max()) or 1.0
    return float((actual.detach() - expected.detach()).abs().max()) / scale


def count_kept() -> tuple[weakref.WeakSet[Any], Any]:
    """The tensors that graphs made from here on keep alive, and the context in which they are counted."""

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    kept: weakref.WeakSet[Any] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor.detach())
        kept.add(box)
        return box

    return kept, torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor)
