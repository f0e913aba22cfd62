"""What the kernels share: scalar maths in float64, addresses read from the table, and a block's way in and out."""

import triton
import triton.language as tl

# Fields of a row of layout.table.
PARAM: tl.constexpr = tl.constexpr(0)
GRAD: tl.constexpr = tl.constexpr(1)
FIRST: tl.constexpr = tl.constexpr(2)
SECOND: tl.constexpr = tl.constexpr(3)
STEP: tl.constexpr = tl.constexpr(4)
COUNT: tl.constexpr = tl.constexpr(5)
FIRST_BLOCK: tl.constexpr = tl.constexpr(6)
ROW: tl.constexpr = tl.constexpr(8)


@triton.jit
def value(number, pointer):
    """A hyperparameter: a number given at launch, or what a tensor on the device holds now."""
    result = number
    if pointer is not None:
        result = tl.load(pointer).to(tl.float64)
    return result


@triton.jit
def counters(rows, index, live):
    """The addresses of the step counters of some rows."""
    return tl.load(rows + index * ROW + STEP, mask=live, other=0).to(tl.pointer_type(tl.float32))


@triton.jit
def memory(row, field, dtype: tl.constexpr, start, VECTOR: tl.constexpr):
    """A pointer to element ``start`` of one of the tensors of a row.

    The compiler may move ``VECTOR`` elements at once, as many of every tensor whatever its dtype: were they spread
    differently over the threads, bringing them together would cost twice the registers and a trip through shared
    memory.
    """
    pointer = tl.load(row + field).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, VECTOR * dtype.primitive_bitwidth // 8) + start


@triton.jit
def one_minus_power(base, exponent):
    """``1 - base**exponent`` in float64 for a base in [0, 1) and an exponent >= 1, without cancellation near 1.

    ``expm1(x) = (u - 1) x / log(u)`` with ``u = exp(x)`` needs only functions that Triton and its interpreter share:
    the rounding of ``u`` cancels in the quotient.

    References:
        Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, section 1.14.1 (after Kahan).
    """
    x = exponent * tl.log(tl.where(base > 0.0, base, 0.5))
    u = tl.exp(x)
    regular = (u != 1.0) & (u != 0.0)
    expm1 = (u - 1.0) * (x / tl.log(tl.where(regular, u, 0.5)))
    expm1 = tl.where(regular, expm1, tl.where(u == 0.0, -1.0, x))
    return tl.where(base > 0.0, -expm1, 1.0)


@triton.jit
def divide(x, y):
    """The correctly rounded quotient; ``/`` is off by up to 2 ulp in float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x):
    """The correctly rounded square root."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def read(pointer, offset, live):
    """A block of a tensor; ``live`` is None for a whole one."""
    if live is None:
        return tl.load(pointer + offset)
    else:
        return tl.load(pointer + offset, mask=live, other=0)


@triton.jit
def write(pointer, x, offset, live):
    """Store a block; nothing where ``pointer`` is None."""
    if pointer is not None:
        tl.store(pointer + offset, x, mask=live)


@triton.jit
def coefficient(pointer, like, offset, live, EACH: tl.constexpr):
    """A coefficient in the dtype of a block: a value for each of its elements, or one for all."""
    return chosen(pointer, offset, live, EACH).to(like.dtype)


@triton.jit
def chosen(pointer, offset, live, EACH: tl.constexpr):
    """A coefficient as it is, a flag for one."""
    if EACH:
        return read(pointer, offset, live)
    else:
        return tl.load(pointer)


@triton.jit
def collect(pointer, gradient, offset, live, EACH: tl.constexpr):
    """Store a coefficient's gradient: of each element, or their sum over the block; nothing if ``pointer`` is None."""
    if pointer is not None:
        if EACH:
            write(pointer, gradient, offset, live)
        else:
            if live is not None:
                gradient = tl.where(live, gradient, 0.0)
            tl.store(pointer + tl.program_id(0), tl.sum(gradient))
