"""Compiling for the CPU: numba, with arrays made of addresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import carray, njit, types
from numba.extending import intrinsic


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function in machine code that releases the GIL, kept on disk for the next process where that is possible."""
    compiler = partial(njit, nogil=True, error_model="numpy", **options)
    try:
        made: Callable[..., Any] = compiler(cache=True)(function)
    except RuntimeError:  # there is no folder to write to
        made = compiler()(function)
    return made


# Put in the place of its call before LLVM sees it, which often vectorizes the loops of a caller alone.
inlined = partial(compiled, inline="always")


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    pointer = types.CPointer(like)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), code


@compiled
def array_at(address: Any, start: Any, count: Any, like: Any) -> Any:
    """The ``count`` elements from element ``start`` of memory at an address, of the type of ``like``."""
    return carray(_pointer(address, like), start + count)[start:]
