"""Values as JSON and charts can hold them."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any


def dumps(value: Any) -> str:
    """JSON on one line; tensors and arrays become numbers and lists.

    JSON has no numbers that are not finite: they become the strings "NaN", "Infinity" and "-Infinity", as in wandb's
    history and in protobuf, and Python's ``float`` reads them back.

    Raises:
        TypeError: a value that JSON cannot hold.

    Example:
        >>> dumps({"loss": float("nan"), "betas": (0.9, float("inf"))})
        '{"loss": "NaN", "betas": [0.9, "Infinity"]}'
    """
    try:
        return _STRICT.encode(value)
    except ValueError:  # rare, so that the usual line is made without a look at every number
        return json.dumps(_named(value))


def plain(value: Any) -> Any:
    """A configuration as mappings, lists, numbers and strings; what is none of these becomes its text.

    Example:
        >>> from pathlib import Path
        >>> plain({"out": Path("runs"), "sizes": (1, 2)})
        {'out': 'runs', 'sizes': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    try:
        converted = _converted(value)
    except TypeError:
        return str(value)
    return plain(converted)


def plain_config(config: Any) -> dict[str, Any]:
    """The configuration of a run, plain; None is an empty one.

    Raises:
        TypeError: neither a dataclass nor a mapping.
    """
    config = plain({} if config is None else config)
    if not isinstance(config, dict):
        raise TypeError(f"config must be a dataclass or a mapping, got config={config!r}")
    return config


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as one level of scalars: what a chart can show.

    Lists, tensors of more than one dimension and None are left out. Objects of other kinds (an image of wandb's) stay.

    Example:
        >>> scalars({"loss": 0.5, "hyper": {"betas": (0.9, 0.99), "lr": {"weight": 0.1}, "decay": [0.1, 0.2]}})
        {'loss': 0.5, 'hyper/betas[0]': 0.9, 'hyper/betas[1]': 0.99, 'hyper/lr/weight': 0.1}
    """
    return {prefix + key: scalar for name, value in metrics.items() for key, scalar in _scalars(str(name), value)}


def columns_as_lists(columns: Mapping[str, Sequence[float]]) -> dict[str, list[Any]]:
    """The columns of curves as lists of numbers.

    Raises:
        ValueError: fewer than two columns, columns of different lengths, or empty ones.
    """
    lists = {str(name): _converted(column) if _is_array(column) else list(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in lists.items()}
    if len(lists) < 2:
        raise ValueError(f"columns must be an x-axis and one curve or more, got columns {list(lists)}")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have the same length, got lengths {lengths}")
    if not any(lengths.values()):
        raise ValueError(f"columns must have one row or more, got lengths {lengths}")
    return lists


def whole_step(step: Any) -> int:
    """A step as Python's integer; those of numpy and torch are taken.

    Raises:
        TypeError: it is none. Whoever compares steps later, to rewind, could do nothing with it.

    Example:
        >>> whole_step("3")
        Traceback (most recent call last):
        ...
        TypeError: step must be an integer, got step='3'
    """
    truth = isinstance(step, bool) or "bool" in str(getattr(step, "dtype", ""))
    try:
        if not truth:
            return operator.index(step)
    except TypeError:
        pass
    raise TypeError(f"step must be an integer, got step={step!r}")


def _scalars(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(f"{name}/{key}", item)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _scalars(f"{name}[{index}]", item)
    elif _is_array(value):
        if value.ndim == 0:
            yield name, value.item()
    elif value is not None and not isinstance(value, list):
        yield name, value


def _is_array(value: Any) -> bool:
    """A tensor of torch, or an array or a number of numpy."""
    return hasattr(value, "ndim") and hasattr(value, "tolist")


def _converted(value: Any) -> Any:
    """One level of what JSON has no word for."""
    if _is_array(value):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _named(value: Any) -> Any:
    """Numbers that are not finite by their names."""
    if isinstance(value, float):
        return value if math.isfinite(value) else _NAMES[str(float(value))]
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return _named(_converted(value))


_STRICT = json.JSONEncoder(default=_converted, allow_nan=False)
_NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
