"""Hyperparameters to learn: an ``nn.Module`` whose parameters are unconstrained and whose values lie in their domains.

    opt = metaopt.functional.radam()
    hyper = metaopt.Hyperparameters(opt, learn=("lr", "betas"))                   # from the optimizer's defaults
    hyper = metaopt.Hyperparameters(opt, learn={"lr": 0.05, "weight_decay": 1e-4})   # from these
    hyper = metaopt.Hyperparameters(opt, learn={"lr": PerParameter(names, Schedule(steps=200, init=0.05))})

``hyper()`` is the mapping that ``opt.step(**hyper())`` takes; any ``torch.optim`` optimizer can learn its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from metaopt.functional import Optimizer
from metaopt.functional.values import Bound, describe
from metaopt.schedule import Schedule


class PerParameter:
    """Where to start a hyperparameter that has a value for each parameter of the model.

    Args:
        names: the parameters' names, as in ``named_parameters``; a dict of parameters will do.
        init: the start of each: a number, or a `Schedule` for a value per parameter and per step.

    Raises:
        ValueError: no names, or one twice.

    Example:
        >>> import metaopt
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = Hyperparameters(opt, learn={"lr": PerParameter(["weight", "bias"], 0.1)})
        >>> {name: round(lr, 6) for name, lr in hyper.numbers()["lr"].items()}
        {'weight': 0.1, 'bias': 0.1}
    """

    def __init__(self, names: Iterable[str], init: float | Schedule) -> None:
        self.names = tuple(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be distinct and at least one, got names={self.names}")
        self.init = init


@dataclass(frozen=True)
class _Leaf:
    """One learned tensor: its module parameter, and the form in which its values are handed out."""

    key: str
    bound: Bound
    names: tuple[str, ...] | None
    scheduled: bool

    def wrap(self, values: Tensor) -> Any:
        if self.names is None:
            return Schedule.of(values) if self.scheduled else values
        rows = values.unbind(0)
        return {name: Schedule.of(row) if self.scheduled else row for name, row in zip(self.names, rows, strict=True)}


class Hyperparameters(nn.Module):
    """The learned hyperparameters of a functional optimizer.

    Each value is ``biject_to(domain)`` of a float64 parameter: lr, eps and weight_decay are exponentials, betas and
    eta- scaled sigmoids, eta+ and the larger step size an exponential above their lower bound.

    Args:
        opt: the optimizer whose hyperparameters these are.
        learn: their names (which start at ``opt.defaults``), or a mapping from name to start. A start is a number, a
            tensor, a `Schedule`, a `PerParameter`, or a pair of these for a pair (betas, etas, step_sizes). A value
            that is not the optimizer's comes as ``(start, domain)``, with a domain of
            ``torch.distributions.constraints``; the same form narrows the domain of one that is.

    Raises:
        TypeError: a name that the optimizer does not have, without a domain; a start of a wrong form.
        ValueError: a start outside its domain or on its boundary (the message suggests one inside).

    Example:
        >>> import metaopt
        >>> opt = metaopt.functional.radam()
        >>> hyper = Hyperparameters(opt, learn={"lr": 0.05, "betas": (0.9, 0.99)})
        >>> hyper
        Hyperparameters(lr=0.05, betas=(0.9, 0.99))
        >>> sorted(hyper())
        ['betas', 'lr']
        >>> {name: tuple(parameter.shape) for name, parameter in hyper.named_parameters()}
        {'lr': (), 'betas[0]': (), 'betas[1]': ()}
        >>> Hyperparameters(opt, learn={"weight_decay": 0.0})
        Traceback (most recent call last):
        ...
        ValueError: weight_decay cannot start at 0.0, the boundary of its domain (>= 0.0): try 0.0001

        With a penalty that only the task reads:

        >>> from torch.distributions import constraints
        >>> Hyperparameters(opt, learn={"penalty": (0.01, constraints.positive)})
        Hyperparameters(penalty=0.01)
    """

    def __init__(self, opt: Optimizer, learn: Iterable[str] | Mapping[str, Any]) -> None:
        super().__init__()
        if isinstance(learn, str):
            learn = (learn,)
        starts = dict(learn) if isinstance(learn, Mapping) else {name: opt.defaults.get(name) for name in learn}
        if not starts:
            raise ValueError(f"learn must name at least one hyperparameter, got learn={learn!r}")
        domains = getattr(opt, "domains", {})
        self._layout: dict[str, tuple[_Leaf, ...]] = {}
        for name, start in starts.items():
            bound: Any = domains[name].open if name in domains else None
            if isinstance(start, tuple) and len(start) == 2 and isinstance(start[1], Constraint):
                start, bound = start
            if bound is None:
                raise TypeError(
                    f"{type(opt).__name__} has no hyperparameter {name!r} (it has {', '.join(opt.hyperparameters)}); "
                    f"a value of the task's comes with its domain: learn={{{name!r}: (start, constraint)}}"
                )
            self._layout[name] = tuple(self._register_all(name, start, bound))

    def _register_all(self, name: str, start: Any, bound: Bound | tuple[Bound, Bound]) -> Iterable[_Leaf]:
        if not isinstance(bound, tuple):
            yield self._register(name, start, bound, None)
            return
        if not isinstance(start, tuple | list) or len(start) != 2:
            raise TypeError(f"{name} must start at a pair, got {start!r}")
        first = self._register(f"{name}[0]", start[0], bound[0], None)
        yield first
        yield self._register(f"{name}[1]", start[1], bound[1], self._constrained(first, None).detach())

    def _register(self, key: str, start: Any, bound: Bound, first: Tensor | None) -> _Leaf:
        names = start.names if isinstance(start, PerParameter) else None
        init = start.init if isinstance(start, PerParameter) else start
        scheduled = isinstance(init, Schedule)
        if isinstance(init, Schedule):
            init = init.values
        if not isinstance(init, Real | Tensor):
            raise TypeError(f"{key} must start at a number, a tensor, a Schedule or a PerParameter, got {start!r}")
        values = torch.as_tensor(init, dtype=torch.float64).detach()
        if names is not None:
            values = values.expand(len(names), *values.shape)
        if not isinstance(bound, Constraint) and first is not None and first.shape not in ((), values.shape):
            raise ValueError(f"{key} is bounded by {key[:-3]}[0] and must have its form: both scheduled, or neither")
        leaf = _Leaf(key, bound, names, scheduled)
        constraint = _constraint(bound, first)
        _check_start(key, values, constraint)
        if hasattr(self, key):
            raise ValueError(f"{key!r} cannot be learned under this name: nn.Module has an attribute called so")
        unconstrained = biject_to(constraint).inv(values)
        self.register_parameter(key, nn.Parameter(unconstrained.clone().contiguous()))
        return leaf

    def _constrained(self, leaf: _Leaf, first: Tensor | None) -> Tensor:
        values: Tensor = biject_to(_constraint(leaf.bound, first))(self.get_parameter(leaf.key))
        return values

    def forward(self) -> dict[str, Any]:
        """The values, in their domains: a mapping for ``opt.step(**values)``, differentiable to the parameters."""
        values: dict[str, Any] = {}
        for name, leaves in self._layout.items():
            constrained: list[Tensor] = []
            for leaf in leaves:
                constrained.append(self._constrained(leaf, constrained[0] if constrained else None))
            wrapped = tuple(leaf.wrap(value) for leaf, value in zip(leaves, constrained, strict=True))
            values[name] = wrapped if len(wrapped) > 1 else wrapped[0]
        return values

    @torch.no_grad()
    def numbers(self) -> dict[str, Any]:
        """The values as plain floats, ready for ``torch.optim`` and for JSON.

        A pair is a tuple, a schedule a list with one float per step, a per-parameter value a dict by name.

        Example:
            >>> import metaopt
            >>> hyper = Hyperparameters(metaopt.functional.rprop(), learn=("etas",))
            >>> minus, plus = hyper.numbers()["etas"]
            >>> round(minus, 6), round(plus, 6)
            (0.5, 1.2)
        """
        return {name: _plain(value) for name, value in self().items()}

    def __repr__(self) -> str:
        return f"Hyperparameters({', '.join(f'{name}={_short(value)}' for name, value in self.numbers().items())})"


def _constraint(bound: Bound, first: Tensor | None) -> Constraint:
    return bound if isinstance(bound, Constraint) else bound(first)


def _check_start(key: str, values: Tensor, constraint: Constraint) -> None:
    shown = values.tolist() if values.numel() <= 8 else f"a tensor of shape {tuple(values.shape)}"
    lower, upper = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    for bound, inward in ((lower, 1), (upper, -1)):
        if bound is not None and bool((values == bound).any()):
            distance = 1e-4 if bound == 0 else 0.1 * abs(float(bound))
            if lower is not None and upper is not None:
                distance = 0.1 * float(upper - lower)
            raise ValueError(
                f"{key} cannot start at {shown}, the boundary of its domain ({describe(constraint)}): "
                f"try {float(bound) + inward * distance:.4g}"
            )
    if not bool(torch.as_tensor(constraint.check(values)).all()):
        raise ValueError(f"{key} must start inside its domain ({describe(constraint)}), got {key}={shown}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Schedule):
        return value.values.tolist()
    return value.tolist() if isinstance(value, Tensor) else value


def _short(value: Any) -> str:
    """A value for one line: numbers to six digits, a schedule by its ends, many parameters by their range."""
    if isinstance(value, tuple):
        return f"({', '.join(_short(item) for item in value)})"
    if isinstance(value, list):
        return f"{_short(value[0])}..{_short(value[-1])} over {len(value)} steps"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(item)}" for name, item in value.items()) + "}"
    return f"{value:.6g}"
