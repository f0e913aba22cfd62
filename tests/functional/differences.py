"""Finite differences that choose their own step size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 2.0**-52


class Difference(NamedTuple):
    """A derivative and a bound on its error, of one shape."""

    value: Tensor
    error: Tensor

    def improved(self, value: Tensor, error: Tensor) -> Difference:
        """With each entry of another estimate that is better."""
        better = error < self.error
        return Difference(torch.where(better, value, self.value), torch.where(better, error, self.error))


def derivative(f: Callable[[float], Tensor], x: float, lowest: float = 0.0) -> Difference:
    """The derivative of a function of one number at ``x``, by five-point formulas of fourth order.

    Near the end of the domain (eps = 1e-8) they look upwards only. The step starts at 1/40 of the distance to the
    nearest of 0 and 1, where most domains end, and shrinks until eight digits agree or rounding outweighs the gain. Of
    all step sizes, each entry takes the one whose error is least, judged by the step before and by rounding. Below a
    step where ``f`` has a kink or a jump, neighbouring steps agree again.

    Args:
        f: its value may have any shape; float64.
        x: where.
        lowest: the end of the domain.
    """
    one_sided = x - lowest < 1e-4
    scale = 1.0 if one_sided else min(abs(x - lowest), abs(1.0 - x) or 1.0)
    origin = f(x)
    # An entry of a vector is computed from others, and no better rounded than these.
    size = origin.abs().clamp(min=0.01 * origin.abs().max().item())
    last = best = None
    for rung in range(16):
        h = scale / 40 * 8.0**-rung
        value = (_forward(f, x, h, origin) if one_sided else _central(f, x, h)) / (12.0 * h)
        # What is differenced was itself rounded a few times over; and so was x, if only in 1 - x.
        rounding = 4 * _ROUNDING * (size + 16 * abs(x) * value.abs()) / h
        if last is not None:
            # A step 8 times smaller makes a fourth-order error 4096 times smaller; 1024 leaves a margin.
            error = (value - last).abs() / 1024 + rounding
            best = Difference(value, error) if best is None else best.improved(value, error)
            if bool(((8 * rounding > best.error) | (best.error <= 1e-8 * best.value.abs())).all()):
                break
        last = value
    assert best is not None
    return best


# Differences first: a constant function then gives 0 without rounding.


def _central(f: Callable[[float], Tensor], x: float, h: float) -> Tensor:
    return 8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))


def _forward(f: Callable[[float], Tensor], x: float, h: float, origin: Tensor) -> Tensor:
    weights = {1: 48, 2: -36, 3: 16, 4: -3}
    return sum((weight * (f(x + k * h) - origin) for k, weight in weights.items()), torch.zeros_like(origin))
