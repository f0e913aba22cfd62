"""Checks of arguments: an error names the argument and what was given."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

from torch import Tensor


def check_count(name: str, value: object) -> None:
    """Raise for what is no whole number (TypeError), or below 1 (ValueError).

    Example:
        >>> check_count("steps", 0)
        Traceback (most recent call last):
        ...
        ValueError: steps must be >= 1, got steps=0
    """
    if check_whole(name, value) < 1:
        raise ValueError(f"{name} must be >= 1, got {name}={value}")


def check_whole(name: str, value: Any) -> int:
    """The value as an int; raise TypeError for what is no whole number.

    Example:
        >>> check_whole("steps", 2.5)
        Traceback (most recent call last):
        ...
        TypeError: steps must be a whole number, got steps=2.5
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be a whole number, got {name}={value!r}")


def check_real(name: str, value: object) -> None:
    """Raise TypeError for what is no real number.

    Example:
        >>> check_real("std", "0.1")
        Traceback (most recent call last):
        ...
        TypeError: std must be a number, got std='0.1'
    """
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} must be a number, got {name}={value!r}")
