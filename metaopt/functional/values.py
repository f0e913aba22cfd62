"""What a hyperparameter may be, and the check that it is.

A *value* is a number, a tensor, a mapping from parameter name to values, a callable ``step -> value``, or a tuple of
values for the hyperparameters that are pairs (betas, etas, step_sizes). Numbers turn into float64 tensors, so that
``1 - beta2`` keeps its digits and a float and a tensor give the same trajectory to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

T = TypeVar("T")

# A constraint, or a class of constraints that takes the pair's first element as its bound (hi > lo).
Bound = Constraint | Callable[[Any], Constraint]


class OpenInterval(constraints.interval):
    """Strictly between two bounds."""

    def check(self, value: Tensor) -> Tensor:
        inside: Tensor = (self.lower_bound < value) & (value < self.upper_bound)
        return inside


@dataclass(frozen=True)
class Domain:
    """Where a hyperparameter lives.

    Attributes:
        valid: what an optimizer accepts, the closed domain (``lr >= 0``); a tuple for a pair.
        open: where it can be learned (``lr > 0``), the image of a smooth bijection of the reals; a tuple for a pair.
    """

    valid: Bound | tuple[Bound, Bound]
    open: Bound | tuple[Bound, Bound]


_WORDS = (
    (OpenInterval, "in ({lower_bound}, {upper_bound})"),
    (constraints.greater_than, "> {lower_bound}"),
    (constraints.greater_than_eq, ">= {lower_bound}"),
    (constraints.less_than, "< {upper_bound}"),
    (constraints.half_open_interval, "in [{lower_bound}, {upper_bound})"),
    (constraints.interval, "in [{lower_bound}, {upper_bound}]"),
    (type(constraints.real), "a real number"),
)


def describe(constraint: Constraint) -> str:
    """A constraint in words.

    Example:
        >>> describe(constraints.half_open_interval(0, 1))
        'in [0, 1)'
    """
    for kind, words in _WORDS:
        if isinstance(constraint, kind):
            return words.format(**vars(constraint))
    return str(constraint)


def check(name: str, value: Any, bound: Bound | tuple[Bound, Bound], *, read_tensors: bool, first: Any = None) -> None:
    """Raise if a value has the wrong form or lies outside its bound.

    Args:
        name: what the error calls the value.
        value: a number, tensor, mapping, callable or (where ``bound`` is a pair) a tuple of these.
        bound: the constraint; a pair of them for a pair.
        read_tensors: also look into tensors, which is right at construction and wrong inside a transformed step, where
            their values are unknown (and on a GPU cost a synchronisation).
        first: the first element of the pair that this value is the second of.

    Raises:
        TypeError: the value is of no form that a hyperparameter can have.
        ValueError: a number (or a tensor that was read) lies outside the bound.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            its_first = first.get(key) if isinstance(first, Mapping) else first
            check(f"{name}[{key!r}]", item, bound, read_tensors=read_tensors, first=its_first)
    elif callable(value) and not isinstance(value, Tensor):
        return
    elif isinstance(bound, tuple):
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(f"{name} must be a pair of values, got {value!r}")
        check(f"{name}[0]", value[0], bound[0], read_tensors=read_tensors)
        check(f"{name}[1]", value[1], bound[1], read_tensors=read_tensors, first=value[0])
    elif isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real tensor, got dtype {value.dtype}")
        if read_tensors and not torch.compiler.is_compiling():
            _check_inside(name, value, bound, first)
    elif isinstance(value, Real):
        # The other element of the pair may be a tensor, which is not to be read here.
        if isinstance(bound, Constraint) or read_tensors or isinstance(first, Real):
            _check_inside(name, value, bound, first)
    else:
        raise TypeError(
            f"{name} must be a number, a tensor, a mapping from parameter name to these, or a callable of the step; "
            f"got {value!r}"
        )


def _check_inside(name: str, value: Real | Tensor, bound: Bound, first: Any) -> None:
    if not isinstance(bound, Constraint):
        if not isinstance(first, Real | Tensor):
            return  # the bound differs by step, or by parameter where this value does not
        bound = bound(first if isinstance(first, Tensor) else float(first))
    try:
        inside = bool(torch.as_tensor(bound.check(torch.as_tensor(value, dtype=torch.float64))).all())
    except RuntimeError:  # a tensor batched by vmap has no single value to read
        return
    if not inside:
        shown = value.detach().tolist() if isinstance(value, Tensor) else value
        raise ValueError(f"{name} must be {describe(bound)}, got {name}={shown}")


# What the plain number 0 becomes: an algorithm may then leave the operation out for good (``weight_decay is ZERO``),
# which it must not do for a tensor that happens to be 0, because that one may be differentiated.
ZERO = torch.zeros((), dtype=torch.float64)


def to_tensors(value: Any) -> Any:
    """Turn every number in a value into a 0-d float64 tensor."""
    if isinstance(value, tuple | list):
        return tuple(to_tensors(item) for item in value)
    if isinstance(value, Mapping):
        return {key: to_tensors(item) for key, item in value.items()}
    if isinstance(value, Real):
        return ZERO if value == 0 else torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, Tensor):
        # One dtype throughout: vmap turns 0-d tensors into vectors, whose dtype would count in type promotion.
        return value.to(torch.float64)
    return value


def at_step(value: Any, step: int) -> Any:
    """A value with its callables called on ``step``.

    Example:
        >>> at_step({"lr": lambda step: 0.1 / (1 + step), "betas": (0.9, lambda step: 0.99)}, 1)
        {'lr': 0.05, 'betas': (0.9, 0.99)}
    """
    if isinstance(value, tuple | list):
        return tuple(at_step(item, step) for item in value)
    if isinstance(value, Mapping):
        return {key: at_step(item, step) for key, item in value.items()}
    if callable(value) and not isinstance(value, Tensor):
        return at_step(value(step), step)
    return value


_BY_VALUE = (str, torch.dtype, torch.device)


class Once:
    """Calls a function once per tuple of argument objects (names, dtypes and devices by value), within one step.

    Parameters share their step counter and mostly their hyperparameters, as objects; what is computed from these alone
    (bias corrections, the rectification) is then computed once for all of them.
    """

    def __init__(self) -> None:
        # The arguments are kept, because an id may be used again once its object is gone.
        self._results: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}
        self._traced: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = []

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        result: T
        if torch.compiler.is_compiling():
            # The id of an input would become a guard, and each step, with its new tensors, a compilation.
            for known, others, result in self._traced:
                if known == function and len(others) == len(args) and all(map(_same, others, args)):
                    return result
            result = function(*args)
            self._traced.append((function, args, result))
            return result
        key = (function, *(arg if isinstance(arg, _BY_VALUE) else id(arg) for arg in args))
        if key not in self._results:
            self._results[key] = (args, function(*args))
        result = self._results[key][1]
        return result


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) if isinstance(a, _BY_VALUE) else a is b
