"""The differentiable step of Rprop: its formulas are those of ``metaopt.functional.rprop_step``.

Traffic for a float32 element is 28 bytes forward and 36 backward. All but the sums is exact or rounded as in torch's
operations, so the results are the same to the last bit.
"""

import triton
import triton.language as tl

from metaopt.kernels.gpu.scalars import coefficient, collect, read, write


@triton.jit(do_not_specialize=["count"])
def forward(i, new, count, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the new parameter, last gradient and step size of one block."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    # An unmasked body for whole blocks: a mask of unknown length would make every load a scalar one.
    if start + BLOCK <= count:
        step(i, new, offset, None, EACH)
    else:
        step(i, new, offset, offset < count, EACH)


@triton.jit(do_not_specialize=["count"])
def backward(i, cotangents, to, count, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradients of one block, and its part of those of coefficients that stand for all elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        pull_back(i, cotangents, to, offset, None, EACH)
    else:
        pull_back(i, cotangents, to, offset, offset < count, EACH)


@triton.jit
def step(i, new, offset, live, EACH: tl.constexpr):
    """Elements of the new parameter, last gradient and step size."""
    g = read(i.grad, offset, live)
    kept, flipped = agreement(g, read(i.prev, offset, live))
    scaled = read(i.step_size, offset, live) * factor(i, kept, flipped, offset, live, EACH)
    smallest = coefficient(i.smallest, g, offset, live, EACH)
    largest = coefficient(i.largest, g, offset, live, EACH)
    # Two selections, so that NaN stays NaN, as torch.clamp keeps it.
    size = tl.where(scaled < smallest, smallest, scaled)
    size = tl.where(size > largest, largest, size)
    g = tl.where(flipped > 0.0, 0.0, g)
    write(new[0], read(i.param, offset, live) - sign(g) * size, offset, live)
    write(new[1], g, offset, live)
    write(new[2], size, offset, live)


@triton.jit
def pull_back(i, cotangents, to, offset, live, EACH: tl.constexpr):
    """Elements of the gradients; the parameter's is its cotangent."""
    g = read(i.grad, offset, live)
    kept, flipped = agreement(g, read(i.prev, offset, live))
    size = read(i.step_size, offset, live)
    scale = factor(i, kept, flipped, offset, live, EACH)
    scaled = size * scale
    to_p = read(cotangents[0], offset, live)
    to_prev = read(cotangents[1], offset, live)
    through = read(cotangents[2], offset, live) - to_p * (sign(g) * (1.0 - flipped))
    below = scaled < coefficient(i.smallest, g, offset, live, EACH)
    above = scaled > coefficient(i.largest, g, offset, live, EACH)
    inside = tl.where(below | above, 0.0, through)
    write(to.grad, tl.where(flipped > 0.0, 0.0, to_prev), offset, live)
    write(to.prev, tl.zeros_like(g), offset, live)
    write(to.step_size, inside * scale, offset, live)
    collect(to.eta_minus, inside * size * flipped, offset, live, EACH)
    collect(to.eta_plus, inside * size * kept, offset, live, EACH)
    collect(to.smallest, tl.where(below, through, 0.0), offset, live, EACH)
    collect(to.largest, tl.where(above, through, 0.0), offset, live, EACH)


@triton.jit
def agreement(g, prev):
    """1 where the gradient has kept its sign, and 1 where it has flipped; else 0."""
    product = g * prev
    return (product > 0.0).to(g.dtype), (product < 0.0).to(g.dtype)


@triton.jit
def factor(i, kept, flipped, offset, live, EACH: tl.constexpr):
    """eta+, eta- or 1: a sum of which one term is not 0, hence exact."""
    grown = kept * coefficient(i.eta_plus, kept, offset, live, EACH)
    shrunk = flipped * coefficient(i.eta_minus, kept, offset, live, EACH)
    return grown + shrunk + (1.0 - kept - flipped)


@triton.jit
def sign(x):
    """1, -1 or 0, which is also that of NaN, as in torch."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)
