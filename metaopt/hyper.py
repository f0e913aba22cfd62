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
            ``torch.distributions.constraints``; the same form narrows the domain of one that is, or of an element of a
            pair.

    Raises:
        TypeError: a name that the optimizer does not have, without a domain; a start of a wrong form.
        ValueError: a start outside its domain or on its boundary (the message suggests one inside); a name twice.

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
        if not isinstance(learn, Mapping):
            learn = tuple(learn)
            if len(set(learn)) < len(learn):
                raise ValueError(f"learn must name each hyperparameter once, got learn={learn!r}")
        starts = dict(learn) if isinstance(learn, Mapping) else {name: opt.defaults.get(name) for name in learn}
        if not starts:
            raise ValueError(f"learn must name at least one hyperparameter, got learn={learn!r}")
        domains = getattr(opt, "domains", {})
        self._layout: dict[str, tuple[_Leaf, ...]] = {}
        for name, start in starts.items():
            bound: Any = domains[name].open if name in domains else None
            if isinstance(bound, tuple):
                self._layout[name] = tuple(self._register_pair(name, start, bound))
                continue
            start, bound = _split(start, bound)
            if bound is None:
                raise TypeError(
                    f"{type(opt).__name__} has no hyperparameter {name!r} (it has {', '.join(opt.hyperparameters)}); "
                    f"a value of the task's comes with its domain: learn={{{name!r}: (start, constraint)}}"
                )
            self._layout[name] = (self._register(*_read(name, start, bound)),)

    def _register_pair(self, name: str, start: Any, bounds: tuple[Bound, Bound]) -> Iterable[_Leaf]:
        if not isinstance(start, tuple | list) or len(start) != 2 or isinstance(start[1], Constraint):
            raise TypeError(f"{name} must start at a pair (each element may be (start, domain)), got {start!r}")
        first, first_values = _read(f"{name}[0]", *_split(start[0], bounds[0]))
        yield self._register(first, first_values)
        second, values = _read(f"{name}[1]", *_split(start[1], bounds[1]))
        forms = ((leaf.names, leaf.scheduled, v.shape) for leaf, v in ((first, first_values), (second, values)))
        if not isinstance(second.bound, Constraint) and first_values.dim() and len(set(forms)) > 1:
            raise ValueError(
                f"{second.key} is bounded by {first.key} and must have its form: both scheduled, or neither"
            )
        yield self._register(second, values, first_values)

    def _register(self, leaf: _Leaf, values: Tensor, first: Tensor | None = None) -> _Leaf:
        constraint = _constraint(leaf.bound, first)
        _check_start(leaf.key, values, constraint)
        if hasattr(self, leaf.key):
            raise ValueError(f"{leaf.key!r} cannot be learned under this name: nn.Module has an attribute called so")
        unconstrained = biject_to(constraint).inv(values)
        self.register_parameter(leaf.key, nn.Parameter(unconstrained.clone().contiguous()))
        return leaf

    def _constrained(self, leaf: _Leaf, first: Tensor | None) -> Tensor:
        constraint = _constraint(leaf.bound, first)
        # Not get_parameter: torch.func.functional_call puts plain tensors in the parameters' place.
        values: Tensor = biject_to(constraint)(getattr(self, leaf.key))
        return _rounded_inwards(values, constraint)

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

    @torch.no_grad()
    def __repr__(self) -> str:
        return f"Hyperparameters({', '.join(f'{name}={_short(value)}' for name, value in self().items())})"


def _split(start: Any, bound: Any) -> tuple[Any, Any]:
    """A start and its domain: the one that comes with it, if any."""
    if isinstance(start, tuple) and len(start) == 2 and isinstance(start[1], Constraint):
        return start
    return start, bound


def _read(key: str, start: Any, bound: Bound) -> tuple[_Leaf, Tensor]:
    """The form of a start, and its values as one tensor."""
    names = start.names if isinstance(start, PerParameter) else None
    init = start.init if isinstance(start, PerParameter) else start
    scheduled = isinstance(init, Schedule)
    if isinstance(init, Schedule):
        init = init.values
    if not isinstance(init, Real | Tensor):
        raise TypeError(f"{key} must start at a number, a tensor, a Schedule or a PerParameter, got {start!r}")
    values = torch.as_tensor(init, dtype=torch.float64).detach()
    return _Leaf(key, bound, names, scheduled), values if names is None else values.expand(len(names), *values.shape)


def _constraint(bound: Bound, first: Tensor | None) -> Constraint:
    return bound if isinstance(bound, Constraint) else bound(first)


def _bounds(constraint: Constraint, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The ends of a domain, None where it has none."""
    ends = (getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None))
    lower, upper = (None if end is None else torch.as_tensor(end, dtype=like.dtype).detach() for end in ends)
    return lower, upper


def _rounded_inwards(values: Tensor, constraint: Constraint) -> Tensor:
    """The values, those that rounding took to the end of their domain (1 + exp(-40) = 1) moved inside by one digit.

    The derivative stays that of the transform.
    """
    lower, upper = _bounds(constraint, values)
    inside = values.detach()
    if lower is not None:
        inside = torch.maximum(inside, torch.nextafter(lower, lower + torch.inf))
    if upper is not None:
        inside = torch.minimum(inside, torch.nextafter(upper, upper - torch.inf))
    return torch.where(inside == values, values, values - values.detach() + inside)


def _check_start(key: str, values: Tensor, constraint: Constraint) -> None:
    shown = values.tolist() if values.numel() <= 8 else f"a tensor of shape {tuple(values.shape)}"
    lower, upper = _bounds(constraint, values)
    # The bound of the second of a pair is the first, which may be a tensor: too much for a message.
    domain = f"> {key[:-3]}[0]" if lower is not None and lower.dim() else describe(constraint)
    for bound, inward in ((lower, 1), (upper, -1)):
        if bound is not None and bool((values == bound).any()):
            end = float(bound.expand_as(values)[values == bound][0])
            distance = 1e-4 if end == 0 else 0.1 * abs(end)
            if lower is not None and upper is not None:
                distance = 0.1 * float(upper - lower)
            raise ValueError(
                f"{key} cannot start at {shown}, the boundary of its domain ({domain}): "
                f"try {end + inward * distance:.4g}"
            )
    if not bool(torch.as_tensor(constraint.check(values)).all()) or not bool(values.isfinite().all()):
        raise ValueError(f"{key} must start inside its domain ({domain}), got {key}={shown}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Schedule):
        return value.values.tolist()
    return value.tolist() if isinstance(value, Tensor) else value


def _short(value: Any) -> str:
    """A value for one line: numbers to six digits, a schedule by its ends, a larger tensor by its range."""
    if isinstance(value, tuple):
        return f"({', '.join(_short(item) for item in value)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_short(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Schedule):
        return f"{float(value.values[0]):.6g}..{float(value.values[-1]):.6g} over {len(value)} steps"
    if value.numel() == 1:
        return f"{value.item():.6g}"
    ends = f"{value.min().item():.6g}..{value.max().item():.6g} " if value.numel() else ""
    return f"{ends}of shape {tuple(value.shape)}"
