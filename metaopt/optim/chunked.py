"""A learned optimizer's step of any number of tensors in bounded memory: chunk by chunk, in place.

What a design must offer for it:

- `Coordinatewise`: it treats each element by itself. Chunks are stepped one after the other.
- `Normalized`: elements share the mean squares of their features over their tensor. Tensors that fit into one chunk are
  stepped together; a larger one is read twice, once for the mean squares and once to move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from metaopt.functional.values import Once
from metaopt.kernels import network as kernel
from metaopt.optim.chunks import Piece, Slot, gather, packed, pieces, scatter

Weights = Mapping[str, Tensor]
State = tuple[Tensor, ...]

# Elements of a chunk: on a CPU its hidden layers stay in the cache; elsewhere the device has to be kept busy.
SIZES = {"cpu": 1 << 13}
SIZE = 1 << 17
FUSED = 4  # times as many, where a kernel makes no hidden layers


@runtime_checkable
class Coordinatewise(Protocol):
    """A design whose ``change`` may be called on any part of a tensor."""

    coordinatewise: bool

    def change(
        self, param: Tensor, grad: Tensor, step: Tensor, state: State, weights: Weights, once: Once
    ) -> tuple[Tensor, ...]: ...


@runtime_checkable
class Normalized(Protocol):
    """A design that says its ``change`` in three parts, each of which takes any part of a tensor.

    ``accumulate`` makes the new state, or the first parts of it where the others stay; ``features`` reads it; and
    ``react`` needs the mean squares of the features. A design whose state has other shapes than its parameter has also
    ``share``, as in `Shared`.
    """

    def accumulate(self, grad: Tensor, state: State, weights: Weights, once: Once) -> State: ...

    def features(self, param: Tensor, grad: Tensor, state: State) -> Tensor: ...

    def react(self, x: Tensor, squares: Tensor | None, step: Tensor, weights: Weights, once: Once) -> Tensor: ...


@runtime_checkable
class Shared(Protocol):
    """``share`` updates what needs all of a tensor: the new state, and views of it in the parameter's shape to read."""

    def share(self, grad: Tensor, state: State, weights: Weights, once: Once) -> tuple[State, State]: ...


@dataclass
class Terms:
    """What the tensors of one step have in common.

    Attributes:
        dtype: that is computed in.
        step: the steps taken before this one, 0-d, on the tensors' device.
        weights: of that dtype, on that device.
        lr: multiplies the change.
        maximize: whether to turn the gradient round.
        once: for what is the same in all chunks.
    """

    dtype: torch.dtype
    step: Tensor
    weights: Weights
    lr: float | Tensor
    maximize: bool
    once: Once


def can_chunk(optimizer: Any) -> bool:
    """Whether a design can be stepped in chunks."""
    return isinstance(optimizer, Normalized) or (isinstance(optimizer, Coordinatewise) and optimizer.coordinatewise)


class Chunked:
    """Steps slots: parameter, gradient, and state without the counter.

    Args:
        optimizer: a design that ``can_chunk``.
        compile: step full chunks by functions that torch.compile has made, except where a kernel of ours runs the
            design's network. They see one size alone, so that nothing is compiled twice.
    """

    def __init__(self, optimizer: Any, compile: bool) -> None:
        self.optimizer = optimizer
        self._compile = compile
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._use = self._compiled  # of them, for the tensors at hand

    def __call__(self, slots: Sequence[Slot], terms: Terms) -> None:
        size = SIZES.get(slots[0][0].device.type, SIZE)
        hidden = terms.weights.get("weight1") if isinstance(self.optimizer, Normalized) else None
        if hidden is not None and kernel.serves(hidden):
            size, self._use = FUSED * size, {}
        elif self._compile:
            self._compiled = self._compiled or {f: torch.compile(f, dynamic=False) for f in (_change, _observe, _react)}
            self._use = self._compiled
        if isinstance(self.optimizer, Shared):
            # Vectors and matrices differ in what they share. One after the other: what is shared is made when needed.
            for matrices in (False, True):
                alike = (slot for slot in slots if slot[0].numel() and (slot[0].dim() > 1) is matrices)
                self._run((_share(self.optimizer, slot, terms) for slot in alike), terms, size)
        else:
            self._run(slots, terms, size)

    def _run(self, slots: Iterable[Slot], terms: Terms, size: int) -> None:
        for together in packed(slots, size):
            cut = self._cut(together[0], size)
            if not isinstance(self.optimizer, Normalized):
                for chunk in [[piece] for piece in cut] or [together]:
                    self._step(chunk, terms, size)
            elif cut:
                self._step_large(cut, terms, size)
            else:
                self._step_whole(together, terms)

    def _cut(self, slot: Slot, size: int) -> list[Piece]:
        """The pieces of a slot that is larger than a chunk: equal ones, or for compiled functions full ones."""
        count = slot[0].numel()
        if count <= size:
            return []
        return list(pieces(slot, size if self._use else math.ceil(count / math.ceil(count / size))))

    def _step(self, chunk: Sequence[Piece], terms: Terms, size: int) -> None:
        """Coordinatewise. What fills no chunk is padded for the compiled function: elements do not mix."""
        parts = _read(chunk, terms)
        count = parts[0].numel()
        if self._use:
            parts = [pad(part, (0, size - count)) for part in parts]
        change, *state = self._call(_change, size, parts, terms)
        _move(chunk, change[:count], terms)
        _store(chunk, [part[..., :count] for part in state])

    def _step_whole(self, slots: Sequence[Slot], terms: Terms) -> None:
        """Normalized: tensors that fit into one chunk. Mean squares differ by tensor, and so by element here."""
        param, grad, *old = _read(slots, terms)
        state = self.optimizer.accumulate(grad, tuple(old), terms.weights, terms.once)
        x = self.optimizer.features(param, grad, (*state, *old[len(state) :]))
        squares = x.square()
        if len(slots) > 1:
            counts = torch.tensor([slot[0].numel() for slot in slots], device=x.device)
            lengths = counts.expand(len(x), -1).contiguous()
            squares = torch.segment_reduce(squares, "mean", lengths=lengths, axis=1)
            squares = squares.repeat_interleave(counts, 1, output_size=x.shape[1])
        else:
            squares = squares.mean(1)
        _store(slots, state)
        _move(slots, self.optimizer.react(x, squares, terms.step, terms.weights, terms.once), terms)

    def _step_large(self, cut: Sequence[Piece], terms: Terms, size: int) -> None:
        """Normalized: the pieces of one tensor."""
        total: Any = 0.0
        for piece in cut:
            squares, *state = self._call(_observe, size, _read([piece], terms), terms)
            _store([piece], state)
            total = total + squares
        squares = total / sum(piece[0].numel() for piece in cut)
        for piece in cut:
            _move([piece], self._call(_react, size, _read([piece], terms), terms, squares), terms)

    def _call(self, function: Callable[..., Any], size: int, parts: Sequence[Tensor], terms: Terms, *more: Any) -> Any:
        """The function of a chunk, compiled where there is such a one and the chunk is full."""
        compiled = self._use.get(function)
        if compiled is None or parts[0].numel() != size:
            return function(self.optimizer, parts, terms.step, terms.weights, terms.once, *more)
        return compiled(self.optimizer, [part.contiguous() for part in parts], terms.step, terms.weights, None, *more)


# The functions of a chunk. Compiled ones get no ``once``, whose memory would be a new one at every step.

Parts = Sequence[Tensor]  # parameter, gradient, *state: (n,), (n,), (..., n)


def _change(optimizer: Coordinatewise, parts: Parts, step: Tensor, weights: Weights, once: Once | None) -> Parts:
    param, grad, *state = parts
    return optimizer.change(param, grad, step, tuple(state), weights, once or Once())


def _observe(optimizer: Normalized, parts: Parts, step: Tensor, weights: Weights, once: Once | None) -> Parts:
    """The sums of the features' squares, and the new state."""
    param, grad, *old = parts
    state = optimizer.accumulate(grad, tuple(old), weights, once or Once())
    x = optimizer.features(param, grad, (*state, *old[len(state) :]))
    return torch.linalg.vector_norm(x, dim=1).square(), *state  # in one pass


def _react(
    optimizer: Normalized, parts: Parts, step: Tensor, weights: Weights, once: Once | None, squares: Tensor
) -> Tensor:
    param, grad, *state = parts
    x = optimizer.features(param, grad, tuple(state))
    return optimizer.react(x, squares, step, weights, once or Once())


def _share(optimizer: Shared, slot: Slot, terms: Terms) -> Slot:
    param, grad, *old = slot
    state, views = optimizer.share(grad, tuple(old), terms.weights, terms.once)
    for part, new in zip(old, state, strict=True):
        if new is not part:
            part.copy_(new)
    return (param, grad, *views)


def _read(chunk: Sequence[Piece], terms: Terms) -> list[Tensor]:
    param, grad, *state = gather(chunk, terms.dtype)
    return [param, -grad if terms.maximize else grad, *state]


def _move(chunk: Sequence[Piece], change: Tensor, terms: Terms) -> None:
    scatter([piece[0] for piece in chunk], _dims(chunk), change * terms.lr, add=True)


def _store(chunk: Sequence[Piece], state: Sequence[Tensor]) -> None:
    for index, part in enumerate(state, start=2):
        scatter([piece[index] for piece in chunk], _dims(chunk), part)


def _dims(chunk: Sequence[Piece]) -> list[int]:
    return [piece[0].dim() for piece in chunk]
