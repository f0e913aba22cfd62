"""Sinusoids: few-shot regression, the first experiment of MAML."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from metaopt.tasks.network import Dense, Params
from metaopt.tasks.task import Values


class Wave(NamedTuple):
    """``amplitude sin(x - phase)``, each (count,), and where it is seen: (count, shots, 1) and (count, queries, 1)."""

    amplitude: Tensor
    phase: Tensor
    support: Tensor
    query: Tensor


class Points(NamedTuple):
    """Inputs and outputs, both of shape (n, 1)."""

    x: Tensor
    y: Tensor


class Sinusoids:
    """Regression of ``amplitude sin(x - phase)``: amplitude U[0.1, 5], phase U[0, pi], x U[-5, 5].

    A task's few support points are drawn once, and are all that its inner loss sees; the meta-loss is the mean squared
    error on its query points.

    Args:
        shots: support points of a task.
        queries: query points of a task.
        hidden: units of the hidden layers, with ReLU between.

    Raises:
        ValueError: ``shots``, ``queries`` or a size below 1.

    Example:
        >>> family = Sinusoids(shots=5)
        >>> waves = family.sample(3, torch.Generator().manual_seed(0))
        >>> waves.amplitude.shape, waves.support.shape
        (torch.Size([3]), torch.Size([3, 5, 1]))
        >>> task = family.task(Wave(*(part[0] for part in waves)))
        >>> task.batch(0, None).y.shape
        torch.Size([5, 1])

    References:
        Finn, Abbeel & Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017,
        section 5.1.
    """

    def __init__(self, shots: int = 10, queries: int = 10, hidden: tuple[int, ...] = (40, 40)) -> None:
        if shots < 1:
            raise ValueError(f"shots must be >= 1, got shots={shots}")
        if queries < 1:
            raise ValueError(f"queries must be >= 1, got queries={queries}")
        self.shots = shots
        self.queries = queries
        self.network = Dense(1, *hidden, 1)

    def sample(self, count: int, generator: Generator | None) -> Wave:
        """``count`` waves, with points of their own."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        return Wave(
            uniform(0.1, 5.0),
            uniform(0.0, math.pi),
            uniform(-5.0, 5.0, self.shots, 1),
            uniform(-5.0, 5.0, self.queries, 1),
        )

    def task(self, config: Wave) -> Sinusoid:
        """The task of one wave: 0-d amplitude and phase, points (shots, 1) and (queries, 1)."""
        return Sinusoid(self, config)

    def initial(self, generator: Generator | None) -> Params:
        """Fresh weights, as torch.nn.Linear distributes them: where a task starts, and what MAML learns."""
        return self.network.init(generator)

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Shape (n, 1) for inputs of shape (n, 1)."""
        return self.network(params, x)


class Sinusoid:
    """One task of `Sinusoids`."""

    def __init__(self, family: Sinusoids, config: Wave) -> None:
        self.family = family
        self.config = config

    def wave(self, x: Tensor) -> Tensor:
        """What is to be learned, of the shape of ``x``."""
        return self.config.amplitude * torch.sin(x - self.config.phase)

    def init(self, generator: Generator | None) -> Params:
        return self.family.initial(generator)

    def batch(self, step: int, generator: Generator | None) -> Points:
        """The support points, the same at every step."""
        return Points(self.config.support, self.wave(self.config.support))

    def loss(self, params: Params, batch: Points, hyper: Values) -> Tensor:
        return nn.functional.mse_loss(self.family.predict(params, batch.x), batch.y)

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        return self.loss(params, Points(self.config.query, self.wave(self.config.query)), hyper)

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, Tensor]:
        """``loss``, 0-d: the mean squared error at 101 points evenly between -5 and 5."""
        x = torch.linspace(-5.0, 5.0, 101, dtype=self.config.query.dtype, device=self.config.query.device)[:, None]
        return {"loss": self.loss(params, Points(x, self.wave(x)), {})}
