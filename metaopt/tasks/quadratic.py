"""Quadratics with noisy gradients, whose expected loss is known in closed form."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from metaopt.tasks.task import Values


class NoisyQuadratic:
    """The noisy quadratic model: ``loss(x) = sum_i h_i (x_i - c_i)^2 / 2``, ``c ~ N(0, noise^2 / h)`` anew each step.

    The gradient is ``h x`` plus noise of covariance ``noise^2 diag(h)``: as for a neural network near a minimum, noise
    and curvature go together, so that the best learning rate falls over time.

    Args:
        dimension: how many coordinates.
        condition: curvatures ``h_i`` are spaced evenly in their logarithm from 1 to ``1 / condition``.
        noise: standard deviation of the gradient's noise where the curvature is 1; 0 for a plain quadratic.
        start: parameters start at ``N(0, start^2 / h)``, so that every coordinate weighs alike in the loss.
        dtype: of parameters and batches.

    Raises:
        ValueError: ``dimension`` below 1, ``condition`` below 1, a negative ``noise`` or ``start``.

    Example:
        >>> task = NoisyQuadratic(dimension=2, condition=100.0)
        >>> task.curvature
        tensor([1.0000, 0.0100])
        >>> task.meta_loss(torch.tensor([1.0, 10.0]), {})
        tensor(1.)

    References:
        Zhang et al., Which Algorithmic Choices Matter at Which Batch Sizes? Insights From a Noisy Quadratic Model,
        NeurIPS 2019, section 3.
    """

    def __init__(
        self,
        dimension: int = 10,
        condition: float = 100.0,
        noise: float = 0.1,
        start: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dimension < 1:
            raise ValueError(f"dimension must be >= 1, got dimension={dimension}")
        if condition < 1:
            raise ValueError(f"condition must be >= 1, got condition={condition}")
        if noise < 0 or start < 0:
            raise ValueError(f"noise and start must be >= 0, got noise={noise} and start={start}")
        exponents = torch.linspace(0.0, 1.0, dimension, dtype=torch.float64)
        self.curvature = condition ** -exponents.to(dtype)
        self.noise = noise
        self.start = start

    def _normal(self, scale: float, generator: Generator | None) -> Tensor:
        draw = torch.randn(self.curvature.shape, dtype=self.curvature.dtype, generator=generator)
        return scale * draw / self.curvature.sqrt()

    def init(self, generator: Generator | None) -> Tensor:
        return self._normal(self.start, generator)

    def batch(self, step: int, generator: Generator | None) -> Tensor:
        return self._normal(self.noise, generator)

    def loss(self, params: Tensor, batch: Tensor, hyper: Values) -> Tensor:
        return 0.5 * (self.curvature * (params - batch) ** 2).sum()

    def meta_loss(self, params: Tensor, hyper: Values) -> Tensor:
        """The loss without noise, which is the expected one up to a constant."""
        return 0.5 * (self.curvature * params**2).sum()

    @torch.no_grad()
    def test(self, params: Tensor) -> dict[str, Tensor]:
        """``loss``, 0-d: there is no other data to test on."""
        return {"loss": self.meta_loss(params, {})}
