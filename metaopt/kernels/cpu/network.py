"""A network of two hidden layers of rectifiers on the features of many elements, which leaves no hidden layer behind.

The products of a learned optimizer are thin: for each element a few dozen numbers go in and two come out, and hidden
layers that are written to memory and read again take as long as the products. Here they are tiles in the nearest cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from metaopt.kernels.cpu.compiled import compiled
from metaopt.kernels.cpu.threads import parallel

TILE = 512  # elements: two layers of 32 units in single precision are 128 KiB
BLOCK = 4 * TILE  # the least that is worth a thread's while
OUTPUTS, INPUTS = 2, 8  # of a layer, in one loop over a tile: their weights stay in registers
FUSED = {"contract"}  # multiply and add at once, as products of matrices do

Layer = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,)


def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """The outputs, (2, n).

    Args:
        layers: three, the last of two outputs.
        x: features (k, n), contiguous.
    """
    out = x.new_empty(2, x.shape[1])
    arrays = [part.numpy() for weight, bias in layers for part in _padded(weight, bias)]
    parallel(partial(network, *arrays, x.numpy(), out.numpy()), -(-x.shape[1] // BLOCK), BLOCK)
    return out


def _padded(weight: Tensor, bias: Tensor) -> Layer:
    """With zeros for outputs and inputs up to multiples of ``OUTPUTS`` and ``INPUTS``."""
    more, wider = -weight.shape[0] % OUTPUTS, -weight.shape[1] % INPUTS
    if more or wider:
        weight, bias = pad(weight, (0, wider, 0, more)), pad(bias, (0, more))
    return weight.contiguous(), bias.contiguous()


@compiled
def network(
    w1: Any, b1: Any, w2: Any, b2: Any, w3: Any, b3: Any, x: Any, out: Any, begin: int, end: int, block: int
) -> None:
    """Write the outputs of the blocks ``begin`` to ``end``."""
    one = x.dtype.type(1)
    zero = one - one
    lowest = -one / zero
    features = np.zeros((w1.shape[1], TILE), x.dtype)
    first, second = np.zeros((w2.shape[1], TILE), x.dtype), np.zeros((w3.shape[1], TILE), x.dtype)
    last = np.empty((OUTPUTS, TILE), x.dtype)
    for start in range(begin * block, min(end * block, x.shape[1]), TILE):
        count = min(TILE, x.shape[1] - start)
        for row in range(len(x)):
            for k in range(count):
                features[row, k] = x[row, start + k]
        layer(w1, b1, features, first, zero, lowest)
        layer(w2, b2, first, second, zero, lowest)
        layer(w3, b3, second, last, lowest, lowest)
        for row in range(OUTPUTS):
            for k in range(count):
                out[row, start + k] = last[row, k]


@partial(compiled, fastmath=FUSED)
def layer(weight: Any, bias: Any, x: Any, y: Any, least: Any, lowest: Any) -> None:
    """Write ``weight @ x + bias``, or ``least`` where that is larger: of tiles, ``y`` with rows for all outputs."""
    for j in range(0, len(weight), OUTPUTS):
        p, q = y[j], y[j + 1]
        bias_p, bias_q = bias[j], bias[j + 1]
        for k in range(TILE):
            p[k] = bias_p
            q[k] = bias_q
        for c in range(0, weight.shape[1], INPUTS):
            floor = least if c + INPUTS == weight.shape[1] else lowest
            x0, x1, x2, x3, x4, x5, x6, x7 = x[c], x[c + 1], x[c + 2], x[c + 3], x[c + 4], x[c + 5], x[c + 6], x[c + 7]
            u, v = weight[j, c : c + INPUTS], weight[j + 1, c : c + INPUTS]
            u0, u1, u2, u3, u4, u5, u6, u7 = u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7]
            v0, v1, v2, v3, v4, v5, v6, v7 = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]
            for k in range(TILE):
                a = p[k] + u0 * x0[k] + u1 * x1[k] + u2 * x2[k] + u3 * x3[k]
                a = a + u4 * x4[k] + u5 * x5[k] + u6 * x6[k] + u7 * x7[k]
                p[k] = floor if a < floor else a  # NaN stays NaN
                b = q[k] + v0 * x0[k] + v1 * x1[k] + v2 * x2[k] + v3 * x3[k]
                b = b + v4 * x4[k] + v5 * x5[k] + v6 * x6[k] + v7 * x7[k]
                q[k] = floor if b < floor else b
