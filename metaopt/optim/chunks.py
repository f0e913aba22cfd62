"""Tensors of any sizes as chunks of a bounded number of elements: large ones cut, small ones put together.

A *slot* is what belongs to one parameter: the parameter, its gradient, its state, whose tensors end in the parameter's
dimensions. A *piece* is a part of a slot, of views into it. A chunk is a list of pieces, read as vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

Slot = tuple[Tensor, ...]  # parameter, gradient, *state
Piece = tuple[Tensor, ...]


def pieces(slot: Slot, size: int) -> Iterator[Piece]:
    """Cut a slot into pieces of at most ``size`` elements, all of exactly that many but the last where memory allows.

    Example:
        >>> p, g, momenta = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(6, 3, 4)
        >>> [[tuple(part.shape) for part in piece] for piece in pieces((p, g, momenta), 8)]
        [[(8,), (8,), (6, 8)], [(4,), (4,), (6, 4)]]
        >>> [tuple(piece[0].shape) for piece in pieces((p.t(), g.t(), momenta.mT), 8)]  # no vector without a copy
        [(2, 3), (2, 3)]
    """
    shape = slot[0].shape
    if all(part.is_contiguous() for part in slot):
        flat = [part.view(*part.shape[: part.dim() - len(shape)], -1) for part in slot]
        for start in range(0, flat[0].shape[-1], size):
            yield tuple(part[..., start : start + size] for part in flat)
    elif math.prod(shape) <= size:
        yield slot
    elif (row := math.prod(shape[1:])) > size:
        for index in range(shape[0]):
            yield from pieces(tuple(part.select(-len(shape), index) for part in slot), size)
    else:
        rows = size // row
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            yield tuple(part.narrow(-len(shape), start, count) for part in slot)


def packed(slots: Iterable[Slot], size: int) -> Iterator[list[Slot]]:
    """Consecutive slots together as long as they have at most ``size`` elements in all; a larger one alone.

    Example:
        >>> slots = [(torch.zeros(count),) for count in (3, 4, 9, 0, 2)]
        >>> [[slot[0].numel() for slot in together] for together in packed(slots, 8)]
        [[3, 4], [9], [2]]
    """
    together: list[Slot] = []
    count = 0
    for slot in slots:
        more = slot[0].numel()
        if together and count + more > size:
            yield together
            together, count = [], 0
        if more:
            together.append(slot)
            count += more
    if together:
        yield together


def gather(chunk: Sequence[Piece], dtype: torch.dtype) -> list[Tensor]:
    """The parts of a chunk's pieces, end to end: shapes (n,) and, for state, (..., n)."""
    made = []
    for parts in zip(*chunk, strict=True):
        flat = [_flat(part, piece[0].dim()) for part, piece in zip(parts, chunk, strict=True)]
        made.append((flat[0] if len(flat) == 1 else torch.cat(flat, -1)).to(dtype))
    return made


def scatter(targets: Sequence[Tensor], dims: Sequence[int], values: Tensor, *, add: bool = False) -> None:
    """Write (or add) vectors that lie end to end into the tensors that they belong to.

    Args:
        targets: of one part, by piece.
        dims: of the parameter of each.
        values: (..., n).
        add: to what is there.
    """
    if len(targets) == 1:
        (target,) = targets
        values = values.reshape(target.shape)
        target.add_(values) if add else target.copy_(values)
        return
    counts = [math.prod(target.shape[target.dim() - count :]) for target, count in zip(targets, dims, strict=True)]
    shaped = [value.reshape(target.shape) for value, target in zip(values.split(counts, -1), targets, strict=True)]
    if add:
        torch._foreach_add_(list(targets), shaped)
    else:
        torch._foreach_copy_(list(targets), shaped)


def _flat(part: Tensor, dims: int) -> Tensor:
    return part if dims == 1 else part.reshape(*part.shape[: part.dim() - dims], -1)
