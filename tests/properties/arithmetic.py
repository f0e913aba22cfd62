"""Two kinds of numbers that `reference` computes with: exact ones, and ones that know how far rounding can be off.

`Exact` has a hundred digits, which is exact for comparison with float64's sixteen. `Rounded` carries each value with a
bound on the error that a computation in some dtype can have made up to there (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, chapter 3): what two programs may differ by is then no matter of taste, and grows just where
a difference of nearly equal numbers, or a subnormal one, makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, localcontext
from typing import Any

import numpy as np
import torch

ROUNDING = 2.0**-53  # half a unit in the last place of a float64


def exactly() -> Any:
    """A context in which Decimals have a hundred digits, and 0 / 0 raises."""
    return localcontext(Context(prec=100, Emin=-99999, Emax=99999, traps=[DivisionByZero, InvalidOperation, Overflow]))


class Exact:
    """Arithmetic with Decimals, to be used inside `exactly`."""

    @staticmethod
    def coefficient(x: Decimal, relative: float = 0.0, absolute: float = 0.0) -> Decimal:
        return x

    @staticmethod
    def correction(power: Decimal) -> float:
        return 0.0

    @staticmethod
    def average(old: Decimal, new: Decimal, beta: Decimal) -> Decimal:
        return beta * old + (1 - beta) * new

    @staticmethod
    def step(size: Decimal, along: Decimal, over: Decimal) -> Decimal:
        return size * along / over

    @staticmethod
    def sign(x: Decimal) -> int:
        return (x > 0) - (x < 0)

    @staticmethod
    def clamp(x: Decimal, low: Decimal, high: Decimal) -> Decimal:
        return min(max(x, low), high)


@dataclass(frozen=True)
class Bounded:
    """Numbers and how far off they may be, arrays of one shape, computed in a dtype.

    Attributes:
        unit: half a unit in the last place, relative: what one operation rounds by.
        tiny: the smallest number above 0: what an operation may lose near 0.
    """

    value: Any
    error: Any
    unit: float
    tiny: float

    def wider(self, error: Any) -> Bounded:
        return Bounded(self.value, self.error + error, self.unit, self.tiny)

    def _rounded(self, value: Any, error: Any) -> Bounded:
        return Bounded(value, error + self.unit * (np.abs(value) + error) + self.tiny, self.unit, self.tiny)

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error, self.unit, self.tiny)

    def __add__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self + -other

    def __mul__(self, other: Bounded) -> Bounded:
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        value, least = self.value / other.value, np.abs(other.value) - other.error
        error = np.where(least > 0, (self.error + np.abs(value) * other.error) / least, np.inf)
        return self._rounded(value, error)

    def sqrt(self) -> Bounded:
        low, high = (np.sqrt(np.maximum(self.value + sign * self.error, 0.0)) for sign in (-1, 1))
        value = np.sqrt(self.value)
        return self._rounded(value, np.maximum(high - value, value - low))


@dataclass(frozen=True)
class Rounded:
    """Arithmetic with `Bounded` numbers.

    Attributes:
        dtype: in which the computation runs; coefficients are computed in float64 and cast.
        torchs: allow for torch.optim's formulas too, some of which round more often than ours.
    """

    dtype: torch.dtype
    torchs: bool

    @property
    def unit(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    def number(self, x: Any) -> Bounded:
        """Known exactly."""
        return Bounded(
            x, np.zeros_like(x), self.unit, torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        )

    def coefficient(self, x: Decimal, relative: float = 0.0, absolute: float = 0.0) -> Bounded:
        """A coefficient, cast after it was computed in float64 with an error of its own."""
        return self.number(float(x)).wider((self.unit + ROUNDING + relative) * abs(float(x)) + absolute)

    def correction(self, power: Decimal) -> float:
        """The relative error of ``1 - power``: ours is right to a few units, torch's subtraction cancels."""
        return 4 * ROUNDING * float(1 / (1 - power) if self.torchs else 1)

    def average(self, old: Bounded, new: Bounded, beta: Decimal) -> Bounded:
        result = self.coefficient(beta) * old + self.coefficient(1 - beta) * new
        # torch's lerp adds a share of the difference, and rounds in the size of that.
        return result.wider(4 * self.unit * (np.abs(old.value) + np.abs(new.value)) if self.torchs else 0.0)

    def step(self, size: Bounded, along: Bounded, over: Bounded) -> Bounded:
        result = size * (along / over)
        if not self.torchs:
            return result
        # torch multiplies its factors one by one, and in another order: more roundings, and other subnormal numbers.
        lost = along.tiny * (1 + np.abs(size.value)) * (1 + 1 / np.maximum(over.value - over.error, 0.0))
        return result.wider(5 * self.unit * np.abs(result.value) + lost)
