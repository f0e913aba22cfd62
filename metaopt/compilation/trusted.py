"""Calling what the compiler has made, without the compiler in between.

Before each call of a compiled function torch looks at all that the function read when it was compiled, every attribute
of every module, and then finds its way to the graph; for a small step that takes a tenth of the step's time or more.
While nothing changes but the arguments, the graph can be called at once: `Trusted` sees the first two calls of each
form through, and notes which of the graph's inputs is which argument, and which result is which of its outputs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Graph = Callable[..., Any]
Build = Callable[[Sequence[Tensor], Sequence[Any]], Any]  # from leaves of the arguments, and outputs of the graph

Call = tuple[Graph, tuple[Any, ...], Sequence[Any]]  # of a graph: its inputs, and its outputs


class _Watch(threading.local):
    calls: list[Call] | None = None  # while someone wants to know


_watch = _Watch()
_CONSTANTS = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


def observed(graph: Graph) -> Graph:
    """A compiled graph whose calls `Trusted` can see: for a backend of torch.compile to return."""

    def call(*inputs: Any) -> Any:
        outputs = graph(*inputs)
        if _watch.calls is not None:
            _watch.calls.append((graph, inputs, outputs))
        return outputs

    return call


class Trusted:
    """A compiled function as long as nothing changes but its arguments: one of pure torch code, without side effects.

    What it reads besides, such as the tensors of a task, is taken to stay what it was. If it was another at the first
    call than at the second (a number drawn in Python), no call is made directly.

    Args:
        function: compiled, with a backend whose graphs are `observed`; any other is called as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._seen: dict[Any, _Wiring | None] = {}  # once
        self._forms: dict[Any, _Wiring | None] = {}  # twice: None for one that is not to be called directly

    def __call__(self, *args: Any) -> Any:
        leaves: list[Tensor] = []
        told = _form(args, leaves)
        if told is None:
            return self._function(*args)
        form = (torch.is_grad_enabled(), *told, *_repeated(leaves))
        if form in self._forms:
            wiring = self._forms[form]
            return self._function(*args) if wiring is None else wiring(leaves)
        calls: list[Call] = []
        outer, _watch.calls = _watch.calls, calls
        try:
            with warnings.catch_warnings():
                # The compiler looks at .grad of every tensor it meets, and loads modules that torch has deprecated.
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
                result = self._function(*args)
        finally:
            _watch.calls = outer
        wiring = _wiring(calls, leaves, result)
        if form in self._seen:
            before = self._seen.pop(form)
            self._forms[form] = wiring if wiring is not None and wiring.agrees(before) else None
        else:
            self._seen[form] = wiring
        return result


class _Wiring:
    def __init__(self, graph: Graph, inputs: Sequence[Any], build: Build) -> None:
        self._graph, self._inputs, self._build = graph, inputs, build

    def agrees(self, other: _Wiring | None) -> bool:
        """Whether another one is of the same graph, with the same tensors where it takes no argument."""
        if other is None or self._graph is not other._graph:
            return False
        return list(map(_place, self._inputs)) == list(map(_place, other._inputs))

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        outputs = self._graph(*[leaves[x] if type(x) is int else x for x in self._inputs])
        return self._build(leaves, outputs)


def _wiring(calls: Sequence[Any], leaves: Sequence[Tensor], result: Any) -> _Wiring | None:
    """How the one graph that was called is wired; None if that cannot be told."""
    if len(calls) != 1:
        return None
    graph, inputs, outputs = calls[0]
    if not all(isinstance(x, Tensor) for x in inputs):
        return None
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    build = _builder(result, places, {id(output): place for place, output in enumerate(outputs)})
    return None if build is None else _Wiring(graph, [places.get(id(x), x) for x in inputs], build)


def _builder(result: Any, arguments: dict[int, int], outputs: dict[int, int]) -> Build | None:
    if isinstance(result, Tensor):
        if id(result) in outputs:
            place = outputs[id(result)]
            return lambda leaves, made: made[place]
        if id(result) in arguments:
            place = arguments[id(result)]
            return lambda leaves, made: leaves[place]
        return None
    if type(result) is tuple:
        parts = [_builder(part, arguments, outputs) for part in result]
        if None in parts:
            return None
        return lambda leaves, made: tuple([part(leaves, made) for part in parts])  # type: ignore[misc]
    return (lambda leaves, made: None) if result is None else None


def _place(x: Any) -> int:
    """An argument's place, or what is no place."""
    return x if type(x) is int else -1 - id(x)


def _form(args: Sequence[Any], leaves: list[Tensor]) -> list[Any] | None:
    """What the compiler tells arguments apart by, and None if that cannot be told; their tensors go to ``leaves``."""
    form: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            leaves.append(arg)
            form.append((arg.shape, arg.stride(), arg.dtype, arg.requires_grad))
        elif isinstance(arg, tuple | list):
            inside = _form(arg, leaves)
            if inside is None:
                return None
            form += [type(arg), len(arg), *inside]
        elif isinstance(arg, _CONSTANTS):
            form.append((type(arg), arg))
        else:
            inner, spec = pytree.tree_flatten(arg)
            inside = None if len(inner) == 1 and inner[0] is arg else _form(inner, leaves)
            if inside is None:
                return None
            form += [spec, *inside]
    return form


def _repeated(leaves: Sequence[Tensor]) -> list[int]:
    """Where the same tensor comes twice, which the compiler takes for granted then."""
    ids = list(map(id, leaves))
    return [] if len(set(ids)) == len(ids) else [ids.index(each) for each in ids]
