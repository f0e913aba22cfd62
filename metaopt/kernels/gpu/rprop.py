"""Rprop in two launches: the step counters, then one pass over memory.

28 bytes of traffic for a float32 element: parameter, gradient, last gradient and step size are read, all but the
gradient written. Every operation is exact or rounded as in torch's, so the result is the same to the last bit.
"""

import triton
import triton.language as tl

from metaopt.kernels.gpu.scalars import (
    COUNT,
    FIRST,
    FIRST_BLOCK,
    GRAD,
    PARAM,
    ROW,
    SECOND,
    counters,
    divide,
    memory,
    value,
)


@triton.jit(do_not_specialize=["count"])
def prepare(rows, count, found_inf, BLOCK: tl.constexpr):
    """Advance the step counters."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < count
    counter = counters(rows, index, live)
    tl.store(counter, tl.load(counter, mask=live, other=0.0) + 1.0, mask=live)


@triton.jit
def update(
    rows,
    owners,
    eta_minus: tl.float64,
    eta_plus: tl.float64,
    smallest: tl.float64,
    largest: tl.float64,
    eta_minus_pointer,
    eta_plus_pointer,
    smallest_pointer,
    largest_pointer,
    found_inf,
    grad_scale,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    COMPUTE_TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block of one parameter."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    row = rows + tl.load(owners + tl.program_id(0)) * ROW
    start = (tl.program_id(0) - tl.load(row + FIRST_BLOCK)) * BLOCK
    offset = tl.arange(0, BLOCK)
    p_pointer = memory(row, PARAM, PARAM_TYPE, start, VECTOR) + offset
    g_pointer = memory(row, GRAD, GRAD_TYPE, start, VECTOR) + offset
    prev_pointer = memory(row, FIRST, STATE_TYPE, start, VECTOR) + offset
    size_pointer = memory(row, SECOND, STATE_TYPE, start, VECTOR) + offset

    eta_minus = value(eta_minus, eta_minus_pointer).to(COMPUTE_TYPE)
    eta_plus = value(eta_plus, eta_plus_pointer).to(COMPUTE_TYPE)
    smallest = value(smallest, smallest_pointer).to(COMPUTE_TYPE)
    largest = value(largest, largest_pointer).to(COMPUTE_TYPE)

    # An unmasked body for whole blocks: a mask of unknown length would make every load a scalar one.
    count = tl.load(row + COUNT)
    if start + BLOCK <= count:
        p = tl.load(p_pointer).to(COMPUTE_TYPE)
        g = tl.load(g_pointer).to(COMPUTE_TYPE)
        prev = tl.load(prev_pointer).to(COMPUTE_TYPE)
        size = tl.load(size_pointer).to(COMPUTE_TYPE)
        if grad_scale is not None:
            g = divide(g, value(1.0, grad_scale).to(COMPUTE_TYPE))
            tl.store(g_pointer, g.to(GRAD_TYPE))
        p, prev, size = elements(p, g, prev, size, eta_minus, eta_plus, smallest, largest, MAXIMIZE)
        tl.store(p_pointer, p.to(PARAM_TYPE))
        tl.store(prev_pointer, prev.to(STATE_TYPE))
        tl.store(size_pointer, size.to(STATE_TYPE))
    else:
        live = start + offset < count
        p = tl.load(p_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        g = tl.load(g_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        prev = tl.load(prev_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        size = tl.load(size_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        if grad_scale is not None:
            g = divide(g, value(1.0, grad_scale).to(COMPUTE_TYPE))
            tl.store(g_pointer, g.to(GRAD_TYPE), mask=live)
        p, prev, size = elements(p, g, prev, size, eta_minus, eta_plus, smallest, largest, MAXIMIZE)
        tl.store(p_pointer, p.to(PARAM_TYPE), mask=live)
        tl.store(prev_pointer, prev.to(STATE_TYPE), mask=live)
        tl.store(size_pointer, size.to(STATE_TYPE), mask=live)


@triton.jit
def elements(p, g, prev, size, eta_minus, eta_plus, smallest, largest, MAXIMIZE: tl.constexpr):
    """The update of a block in registers: parameter, last gradient and step size."""
    if MAXIMIZE:
        g = -g
    agreement = g * prev
    size = size * tl.where(agreement > 0.0, eta_plus, tl.where(agreement < 0.0, eta_minus, 1.0))
    # Two selections, so that NaN stays NaN, as torch.clamp keeps it.
    size = tl.where(size < smallest, smallest, size)
    size = tl.where(size > largest, largest, size)
    g = tl.where(agreement < 0.0, 0.0, g)
    p = tl.where(g > 0.0, p - size, tl.where(g < 0.0, p + size, p))
    return p, g, size
