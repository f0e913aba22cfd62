"""What was made once for all unrolls that compute the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Remembered:
    """Keeps what was made, by keys of what it depends on: as many as were used last.

    Args:
        count: how many.

    Example:
        >>> remembered = Remembered(2)
        >>> remembered("four", lambda: 4), remembered("four", lambda: 5)
        (4, 4)
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._made: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, key: Any, make: Callable[[], T]) -> T:
        """What was made under an equal key before, if it is kept; else what is made now.

        Args:
            key: what the result depends on. If something in it has no hash, nothing is kept.
            make: makes it.
        """
        try:
            hash(key)
        except TypeError:
            return make()
        if key not in self._made:
            self._made[key] = make()
        self._made.move_to_end(key)
        result: T = self._made[key]
        while len(self._made) > self._count:
            self._made.popitem(last=False)
        return result

    def clear(self) -> None:
        """Forget all of it."""
        self._made.clear()
