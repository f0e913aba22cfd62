"""Compiling the pure functions of an unroll, once for all unrolls that compute the same."""

from __future__ import annotations

import functools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

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


def compiled(key: tuple[Any, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, or what was compiled under an equal key before.

    Args:
        key: what the function depends on besides its arguments.
        function: pure, with tensors (in tuples) as arguments.

    Returns:
        The compiled function. Where there is no compiler it warns once, and the function runs as it is.
    """
    return remembered(key, lambda: _Compiled(function))


class Trusted:
    """A compiled function during one unroll, in which nothing changes but its arguments.

    Before each call the compiler looks at all that the function has read when it was compiled, every attribute of every
    module; that takes as long as a small step. Here it looks once for each form of the arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._forms: set[Any] = set()

    def __call__(self, *args: Any) -> Any:
        form = (torch.is_grad_enabled(), *_forms(args, {}))
        if form in self._forms:
            with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                return self._function(*args)
        self._forms.add(form)
        with warnings.catch_warnings():
            # The compiler looks at .grad of every tensor that it meets, and loads modules that torch has deprecated.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            return self._function(*args)


def _forms(args: Iterable[Any], numbers: dict[int, int]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            # The number tells where the same tensor comes twice, which the compiler takes for granted then.
            yield arg.shape, arg.stride(), arg.dtype, arg.requires_grad, numbers.setdefault(id(arg), len(numbers))
        elif isinstance(arg, tuple | list):
            yield from _forms(arg, numbers)
        else:
            leaves = pytree.tree_leaves(arg)
            yield from leaves if len(leaves) == 1 and leaves[0] is arg else _forms(leaves, numbers)


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
    """Inductor, computing again in the backward pass what costs no matrix product: it reads less memory."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(aggressive_recomputation=True):
        return compile_fx(graph, inputs)


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
