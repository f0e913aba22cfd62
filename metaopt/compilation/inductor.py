"""Compiling pure functions, once for all that compute the same."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch

from metaopt.compilation.cache import Remembered
from metaopt.compilation.trusted import observed

_REMEMBERED = Remembered(64)


def compiled(key: tuple[Any, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, or what was compiled under an equal key before.

    Args:
        key: what the function depends on besides its arguments.
        function: pure, with tensors (in tuples) as arguments.

    Returns:
        The compiled function. Where there is no compiler it warns once, and the function runs as it is.
    """
    return _REMEMBERED(key, lambda: _Compiled(function))


class _Compiled:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = torch.compile(
            _isolated(function),
            backend=_recomputing,
            fullgraph=True,
            dynamic=False,
        )

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            return self._function(*args)
        try:
            return self._compiled(*args)
        except Exception as error:
            if not _no_compiler(error):
                raise
            _warn_once(str(error))
            self._compiled = None
            return self._function(*args)


def _recomputing(graph: Any, inputs: Any) -> Any:
    """Inductor, computing again in the backward pass what costs no matrix product: it reads less memory.

    On a CPU what calls the kernels is compiled too: in Python it takes a tenth of a small step.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))
    patches = {"cpp_wrapper": True} if on_cpu else None
    with config.patch(aggressive_recomputation=True):
        return observed(cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=patches)))


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(f"compile=True has no effect, no working compiler was found: {why}", stacklevel=4)


def _no_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ in ("InvalidCxxCompiler", "TritonMissing") or "Compiler: " in str(error):
            return True
        inner = getattr(error, "inner_exception", None)
        error = inner if inner is not None else error.__cause__
    return False


def _isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    Dynamo keeps what it compiled with the code object, and gives up after a few variants: those of one unroll should
    not count against another's.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
