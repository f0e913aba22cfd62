"""What every functional optimizer is tested on: the table of cases, and one small problem with every kind of parameter.

A new optimizer needs one entry in `PEERS`: the class whose numbers it must give, and the options to try. The options go
to both sides under the same names, and every hyperparameter of the optimizer is learned in every variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.functional import REGISTRY

F64 = torch.float64


@dataclass(frozen=True)
class Variant:
    """One way to set an optimizer up.

    Attributes:
        options: arguments of torch's class and of ours alike.
        flat: elements of hyperparameters ("betas[1]") on which the loss does not depend; it must depend on all others.
        refused: elements whose derivative does not exist.
        fixed: elements that torch lets take no other value beside these options.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    flat: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()


def variant(*, flat: str = "", refused: str = "", fixed: str = "", **options: Any) -> Variant:
    return Variant(options, *(frozenset(names.split()) for names in (flat, refused, fixed)))


@dataclass(frozen=True)
class Peer:
    """torch's class for an optimizer, and the variants to compare; the first is the one for checks of any kind."""

    torch: type[torch.optim.Optimizer]
    variants: Sequence[Variant]


def _adam_variants(**common: Any) -> list[Variant]:
    """lr, betas, eps and weight_decay inside their domains and at the ends, for the members of Adam's family."""
    return [
        variant(lr=0.05, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1, **common),
        variant(lr=0.05, betas=(0.9, 0.99), weight_decay=0.0, **common),
        variant(lr=0.05, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1, maximize=True, **common),
        variant(lr=0.05, betas=(0.0, 0.999), eps=1e-2, weight_decay=0.0, **common),
        variant(lr=0.05, betas=(0.5, 0.9999), eps=1e-3, weight_decay=0.1, **common),
        variant(lr=0.0, betas=(0.9, 0.99), flat="betas[0] betas[1] eps weight_decay", weight_decay=0.1, **common),
    ]


PEERS = {
    "radam": Peer(
        torch.optim.RAdam,
        [
            *_adam_variants(),
            *_adam_variants(decoupled_weight_decay=True)[:3],
            variant(lr=0.05, betas=(0.9, 0.95), eps=0.0, weight_decay=0.1),
            variant(lr=0.05, betas=(0.9, 0.7)),  # rho_inf = 5.67: rectified late
            # (rho_inf - 4) (rho_inf - 2) < 0; and 0 / 0, in the branch not taken
            variant(lr=0.05, betas=(0.9, 0.5), eps=0.0, flat="betas[1] eps"),
            variant(lr=0.05, betas=(0.0, 0.0), flat="betas[1] eps"),
        ],
    ),
    "rprop": Peer(
        torch.optim.Rprop,
        [
            # Powers of the etas that do not take one bound to the other: a clamp at its bound is a kink.
            variant(lr=0.03, etas=(0.5, 1.3), step_sizes=(0.018, 0.08)),
            variant(lr=0.03, etas=(0.5, 1.3), step_sizes=(0.018, 0.08), maximize=True),
            variant(lr=0.1, flat="step_sizes[0] step_sizes[1]"),
            variant(lr=0.2, etas=(0.4, 1.1), step_sizes=(0.07, 50.0), flat="step_sizes[1]"),
            variant(lr=0.01, etas=(0.9, 2.0), step_sizes=(0.0, 0.1), flat="step_sizes[0]"),
            variant(lr=0.0, step_sizes=(0.01, 50.0), flat="lr step_sizes[1]"),
            variant(lr=0.01, step_sizes=(0.03, 0.03), flat="lr etas[0] etas[1]", fixed="step_sizes[0] step_sizes[1]"),
        ],
    ),
    "adam": Peer(
        torch.optim.Adam,
        [
            *_adam_variants(),
            variant(lr=0.05, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1),
            variant(lr=0.05, betas=(0.9, 0.0), eps=0.1, weight_decay=0.1),
            variant(lr=0.05, betas=(0.9, 0.99), weight_decay=0.1, decoupled_weight_decay=True),
        ],
    ),
    "adamw": Peer(torch.optim.AdamW, _adam_variants()[:3]),
    "sgd": Peer(
        torch.optim.SGD,
        [
            variant(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
            variant(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1, maximize=True),
            variant(lr=0.1, momentum=0.9, nesterov=True, fixed="dampening"),
            variant(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, maximize=True, fixed="dampening"),
            variant(lr=0.1, momentum=0.5, dampening=1.0),
            variant(lr=0.1, momentum=0.9),
            variant(lr=0.1, flat="dampening"),
            variant(lr=0.1, weight_decay=0.1, flat="dampening"),
            variant(lr=0.1, momentum=0.0, dampening=0.5, flat="dampening", refused="momentum"),
            variant(lr=0.0, momentum=0.9, weight_decay=0.1, flat="momentum dampening weight_decay"),
        ],
    ),
}


@dataclass(frozen=True)
class Case:
    """One optimizer in one variant."""

    name: str
    peer: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    flat: frozenset[str]
    refused: frozenset[str]
    fixed: frozenset[str]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.options.items())})"

    @property
    def opt(self) -> Any:
        return REGISTRY[self.name](**self.options)

    @property
    def sign(self) -> float:
        """The loss that the optimizer is given is this times the problem's, so that maximize descends too."""
        return -1.0 if self.options.get("maximize") else 1.0

    @property
    def elements(self) -> dict[str, float]:
        """All hyperparameters as numbers, pairs laid flat: {"lr": .1, "betas[0]": .9, ...}."""
        flat = {}
        for name, value in self.opt.defaults.items():
            if isinstance(value, tuple):
                flat.update({f"{name}[{i}]": item for i, item in enumerate(value)})
            else:
                flat[name] = value
        return flat

    def torch_optimizer(self, params: Sequence[Any]) -> torch.optim.Optimizer:
        return self.peer(params, **self.options, foreach=False)


def pack(elements: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `Case.elements`: keyword arguments for ``init`` and ``step``."""
    hyper: dict[str, Any] = {}
    for key, value in elements.items():
        name, bracket, _ = key.partition("[")
        hyper[name] = (*hyper.get(name, ()), value) if bracket else value
    return hyper


def cases(first_only: bool = False) -> Iterator[Case]:
    for name, peer in PEERS.items():
        for item in peer.variants[:1] if first_only else peer.variants:
            yield Case(name, peer.torch, item.options, item.flat, item.refused, item.fixed)


CASES = list(cases())
FIRST_CASES = list(cases(first_only=True))


class Problem:
    """Regression by a tanh network 5-8-1 whose last input is 0 in training and not in validation.

    The weights of that input have gradients of exactly 0 and do reach the meta-loss. The other parameters: a 0-d
    bias, a complex vector and a tensor without elements. ``hidden.bias`` has no gradient at steps 0, 4 and 9.
    """

    def __init__(self, dtype: torch.dtype = F64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = F64) -> Tensor:
            return torch.randn(*shape, dtype=dtype, generator=generator)

        x, self.x_val = normal(12, 5), normal(7, 5).to(dtype)
        x[:, 4] = 0.0
        self.x = x.to(dtype)
        self.y, self.y_val = (torch.sin(x[:, 0] + 0.5 * x[:, 1]) for x in (self.x, self.x_val))
        self.params = {
            "hidden.weight": 0.5 * normal(8, 5).to(dtype),
            "hidden.bias": 0.3 * normal(8).to(dtype),
            "out.weight": 0.5 * normal(8).to(dtype),
            "out.bias": torch.tensor(0.1, dtype=dtype),
            "phase": normal(3, dtype=torch.complex128).to(dtype.to_complex()),
            "empty": torch.zeros(0, 3, dtype=dtype),
        }

    @staticmethod
    def error(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(x @ params["hidden.weight"].T + params["hidden.bias"])
        fit = (hidden @ params["out.weight"] + params["out.bias"] - y).square().mean()
        phase = torch.view_as_real(params["phase"])
        return fit + (phase - 0.2).square().sum() * 0.3 + 0.1 * phase.sin().sum() + params["empty"].sum()

    def loss(self, params: Mapping[str, Tensor]) -> Tensor:
        return self.error(params, self.x, self.y)

    def meta_loss(self, params: Mapping[str, Tensor]) -> Tensor:
        return self.error(params, self.x_val, self.y_val)

    @staticmethod
    def absent(step: int) -> tuple[str, ...]:
        """The parameters without a gradient at a step."""
        return ("hidden.bias",) if step in (0, 4, 9) else ()


def train(
    case: Case,
    problem: Problem,
    steps: int,
    hyper: Mapping[str, Any] | None = None,
    params: Mapping[str, Tensor] | None = None,
    *,
    grad: Callable[..., Any] = torch.func.grad,
) -> tuple[dict[str, Tensor], Any]:
    """The parameters and the state after some steps of our optimizer."""
    params, hyper = dict(params or problem.params), hyper or {}
    opt = case.opt
    state = opt.init(params, **hyper)
    gradient = grad(lambda p: case.sign * problem.loss(p))
    for step in range(steps):
        grads = gradient(params)
        grads.update(dict.fromkeys(problem.absent(step)))
        params, state = opt.step(params, grads, state, **hyper)
    return params, state


def train_torch(
    case: Case,
    problem: Problem,
    steps: int,
    hyper: Mapping[str, Any] | Callable[[str, int], Mapping[str, Any]] | None = None,
    params: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """The same by torch's optimizer, each parameter in a group of its own.

    Args:
        hyper: numbers, or a function that gives them for the name of a parameter and the number of steps it took.
    """
    live = {name: p.detach().clone().requires_grad_() for name, p in (params or problem.params).items()}
    values = hyper if callable(hyper) else lambda name, count: hyper or {}
    optimizer = case.torch_optimizer([{"params": [p], **values(name, 0)} for name, p in live.items()])
    count = dict.fromkeys(live, 0)
    for step in range(steps):
        grads = torch.autograd.grad(case.sign * problem.loss(live), list(live.values()))
        for (name, p), g, group in zip(live.items(), grads, optimizer.param_groups, strict=True):
            p.grad = None if name in problem.absent(step) else g
            group.update(values(name, count[name]))
            count[name] += p.grad is not None
        optimizer.step()
    return live, optimizer
