"""Rprop on a CPU: the step counters, then one pass over memory. The same as torch's to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from metaopt.kernels.cpu.compiled import array_at, compiled


@compiled
def prepare(rows: Any) -> None:
    """Advance the step counters."""
    for index in range(rows.shape[0]):
        array_at(rows[index, 4], 0, 1, np.float32(0))[0] += np.float32(1)


@compiled
def update(rows: Any, owners: Any, scalars: Any, scale: Any, maximize: bool, begin: int, end: int, block: int) -> None:
    """Update the blocks ``begin`` to ``end``.

    ``scalars`` (eta_minus, eta_plus, smallest, largest) are in the parameters' precision, ``scale`` too: what gradients
    are divided by, or 0 for gradients as they are.
    """
    like = scale
    precision = scalars.dtype.type  # numba would compute float32 with literal numbers in float64
    zero, one = precision(0), precision(1)
    eta_minus, eta_plus, smallest, largest = scalars[0], scalars[1], scalars[2], scalars[3]
    for index in range(begin, end):
        owner = owners[index]
        start = (index - rows[owner, 6]) * block
        count = min(block, rows[owner, 5] - start)
        p = array_at(rows[owner, 0], start, count, like)
        g = array_at(rows[owner, 1], start, count, like)
        prev = array_at(rows[owner, 2], start, count, like)
        size = array_at(rows[owner, 3], start, count, like)
        if scale != zero:
            for i in range(count):
                g[i] = g[i] / scale
        for i in range(count):
            h = -g[i] if maximize else g[i]
            agreement = h * prev[i]
            s = size[i] * (eta_plus if agreement > zero else (eta_minus if agreement < zero else one))
            s = smallest if s < smallest else s
            s = largest if s > largest else s
            h = zero if agreement < zero else h
            p[i] = p[i] - s if h > zero else (p[i] + s if h < zero else p[i])
            prev[i] = h
            size[i] = s
