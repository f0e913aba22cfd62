"""The differentiable step of Adam and RAdam: its formulas are those of ``metaopt.functional.moments_step``.

Traffic for a float32 element is 28 bytes forward, and 36 backward, 44 with weight decay: the moments after the step are
computed again, which is cheaper than reading them beside those before it.
"""

import triton
import triton.language as tl

from metaopt.kernels.gpu.scalars import chosen, coefficient, collect, divide, read, root, write


@triton.jit(do_not_specialize=["count"])
def forward(i, new, count, MAXIMIZE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the new parameter and moments of one block."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    # An unmasked body for whole blocks: a mask of unknown length would make every load a scalar one.
    if start + BLOCK <= count:
        step(i, new, offset, None, MAXIMIZE, EACH)
    else:
        step(i, new, offset, offset < count, MAXIMIZE, EACH)


@triton.jit(do_not_specialize=["count"])
def backward(i, cotangents, to, count, MAXIMIZE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradients of one block, and its part of those of coefficients that stand for all elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        pull_back(i, cotangents, to, offset, None, MAXIMIZE, EACH)
    else:
        pull_back(i, cotangents, to, offset, offset < count, MAXIMIZE, EACH)


@triton.jit
def step(i, new, offset, live, MAXIMIZE: tl.constexpr, EACH: tl.constexpr):
    """Elements of the new parameter and moments."""
    p = read(i.param, offset, live)
    _, new_m, new_v = moments(i, p, offset, live, MAXIMIZE, EACH)
    # torch's order here too: a small step size first, and then a small denominator.
    plain = coefficient(i.step_size, p, offset, live, EACH) * new_m
    change = divide(plain, denominator(i, root(new_v), offset, live, EACH))
    if i.rectified is not None:
        change = tl.where(chosen(i.rectified, offset, live, EACH), change, plain)
    if i.shrink is not None:
        p = coefficient(i.shrink, p, offset, live, EACH) * p
    write(new[0], p - change, offset, live)
    write(new[1], new_m, offset, live)
    write(new[2], new_v, offset, live)


@triton.jit
def pull_back(i, cotangents, to, offset, live, MAXIMIZE: tl.constexpr, EACH: tl.constexpr):
    """Elements of the gradients."""
    p = read(i.param, offset, live)
    m = read(i.exp_avg, offset, live)
    v = read(i.exp_avg_sq, offset, live)
    to_p = read(cotangents[0], offset, live)
    to_m = read(cotangents[1], offset, live)
    to_v = read(cotangents[2], offset, live)
    beta1 = coefficient(i.beta1, p, offset, live, EACH)
    weight1 = coefficient(i.weight1, p, offset, live, EACH)
    beta2 = coefficient(i.beta2, p, offset, live, EACH)
    weight2 = coefficient(i.weight2, p, offset, live, EACH)
    h, new_m, new_v = moments(i, p, offset, live, MAXIMIZE, EACH)

    # Through the direction: where it is m' / d, into d and m'; else into m' alone.
    moved = coefficient(i.step_size, p, offset, live, EACH) * to_p
    root_v = root(new_v)
    d = denominator(i, root_v, offset, live, EACH)
    direction = divide(new_m, d)
    through = divide(moved, d)
    to_eps = through * direction
    if i.rectified is not None:
        rectified = chosen(i.rectified, offset, live, EACH)
        direction = tl.where(rectified, direction, new_m)
        through = tl.where(rectified, through, moved)
        to_eps = tl.where(rectified, to_eps, 0.0)
    to_m -= through
    to_root = to_eps
    if i.root_correction is not None:
        correction = coefficient(i.root_correction, p, offset, live, EACH)
        to_root = divide(to_eps, correction)
        collect(to.root_correction, divide(-to_root * root_v, correction), offset, live, EACH)
    # Where v' is 0 the slope of its root is taken as 0.
    to_v += tl.where(new_v == 0.0, 0.0, divide(to_root, root_v + root_v))

    to_h = weight1 * to_m + 2.0 * ((weight2 * h) * to_v)
    to_param = to_p
    if i.shrink is not None:
        to_param = coefficient(i.shrink, p, offset, live, EACH) * to_p
        collect(to.shrink, to_p * p, offset, live, EACH)
    if i.weight_decay is not None:
        to_param += coefficient(i.weight_decay, p, offset, live, EACH) * to_h
        collect(to.weight_decay, to_h * p, offset, live, EACH)
    write(to.param, to_param, offset, live)
    write(to.grad, -to_h if MAXIMIZE else to_h, offset, live)
    write(to.exp_avg, beta1 * to_m, offset, live)
    write(to.exp_avg_sq, beta2 * to_v, offset, live)
    collect(to.beta1, to_m * m, offset, live, EACH)
    collect(to.weight1, to_m * h, offset, live, EACH)
    collect(to.beta2, to_v * v, offset, live, EACH)
    collect(to.weight2, (to_v * h) * h, offset, live, EACH)
    collect(to.step_size, -to_p * direction, offset, live, EACH)
    collect(to.eps, to_eps, offset, live, EACH)


@triton.jit
def moments(i, p, offset, live, MAXIMIZE: tl.constexpr, EACH: tl.constexpr):
    """What is averaged, h, and the moments after it."""
    h = read(i.grad, offset, live)
    if MAXIMIZE:
        h = -h
    if i.weight_decay is not None:
        h = h + coefficient(i.weight_decay, p, offset, live, EACH) * p
    m = coefficient(i.beta1, p, offset, live, EACH) * read(i.exp_avg, offset, live)
    m += coefficient(i.weight1, p, offset, live, EACH) * h
    v = coefficient(i.beta2, p, offset, live, EACH) * read(i.exp_avg_sq, offset, live)
    # torch's order of products, which overflows where torch does and not earlier.
    v += (coefficient(i.weight2, p, offset, live, EACH) * h) * h
    return h, m, v


@triton.jit
def denominator(i, root_v, offset, live, EACH: tl.constexpr):
    """What the first moment is divided by."""
    if i.root_correction is not None:
        root_v = divide(root_v, coefficient(i.root_correction, root_v, offset, live, EACH))
    return root_v + coefficient(i.eps, root_v, offset, live, EACH)
