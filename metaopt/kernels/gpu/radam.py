"""RAdam in two launches: coefficients per parameter in float64, then one pass over memory.

28 bytes of traffic for a float32 element: parameter, gradient and two moments are read, all but the gradient written.
The operations on elements are those of torch's single-tensor path, in its order.
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
    one_minus_power,
    root,
    value,
)


@triton.jit(do_not_specialize=["count"])
def prepare(
    rows,
    coefficients,
    count,
    beta1: tl.float64,
    beta2: tl.float64,
    beta1_pointer,
    beta2_pointer,
    found_inf,
    BLOCK: tl.constexpr,
):
    """Advance the step counters, and write each parameter's bias corrections and rectification.

    A row of coefficients: ``1 - beta1^t``; ``sqrt(1 - beta2^t)``, or 0 where the step is not rectified; ``r_t``; none.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    beta1 = value(beta1, beta1_pointer)
    beta2 = value(beta2, beta2_pointer)

    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < count
    counter = counters(rows, index, live)
    counted = tl.load(counter, mask=live, other=0.0) + 1.0
    tl.store(counter, counted, mask=live)
    step = counted.to(tl.float64)

    correction2 = one_minus_power(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * (1.0 - correction2) / correction2
    rectified = rho > 5.0
    rho = tl.where(rectified, rho, 6.0)
    rho_inf = tl.where(rectified, rho_inf, 19.0)
    rectification = tl.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))

    row = coefficients + index * 4
    tl.store(row, one_minus_power(beta1, step), mask=live)
    tl.store(row + 1, tl.where(rectified, tl.sqrt(correction2), 0.0), mask=live)
    tl.store(row + 2, rectification, mask=live)


@triton.jit
def update(
    rows,
    owners,
    coefficients,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    lr_pointer,
    beta1_pointer,
    beta2_pointer,
    eps_pointer,
    weight_decay_pointer,
    found_inf,
    grad_scale,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    COMPUTE_TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block of one parameter."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    owner = tl.load(owners + tl.program_id(0))
    row = rows + owner * ROW
    start = (tl.program_id(0) - tl.load(row + FIRST_BLOCK)) * BLOCK
    offset = tl.arange(0, BLOCK)
    p_pointer = memory(row, PARAM, PARAM_TYPE, start, VECTOR) + offset
    g_pointer = memory(row, GRAD, GRAD_TYPE, start, VECTOR) + offset
    m_pointer = memory(row, FIRST, STATE_TYPE, start, VECTOR) + offset
    v_pointer = memory(row, SECOND, STATE_TYPE, start, VECTOR) + offset

    correction1 = tl.load(coefficients + owner * 4).to(COMPUTE_TYPE)
    root_correction2 = tl.load(coefficients + owner * 4 + 1).to(COMPUTE_TYPE)
    rectification = tl.load(coefficients + owner * 4 + 2).to(COMPUTE_TYPE)
    lr = value(lr, lr_pointer)
    beta1 = value(beta1, beta1_pointer)
    beta2 = value(beta2, beta2_pointer)
    eps = value(eps, eps_pointer).to(COMPUTE_TYPE)
    weight_decay = value(weight_decay, weight_decay_pointer)

    # An unmasked body for whole blocks: a mask of unknown length would make every load a scalar one.
    count = tl.load(row + COUNT)
    if start + BLOCK <= count:
        p = tl.load(p_pointer).to(COMPUTE_TYPE)
        g = tl.load(g_pointer).to(COMPUTE_TYPE)
        m = tl.load(m_pointer).to(COMPUTE_TYPE)
        v = tl.load(v_pointer).to(COMPUTE_TYPE)
        if grad_scale is not None:
            g = divide(g, value(1.0, grad_scale).to(COMPUTE_TYPE))
            tl.store(g_pointer, g.to(GRAD_TYPE))
        p, m, v = elements(
            p, g, m, v, lr, beta1, beta2, eps, weight_decay, correction1, root_correction2, rectification,
            COMPUTE_TYPE, MAXIMIZE, DECOUPLED,
        )  # fmt: skip
        tl.store(p_pointer, p.to(PARAM_TYPE))
        tl.store(m_pointer, m.to(STATE_TYPE))
        tl.store(v_pointer, v.to(STATE_TYPE))
    else:
        live = start + offset < count
        p = tl.load(p_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        g = tl.load(g_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        m = tl.load(m_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        v = tl.load(v_pointer, mask=live, other=0.0).to(COMPUTE_TYPE)
        if grad_scale is not None:
            g = divide(g, value(1.0, grad_scale).to(COMPUTE_TYPE))
            tl.store(g_pointer, g.to(GRAD_TYPE), mask=live)
        p, m, v = elements(
            p, g, m, v, lr, beta1, beta2, eps, weight_decay, correction1, root_correction2, rectification,
            COMPUTE_TYPE, MAXIMIZE, DECOUPLED,
        )  # fmt: skip
        tl.store(p_pointer, p.to(PARAM_TYPE), mask=live)
        tl.store(m_pointer, m.to(STATE_TYPE), mask=live)
        tl.store(v_pointer, v.to(STATE_TYPE), mask=live)


@triton.jit
def elements(
    p,
    g,
    m,
    v,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correction1,
    root_correction2,
    rectification,
    COMPUTE_TYPE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
):
    """The update of a block in registers: parameter and moments."""
    if MAXIMIZE:
        g = -g
    if DECOUPLED:
        p = p * (1.0 - lr * weight_decay).to(COMPUTE_TYPE)
    else:
        # Not added where it is 0: that would turn an infinite parameter into NaN.
        g = tl.where(weight_decay != 0.0, g + weight_decay.to(COMPUTE_TYPE) * p, g)
    weight = (1.0 - beta1).to(COMPUTE_TYPE)
    # As torch's lerp, which takes the end from which it has less far to go.
    m = tl.where(weight < 0.5, m + weight * (g - m), g - (g - m) * (1.0 - weight))
    v = v * beta2.to(COMPUTE_TYPE) + ((1.0 - beta2).to(COMPUTE_TYPE) * g) * g
    step = divide(m, correction1) * lr.to(COMPUTE_TYPE)
    if root_correction2 > 0.0:
        step = step * divide(root_correction2, root(v) + eps) * rectification
    return p - step, m, v
