"""What a random search draws hyperparameters from, and where a learned one starts: the middle of the same range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator


@dataclass(frozen=True)
class Uniform:
    """Uniform between two bounds."""

    low: float
    high: float

    def at(self, quantile: float) -> float:
        return self.low + quantile * (self.high - self.low)


@dataclass(frozen=True)
class LogUniform:
    """``offset + sign * x`` with the logarithm of x uniform: ``1 - x`` for a beta, ``1 + x`` for eta+."""

    low: float
    high: float
    offset: float = 0.0
    sign: float = 1.0

    def at(self, quantile: float) -> float:
        return self.offset + self.sign * math.exp((1 - quantile) * math.log(self.low) + quantile * math.log(self.high))


Range = Uniform | LogUniform
Space = Mapping[str, Range | tuple[Range, Range]]

RADAM: Space = {
    "lr": LogUniform(1e-3, 1.0),
    "betas": (LogUniform(0.01, 0.9, offset=1.0, sign=-1.0), LogUniform(1e-3, 0.333, offset=1.0, sign=-1.0)),
    "eps": LogUniform(1e-10, 1e-2),
    "weight_decay": LogUniform(1e-6, 1e-1),
}
RPROP: Space = {
    "lr": LogUniform(1e-4, 1.0),
    "etas": (Uniform(0.1, 0.95), LogUniform(0.01, 1.0, offset=1.0)),
    "step_sizes": (LogUniform(1e-8, 1e-3), LogUniform(1e-2, 1.0)),
}


def fill(space: Space, make: Callable[[str, Range], Any]) -> dict[str, Any]:
    """A value for every hyperparameter of a space: ``make(key, range)``, with keys like lr, betas[0], betas[1]."""
    return {
        name: tuple(make(f"{name}[{index}]", part) for index, part in enumerate(ranges))
        if isinstance(ranges, tuple)
        else make(name, ranges)
        for name, ranges in space.items()
    }


def draw(part: Range, generator: Generator) -> float:
    """One draw from a range."""
    return part.at(float(torch.rand((), generator=generator, dtype=torch.float64)))


def cosine(peak: float, steps: int) -> Callable[[int], float]:
    """A half cosine from the peak to 0 over the steps, 0 afterwards."""
    return lambda step: peak * 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))
