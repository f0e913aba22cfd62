"""The differentiable step of Rprop: its formulas are those of ``metaopt.functional.rprop_step``.

All but the sums is exact or rounded as in torch's operations, so the results are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metaopt.kernels.cpu.compiled import array_at, compiled, inlined
from metaopt.kernels.cpu.tiles import TILE, collect, fill, scratch, totals

# Places among the inputs.
PARAM, GRAD, PREV, STEP_SIZE, ETA_MINUS, ETA_PLUS, SMALLEST, LARGEST = range(8)
END = 8  # of the coefficients


@compiled
def forward(i: Any, new: Any, each: bool, size: int, one: Any, begin: int, end: int, block: int) -> None:
    """Write the new parameter, last gradient and step size of the blocks ``begin`` to ``end``."""
    zero = one - one
    c = scratch(END, i, one)
    minus, plus, smallest, largest = c[ETA_MINUS], c[ETA_PLUS], c[SMALLEST], c[LARGEST]
    if not each:
        fill(c, i, each, 0, TILE)
    stop = min(end * block, size)
    for start in range(begin * block, stop, TILE):
        count = min(TILE, stop - start)
        if each:
            fill(c, i, each, start, count)
        p = array_at(i[PARAM], start, count, one)
        g = array_at(i[GRAD], start, count, one)
        prev = array_at(i[PREV], start, count, one)
        before = array_at(i[STEP_SIZE], start, count, one)
        new_p = array_at(new[0], start, count, one)
        new_g = array_at(new[1], start, count, one)
        after = array_at(new[2], start, count, one)
        for k in range(count):
            product = g[k] * prev[k]
            x = before[k] * (plus[k] if product > zero else (minus[k] if product < zero else one))
            # Two selections, so that NaN stays NaN, as torch.clamp keeps it.
            x = smallest[k] if x < smallest[k] else x
            after[k] = largest[k] if x > largest[k] else x
        for k in range(count):
            new_g[k] = zero if g[k] * prev[k] < zero else g[k]
        for k in range(count):
            new_p[k] = p[k] - sign(new_g[k], one) * after[k]


@compiled
def backward(
    i: Any, cotangents: Any, to: Any, each: bool, size: int, one: Any, begin: int, end: int, block: int
) -> Any:
    """Write the gradients of the blocks, and return their part of those of coefficients that stand for all elements.

    The parameter's gradient is its cotangent.
    """
    zero = one - one
    c = scratch(END, i, one)
    minus, plus, smallest, largest = c[ETA_MINUS], c[ETA_PLUS], c[SMALLEST], c[LARGEST]
    if not each:
        fill(c, i, each, 0, TILE)
    sums = np.zeros((END, TILE))
    factor, scaled, through, inside, moved, kept = scratch(6, i, one)
    stop = min(end * block, size)
    for start in range(begin * block, stop, TILE):
        count = min(TILE, stop - start)
        if each:
            fill(c, i, each, start, count)
        g = array_at(i[GRAD], start, count, one)
        prev = array_at(i[PREV], start, count, one)
        before = array_at(i[STEP_SIZE], start, count, one)
        to_p = array_at(cotangents[0], start, count, one)
        to_size = array_at(cotangents[2], start, count, one)
        for k in range(count):
            product = g[k] * prev[k]
            factor[k] = plus[k] if product > zero else (minus[k] if product < zero else one)
            scaled[k] = before[k] * factor[k]
        for k in range(count):
            through[k] = to_size[k] - to_p[k] * (zero if g[k] * prev[k] < zero else sign(g[k], one))
        for k in range(count):
            inside[k] = zero if scaled[k] < smallest[k] or scaled[k] > largest[k] else through[k]
        if to[GRAD]:
            to_g = array_at(to[GRAD], start, count, one)
            to_prev = array_at(cotangents[1], start, count, one)
            for k in range(count):
                to_g[k] = zero if g[k] * prev[k] < zero else to_prev[k]
        if to[PREV]:
            array_at(to[PREV], start, count, one)[:] = zero
        if to[STEP_SIZE]:
            to_before = array_at(to[STEP_SIZE], start, count, one)
            for k in range(count):
                to_before[k] = inside[k] * factor[k]
        if to[ETA_MINUS] or to[ETA_PLUS]:
            for k in range(count):
                moved[k] = inside[k] * before[k]
        if to[ETA_MINUS]:
            for k in range(count):
                kept[k] = one if g[k] * prev[k] < zero else zero
            collect(ETA_MINUS, moved, kept, to, sums, each, start, count)
        if to[ETA_PLUS]:
            for k in range(count):
                kept[k] = one if g[k] * prev[k] > zero else zero
            collect(ETA_PLUS, moved, kept, to, sums, each, start, count)
        if to[SMALLEST]:
            for k in range(count):
                kept[k] = one if scaled[k] < smallest[k] else zero
            collect(SMALLEST, through, kept, to, sums, each, start, count)
        if to[LARGEST]:
            for k in range(count):
                kept[k] = one if scaled[k] > largest[k] else zero
            collect(LARGEST, through, kept, to, sums, each, start, count)
    return totals(sums, to)


@inlined
def sign(x: Any, one: Any) -> Any:
    """1, -1 or 0, which is also that of NaN, as in torch."""
    return one if x > 0 else (-one if x < 0 else one - one)
