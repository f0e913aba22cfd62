"""What was made once for all unrolls that compute the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

_CACHE: OrderedDict[Any, Any] = OrderedDict()
_KEPT = 64
T = TypeVar("T")


def remembered(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What was made under an equal key before, if it is kept; else what is made now.

    Args:
        key: what the result depends on. If something in it has no hash, nothing is kept.
        make: makes it.
    """
    result: T
    try:
        if key not in _CACHE:
            _CACHE[key] = make()
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return make()
    _CACHE.move_to_end(key)
    result = _CACHE[key]
    while len(_CACHE) > _KEPT:
        _CACHE.popitem(last=False)
    return result
