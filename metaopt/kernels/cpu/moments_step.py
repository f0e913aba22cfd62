"""The differentiable step of Adam and RAdam: its formulas are those of ``metaopt.functional.moments_step``."""

from __future__ import annotations

from typing import Any

import numpy as np

from metaopt.kernels.cpu.compiled import array_at, compiled, inlined
from metaopt.kernels.cpu.tiles import TILE, collect, fill, scratch, totals

# Places among the inputs.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, BETA1, WEIGHT1, BETA2, WEIGHT2, STEP_SIZE, EPS = range(10)
ROOT_CORRECTION, WEIGHT_DECAY, SHRINK, RECTIFIED, MAXIMIZE = range(10, 15)
END = SHRINK + 1  # of the coefficients


@compiled
def forward(i: Any, new: Any, each: bool, size: int, one: Any, begin: int, end: int, block: int) -> None:
    """Write the new parameter and moments of the blocks ``begin`` to ``end``."""
    c = scratch(END, i, one)
    step_size, shrink = c[STEP_SIZE], c[SHRINK]
    if not each:
        fill(c, i, each, 0, TILE)
    h, root, d, plain, change = scratch(5, i, one)
    flags = deciding(i, each)
    stop = min(end * block, size)
    for start in range(begin * block, stop, TILE):
        count = min(TILE, stop - start)
        if each:
            fill(c, i, each, start, count)
        new_p = array_at(new[0], start, count, one)
        new_m = array_at(new[1], start, count, one)
        new_v = array_at(new[2], start, count, one)
        moments(i, c, start, count, h, new_m, new_v)
        denominator(i, c, count, new_v, root, d)
        for k in range(count):  # torch's order: a small step size first, and then a small denominator
            plain[k] = step_size[k] * new_m[k]
        for k in range(count):
            change[k] = plain[k] / d[k]
        if flags:
            select(flags, each, start, count, change, plain)
        p = array_at(i[PARAM], start, count, one)
        if i[SHRINK]:
            for k in range(count):
                new_p[k] = shrink[k] * p[k] - change[k]
        else:
            for k in range(count):
                new_p[k] = p[k] - change[k]


@compiled
def backward(
    i: Any, cotangents: Any, to: Any, each: bool, size: int, one: Any, begin: int, end: int, block: int
) -> Any:
    """Write the gradients of the blocks, and return their part of those of coefficients that stand for all elements."""
    zero = one - one
    c = scratch(END, i, one)
    beta1, weight1, beta2, weight2 = c[BETA1], c[WEIGHT1], c[BETA2], c[WEIGHT2]
    step_size, correction = c[STEP_SIZE], c[ROOT_CORRECTION]
    decay, shrink = c[WEIGHT_DECAY], c[SHRINK]
    if not each:
        fill(c, i, each, 0, TILE)
    sums = np.zeros((END, TILE))
    ones, h, new_m, new_v, root, d, direction, through, to_eps, to_root, to_m, to_v, to_h, other = scratch(14, i, one)
    ones[:] = one
    flags = deciding(i, each)
    stop = min(end * block, size)
    for start in range(begin * block, stop, TILE):
        count = min(TILE, stop - start)
        if each:
            fill(c, i, each, start, count)
        p = array_at(i[PARAM], start, count, one)
        to_p = array_at(cotangents[0], start, count, one)
        to_new_m = array_at(cotangents[1], start, count, one)
        to_new_v = array_at(cotangents[2], start, count, one)
        moments(i, c, start, count, h, new_m, new_v)
        denominator(i, c, count, new_v, root, d)

        # Through the direction: where it is m' / d, into d and m'; else into m' alone.
        for k in range(count):
            direction[k] = new_m[k] / d[k]
        for k in range(count):
            through[k] = step_size[k] * to_p[k] / d[k]
        for k in range(count):
            to_eps[k] = through[k] * direction[k]
        if flags:
            for k in range(count):
                other[k] = step_size[k] * to_p[k]
            select(flags, each, start, count, through, other)
            select(flags, each, start, count, direction, new_m)
            for k in range(count):
                other[k] = zero
            select(flags, each, start, count, to_eps, other)
        for k in range(count):
            to_m[k] = to_new_m[k] - through[k]
        for k in range(count):
            to_root[k] = to_eps[k]
        if i[ROOT_CORRECTION]:
            for k in range(count):
                to_root[k] = to_eps[k] / correction[k]
            if to[ROOT_CORRECTION]:
                for k in range(count):
                    other[k] = -to_root[k] * root[k] / correction[k]
                collect(ROOT_CORRECTION, other, ones, to, sums, each, start, count)
        for k in range(count):
            slope = to_root[k] / (root[k] + root[k])
            # Where v' is 0 the slope of its root is taken as 0.
            to_v[k] = to_new_v[k] + (zero if new_v[k] == zero else slope)

        for k in range(count):
            half = (weight2[k] * h[k]) * to_v[k]
            to_h[k] = weight1[k] * to_m[k] + (half + half)
        if to[PARAM]:
            to_param = array_at(to[PARAM], start, count, one)
            if i[SHRINK]:
                for k in range(count):
                    other[k] = shrink[k] * to_p[k]
            else:
                for k in range(count):
                    other[k] = to_p[k]
            if i[WEIGHT_DECAY]:
                for k in range(count):
                    to_param[k] = other[k] + decay[k] * to_h[k]
            else:
                for k in range(count):
                    to_param[k] = other[k]
        if to[GRAD]:
            to_g = array_at(to[GRAD], start, count, one)
            if i[MAXIMIZE]:
                for k in range(count):
                    to_g[k] = -to_h[k]
            else:
                for k in range(count):
                    to_g[k] = to_h[k]
        if to[EXP_AVG]:
            scale(beta1, to_m, to[EXP_AVG], start, count)
        if to[EXP_AVG_SQ]:
            scale(beta2, to_v, to[EXP_AVG_SQ], start, count)

        if to[BETA1]:
            collect(BETA1, to_m, array_at(i[EXP_AVG], start, count, one), to, sums, each, start, count)
        if to[WEIGHT1]:
            collect(WEIGHT1, to_m, h, to, sums, each, start, count)
        if to[BETA2]:
            collect(BETA2, to_v, array_at(i[EXP_AVG_SQ], start, count, one), to, sums, each, start, count)
        if to[WEIGHT2]:
            for k in range(count):
                other[k] = to_v[k] * h[k]
            collect(WEIGHT2, other, h, to, sums, each, start, count)
        if to[STEP_SIZE]:
            for k in range(count):
                other[k] = -to_p[k]
            collect(STEP_SIZE, other, direction, to, sums, each, start, count)
        if to[EPS]:
            collect(EPS, to_eps, ones, to, sums, each, start, count)
        if to[WEIGHT_DECAY]:
            collect(WEIGHT_DECAY, to_h, p, to, sums, each, start, count)
        if to[SHRINK]:
            collect(SHRINK, to_p, p, to, sums, each, start, count)
    return totals(sums, to)


@inlined
def moments(i: Any, c: Any, start: int, count: int, h: Any, new_m: Any, new_v: Any) -> None:
    """Write what is averaged, and the moments after it."""
    beta1, weight1, beta2, weight2 = c[BETA1], c[WEIGHT1], c[BETA2], c[WEIGHT2]
    decay = c[WEIGHT_DECAY]
    one = beta1[0]
    g = array_at(i[GRAD], start, count, one)
    m = array_at(i[EXP_AVG], start, count, one)
    v = array_at(i[EXP_AVG_SQ], start, count, one)
    if i[MAXIMIZE]:
        for k in range(count):
            h[k] = -g[k]
    else:
        for k in range(count):
            h[k] = g[k]
    if i[WEIGHT_DECAY]:
        p = array_at(i[PARAM], start, count, one)
        for k in range(count):
            h[k] += decay[k] * p[k]
    for k in range(count):
        new_m[k] = beta1[k] * m[k] + weight1[k] * h[k]
    for k in range(count):
        # torch's order of products, which overflows where torch does and not earlier.
        new_v[k] = beta2[k] * v[k] + (weight2[k] * h[k]) * h[k]


@inlined
def denominator(i: Any, c: Any, count: int, new_v: Any, root: Any, d: Any) -> None:
    """Write the root of the second moment, and what the first is divided by."""
    eps, correction = c[EPS], c[ROOT_CORRECTION]
    for k in range(count):
        root[k] = np.sqrt(new_v[k])
    if i[ROOT_CORRECTION]:
        for k in range(count):
            d[k] = root[k] / correction[k] + eps[k]
    else:
        for k in range(count):
            d[k] = root[k] + eps[k]


@inlined
def deciding(i: Any, each: bool) -> Any:
    """Where the flags are of which steps are rectified; 0 if all are."""
    flags = i[RECTIFIED]
    if flags and not each and array_at(flags, 0, 1, np.uint8(0))[0]:
        flags = 0
    return flags


@inlined
def select(flags: int, each: bool, start: int, count: int, x: Any, other: Any) -> None:
    """Put ``other`` into ``x`` where a flag is not set."""
    if each:
        flag = array_at(flags, start, count, np.uint8(0))
        for k in range(count):
            x[k] = x[k] if flag[k] else other[k]
    elif not array_at(flags, 0, 1, np.uint8(0))[0]:
        for k in range(count):
            x[k] = other[k]


@inlined
def scale(x: Any, y: Any, to: int, start: int, count: int) -> None:
    """Write the product to an address."""
    product = array_at(to, start, count, x[0])
    for k in range(count):
        product[k] = x[k] * y[k]
