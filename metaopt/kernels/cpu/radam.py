"""RAdam on a CPU: coefficients per parameter in float64, then one pass over memory in the parameters' precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from metaopt.kernels.cpu.compiled import array_at, compiled


@compiled
def prepare(rows: Any, coefficients: Any, beta1: float, beta2: float) -> None:
    """Advance the step counters, and write each parameter's bias corrections and rectification.

    A row of coefficients: ``1 - beta1^t``; ``sqrt(1 - beta2^t)``, or 0 where the step is not rectified; ``r_t``.
    """
    for index in range(rows.shape[0]):
        counter = array_at(rows[index, 4], 0, 1, np.float32(0))
        counter[0] += np.float32(1)
        step = float(counter[0])
        correction1 = -math.expm1(step * math.log(beta1)) if beta1 > 0.0 else 1.0
        correction2 = -math.expm1(step * math.log(beta2)) if beta2 > 0.0 else 1.0
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * step * (1.0 - correction2) / correction2
        coefficients[index, 0] = correction1
        coefficients[index, 1] = 0.0
        if rho > 5.0:
            squared = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
            coefficients[index, 1] = math.sqrt(correction2)
            coefficients[index, 2] = math.sqrt(squared)


@compiled
def update(
    rows: Any,
    owners: Any,
    coefficients: Any,
    scalars: Any,
    scale: Any,
    maximize: bool,
    decoupled: bool,
    begin: int,
    end: int,
    block: int,
) -> None:
    """Update the blocks ``begin`` to ``end``.

    ``scalars`` (lr, beta1, beta2, eps, weight_decay, 1 - beta1, 1 - beta2, 1 - lr weight_decay) and ``coefficients``
    are in the parameters' precision, ``scale`` too: what gradients are divided by, or 0 for gradients as they are.
    """
    like = scale
    precision = scalars.dtype.type  # numba would compute float32 with literal numbers in float64
    zero, half, one = precision(0), precision(0.5), precision(1)
    lr, beta2, eps, weight_decay = scalars[0], scalars[2], scalars[3], scalars[4]
    weight, weight2, kept = scalars[5], scalars[6], scalars[7]
    for index in range(begin, end):
        owner = owners[index]
        start = (index - rows[owner, 6]) * block
        count = min(block, rows[owner, 5] - start)
        p = array_at(rows[owner, 0], start, count, like)
        g = array_at(rows[owner, 1], start, count, like)
        m = array_at(rows[owner, 2], start, count, like)
        v = array_at(rows[owner, 3], start, count, like)
        correction1, root_correction2, rectification = (
            coefficients[owner, 0],
            coefficients[owner, 1],
            coefficients[owner, 2],
        )
        if scale != zero:
            for i in range(count):
                g[i] = g[i] / scale
        for i in range(count):
            h = -g[i] if maximize else g[i]
            x = p[i]
            if decoupled:
                x = x * kept
            elif weight_decay != zero:
                h = h + weight_decay * x
            # As torch's lerp, which takes the end from which it has less far to go.
            a = m[i] + weight * (h - m[i]) if weight < half else h - (h - m[i]) * (one - weight)
            b = v[i] * beta2 + (weight2 * h) * h
            step = a / correction1 * lr
            if root_correction2 > zero:
                step = step * (root_correction2 / (np.sqrt(b) + eps)) * rectification
            p[i] = x - step
            m[i] = a
            v[i] = b
