"""Exact numbers with their exact derivative, and with what either was summed from.

A derivative that is a sum of large terms which cancel is not known better than these terms are. A `Dual` adds up their
sizes on the way, so that a float64 derivative can be compared to the digits it can have.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tests.properties.arithmetic import Exact

ZERO, ONE = Decimal(0), Decimal(1)


class KinkError(ArithmeticError):
    """There is no derivative here, but one to either side."""


@dataclass(frozen=True)
class Dual:
    """A Decimal that depends on one variable.

    Attributes:
        slope: its derivative.
        size, steep: the sums of the absolute values of the terms of the value and of the slope.
    """

    value: Decimal
    slope: Decimal
    size: Decimal
    steep: Decimal

    @classmethod
    def of(cls, x: Any, slope: int = 0) -> Dual:
        return x if isinstance(x, Dual) else cls(Decimal(x), Decimal(slope), abs(Decimal(x)), Decimal(abs(slope)))

    def __bool__(self) -> bool:
        return bool(self.value or self.slope)

    def __float__(self) -> float:
        return float(self.value)

    def __lt__(self, other: Any) -> bool:
        return self.value < Dual.of(other).value

    def __gt__(self, other: Any) -> bool:
        return self.value > Dual.of(other).value

    def __le__(self, other: Any) -> bool:
        return self.value <= Dual.of(other).value

    def __abs__(self) -> Dual:
        return -self if self.value < 0 else self

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope, self.size, self.steep)

    def __add__(self, other: Any) -> Dual:
        o = Dual.of(other)
        return Dual(self.value + o.value, self.slope + o.slope, self.size + o.size, self.steep + o.steep)

    def __sub__(self, other: Any) -> Dual:
        return self + -Dual.of(other)

    def __rsub__(self, other: int) -> Dual:
        """1 - beta and its like are no cancellation: they are computed to the last digit."""
        value = other - self.value
        return Dual(value, -self.slope, abs(value), self.steep)

    def __mul__(self, other: Any) -> Dual:
        o = Dual.of(other)
        return Dual(
            self.value * o.value,
            self.value * o.slope + self.slope * o.value,
            self.size * o.size,
            self.size * o.steep + self.steep * o.size,
        )

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Dual:
        return self * Dual.of(other).inverse()

    def __rtruediv__(self, other: int) -> Dual:
        return Dual.of(other) * self.inverse()

    def __pow__(self, exponent: int) -> Dual:
        result = Dual.of(1)
        for _ in range(exponent):
            result = result * self
        return result

    def inverse(self) -> Dual:
        value = ONE / self.value
        amplified = self.size * abs(value)  # how many times worse than its last digit the number is known
        return Dual(value, -self.slope * value**2, amplified * abs(value), self.steep * (amplified * value) ** 2)

    def sqrt(self) -> Dual:
        if self.value == 0:
            if self.slope:
                raise KinkError
            return Dual.of(0)
        root = self.value.sqrt()
        amplified = self.size / self.value
        return Dual(root, self.slope / (2 * root), amplified * root, amplified * self.steep / (2 * root))


class ExactDuals(Exact):
    """Arithmetic with `Dual` numbers."""

    @staticmethod
    def clamp(x: Any, low: Any, high: Any) -> Any:
        if x.value in (low.value, high.value):
            raise KinkError
        return min(max(x, low), high)
