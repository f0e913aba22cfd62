"""What the differentiable steps are made of: short loops, one after the other, over a tile that stays in the cache.

One loop that did it all would not be vectorized: LLVM checks of few arrays only that they do not overlap.

Coefficients are tiles too, so that one value for all elements and a value for each are read in the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metaopt.kernels.cpu.compiled import array_at, compiled, inlined

TILE = 512  # elements; a dozen tiles in double precision are 48 KiB
PER_ELEMENT = 4  # of a step's inputs, those before the coefficients


@inlined
def scratch(count: int, inputs: Any, one: Any) -> Any:
    """So many tiles in the precision of the tensors, not filled."""
    return np.empty((count, TILE), array_at(inputs[0], 0, 0, one).dtype)


@compiled
def fill(tiles: Any, inputs: Any, each: bool, start: int, count: int) -> None:
    """Fill a tile with each coefficient: with its one value, or with those of the elements.

    Args:
        tiles: at the coefficients' places among the inputs.
        inputs: addresses; a coefficient that is left out is at 0.
        each: whether coefficients have a value for each element.
        start, count: which elements.
    """
    for index in range(PER_ELEMENT, len(tiles)):
        address, tile = inputs[index], tiles[index]
        if address and each:
            values = array_at(address, start, count, tile[0])
            for k in range(count):
                tile[k] = values[k]
        elif address:
            value = array_at(address, 0, 1, tile[0])[0]
            for k in range(TILE):
                tile[k] = value


@inlined
def collect(index: int, x: Any, y: Any, to: Any, sums: Any, each: bool, start: int, count: int) -> None:
    """The part of a coefficient's gradient that is ``x y``: elements of it, or terms of its sum in double precision."""
    if each:
        gradient = array_at(to[index], start, count, x[0])
        for k in range(count):
            gradient[k] = x[k] * y[k]
    else:
        # As many sums as a tile has elements, which can be added at the same time.
        terms = sums[index]
        for k in range(count):
            terms[k] += np.float64(x[k] * y[k])


@compiled
def totals(sums: Any, to: Any) -> Any:
    """Those of the sums that are asked for."""
    found = np.zeros(len(sums))
    for index in range(PER_ELEMENT, len(sums)):
        if to[index]:
            found[index] = sums[index].sum()
    return found
