"""Calling what the compiler has made, without the compiler in between.

Before each call of a compiled function torch looks at all that the function read when it was compiled, every attribute
of every module, and then finds its way to the graph; for a small step that takes a tenth of the step's time or more.
While nothing changes but the arguments, the graph can be called at once: `Trusted` sees a first call of each form
through, and notes which of the graph's inputs is which argument, and which result is which of its outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Graph = Callable[..., Any]
Build = Callable[[Sequence[Tensor], Sequence[Any]], Any]  # from leaves of the arguments, and outputs of the graph

_seen: list[tuple[Graph, tuple[Any, ...], Sequence[Any]]] | None = None  # calls of graphs, while someone wants to know


def observed(graph: Graph) -> Graph:
    """A compiled graph whose calls `Trusted` can see: for a backend of torch.compile to return."""

    def call(*inputs: Any) -> Any:
        outputs = graph(*inputs)
        if _seen is not None:
            _seen.append((graph, inputs, outputs))
        return outputs

    return call


class Trusted:
    """A compiled function as long as nothing changes but its arguments: one of pure torch code, without side effects.

    What it reads besides, such as the tensors of a task, is taken to stay what it was at the first call.

    Args:
        function: compiled, with a backend whose graphs are `observed`; any other is called as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._forms: dict[Any, _Wiring | None] = {}

    def __call__(self, *args: Any) -> Any:
        leaves: list[Tensor] = []
        form = (torch.is_grad_enabled(), *_form(args, leaves), *_repeated(leaves))
        if form in self._forms:
            wiring = self._forms[form]
            return self._function(*args) if wiring is None else wiring(leaves)
        global _seen
        outer, _seen = _seen, []
        try:
            with warnings.catch_warnings():
                # The compiler looks at .grad of every tensor it meets, and loads modules that torch has deprecated.
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
                result = self._function(*args)
            self._forms[form] = _wiring(_seen, leaves, result)
        finally:
            _seen = outer
        return result


class _Wiring:
    def __init__(self, graph: Graph, inputs: Sequence[Any], build: Build) -> None:
        self._graph, self._inputs, self._build = graph, inputs, build

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


def _form(args: Sequence[Any], leaves: list[Tensor]) -> list[Any]:
    """What the compiler tells arguments apart by; their tensors go to ``leaves``."""
    form: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            leaves.append(arg)
            form.append((arg.shape, arg.stride(), arg.dtype, arg.requires_grad))
        elif isinstance(arg, tuple | list):
            form.append(type(arg))
            form += _form(arg, leaves)
            form.append(len(arg))
        else:
            inner, spec = pytree.tree_flatten(arg)
            if len(inner) == 1 and inner[0] is arg:
                form.append(arg)
            else:
                form.append(spec)
                form += _form(inner, leaves)
    return form


def _repeated(leaves: Sequence[Tensor]) -> list[int]:
    """Where the same tensor comes twice, which the compiler takes for granted then."""
    ids = list(map(id, leaves))
    return [] if len(set(ids)) == len(ids) else [ids.index(each) for each in ids]
