"""How the tensors of many parameters are laid out for one launch: a table of addresses.

A kernel walks over memory and knows nothing of shapes. A parameter, its gradient and its two states can be handed to
it if all four lie densely in memory in the same order of elements; where they do not (a gradient with other strides, a
parameter that is a slice), a copy stands in, and what the kernel writes into the copy is copied back.

>>> p = torch.zeros(3, 2)
>>> slot = Slot(p, torch.ones(2, 3).t(), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(()))
>>> dense, back = aligned(slot)
>>> dense.grad.is_contiguous(), len(back)
(True, 0)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Slot(NamedTuple):
    """One parameter with all that its update reads and writes."""

    param: Tensor
    grad: Tensor
    first: Tensor  # exp_avg, prev
    second: Tensor  # exp_avg_sq, step_size
    step: Tensor  # 0-d float32


CopyBack = tuple[Tensor, Tensor]  # where to, where from


def aligned(slot: Slot, writes_grad: bool = False) -> tuple[Slot, list[CopyBack]]:
    """The slot with its four tensors in the same dense layout, and the copies to make after the launch.

    Args:
        slot: any strides.
        writes_grad: whether the kernel writes the gradient too.
    """
    model = (
        slot.param if _is_dense(slot.param) else torch.empty(slot.param.shape, dtype=slot.param.dtype, device="meta")
    )
    tensors = slot[:4]
    placed = [tensor if tensor.stride() == model.stride() else _copied(tensor, model) for tensor in tensors]
    written = (True, writes_grad, True, True)
    back = [
        (tensor, copy)
        for tensor, copy, write in zip(tensors, placed, written, strict=True)
        if write and copy is not tensor
    ]
    return Slot(placed[0], placed[1], placed[2], placed[3], slot.step), back


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _copied(tensor: Tensor, model: Tensor) -> Tensor:
    return torch.empty_strided(model.shape, model.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements share one place in memory, as after ``expand``: there an update has no meaning."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


class Misfit(ValueError):
    """The tensors of a slot do not belong together, or one not to itself: a kernel would write where it must not."""

    def __init__(self, slot: Slot, reason: str | None = None) -> None:
        described = [f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in slot[:4]]
        super().__init__(reason or "parameter, gradient and states do not fit each other: " + ", ".join(described))
        self.slot = slot


Rows = np.ndarray[Any, np.dtype[np.int64]]
Kind = tuple[torch.device, torch.dtype, torch.dtype, torch.dtype]  # device; dtypes of parameter, gradient and states
ROW = 8  # numbers in a row of a table, 64 bytes: two sectors of a GPU's memory, one line of a CPU's cache


class Prepared(NamedTuple):
    """Slots laid out for their launches; nothing has been updated yet."""

    tables: dict[Kind, Rows]
    copies: list[CopyBack]  # to make after the launches
    alive: list[Slot]  # a table holds addresses alone: without these the memory there would be given to others


def tables(slots: list[Slot], writes_grad: bool = False) -> Prepared:
    """Tables of addresses, one for each kind of slot.

    A row, int64: the addresses of parameter, gradient, first state, second state and step counter; the number of
    elements, a complex number counting as two; a place for the first block (see ``owners``); 0.

    Args:
        slots: any.
        writes_grad: whether the kernels write the gradients too.

    Raises:
        Misfit: a slot's tensors differ in size, or the parameter's elements share memory.
    """
    rows: dict[Kind, list[tuple[int, ...]]] = {}
    copies: list[CopyBack] = []
    alive = list(slots)
    for slot in slots:  # one visit to each tensor: with thousands of small ones the time goes into reaching them
        p, g, first, second, step = slot
        count = p.numel()
        if not (g.numel() == first.numel() == second.numel() == count and second.dtype == first.dtype):
            raise Misfit(slot)
        if not (p.is_contiguous() and g.is_contiguous() and first.is_contiguous() and second.is_contiguous()):
            if overlaps_itself(p):
                raise Misfit(slot, "several elements share one place in memory, and cannot be updated apart")
            dense, back = aligned(slot, writes_grad)
            p, g, first, second, step = dense
            copies += back
            alive.append(dense)
        rows.setdefault((p.device, p.dtype, g.dtype, first.dtype), []).append(
            (p.data_ptr(), g.data_ptr(), first.data_ptr(), second.data_ptr(), step.data_ptr(), count, 0, 0)
        )
    made = {kind: np.array(flat, dtype=np.int64) for kind, flat in rows.items()}
    for (_, dtype, _, _), table in made.items():
        table[:, 5] *= 2 if dtype.is_complex else 1
    return Prepared(made, copies, alive)


def owners(rows: Rows, block: int) -> Rows:
    """Which row each block of elements belongs to; writes each row's first block into the row.

    Args:
        rows: a table.
        block: elements that one program updates.
    """
    blocks = -(-rows[:, 5] // block)
    rows[:, 6] = np.cumsum(blocks) - blocks
    return np.repeat(np.arange(len(rows), dtype=np.int64), blocks)
