"""Random quadratics: the family on which learned optimizers were first tried."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from metaopt.tasks.task import Values


class Quadratic(NamedTuple):
    """``|matrix x - target|^2``: matrices of shape (count, d, d), targets of shape (count, d)."""

    matrix: Tensor
    target: Tensor


class RandomQuadratics:
    """``loss(x) = |W x - y|^2`` with all entries of ``W`` and ``y`` from N(0, 1), one pair a task.

    ``W`` is square, so that every task's minimum is 0 and lies at ``W^-1 y``; its condition is anything.

    Args:
        dimension: how many coordinates.
        start: parameters start at N(0, start^2).

    Raises:
        ValueError: ``dimension`` below 1, a negative ``start``.

    Example:
        >>> family = RandomQuadratics(dimension=3)
        >>> family.sample(5, None).matrix.shape
        torch.Size([5, 3, 3])
        >>> task = family.task(Quadratic(torch.eye(3), torch.ones(3)))
        >>> task.meta_loss(torch.zeros(3), {})
        tensor(3.)

    References:
        Andrychowicz et al., Learning to Learn by Gradient Descent by Gradient Descent, NeurIPS 2016, section 3.1.
    """

    def __init__(self, dimension: int = 10, start: float = 1.0) -> None:
        if dimension < 1:
            raise ValueError(f"dimension must be >= 1, got dimension={dimension}")
        if start < 0:
            raise ValueError(f"start must be >= 0, got start={start}")
        self.dimension = dimension
        self.start = start

    def sample(self, count: int, generator: Generator | None) -> Quadratic:
        """Matrices (count, dimension, dimension) and targets (count, dimension)."""
        matrix = torch.randn(count, self.dimension, self.dimension, generator=generator)
        return Quadratic(matrix, torch.randn(count, self.dimension, generator=generator))

    def task(self, config: Quadratic) -> RandomQuadratic:
        """The task of one matrix (dimension, dimension) and one target (dimension,)."""
        return RandomQuadratic(self, config)


class RandomQuadratic:
    """One task of `RandomQuadratics`: parameters are one tensor of shape (dimension,)."""

    def __init__(self, family: RandomQuadratics, config: Quadratic) -> None:
        self.family = family
        self.config = config

    def init(self, generator: Generator | None) -> Tensor:
        return self.family.start * torch.randn(self.family.dimension, generator=generator)

    def batch(self, step: int, generator: Generator | None) -> Tensor:
        """A 0, which the loss does not read: there is nothing to draw."""
        return torch.zeros(())

    def loss(self, params: Tensor, batch: Tensor, hyper: Values) -> Tensor:
        return (self.config.matrix @ params - self.config.target).square().sum()

    def meta_loss(self, params: Tensor, hyper: Values) -> Tensor:
        return self.loss(params, torch.zeros(()), hyper)

    @torch.no_grad()
    def test(self, params: Tensor) -> dict[str, Tensor]:
        """``loss``, 0-d: there is no other data to test on."""
        return {"loss": self.meta_loss(params, {})}
