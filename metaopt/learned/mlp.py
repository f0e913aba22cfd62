"""The per-parameter MLP: a small network reads an element's gradient, value and momenta, and says how far to go.

x = (g, p, m_.1, m_.5, m_.9, m_.99, m_.999, m_.9999) / rms over the tensor, tanh(t / s - 1) for 11 time scales s
d, a = MLP(x)                              p <- p - lr 0.001 d exp(0.001 a)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.functional.optimizer import Params
from metaopt.functional.values import Once
from metaopt.learned.base import LearnedOptimizer, Weights
from metaopt.learned.features import TIMESCALES, averaged, network, register, time_features

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)


class MLPState(NamedTuple):
    """``momenta``: (6, *shape) for each parameter."""

    step: Params
    momenta: Params


class MLPOptimizer(LearnedOptimizer):
    """The per-parameter MLP of Metz et al.: 19 features, two hidden layers, 1,762 weights.

    The features of an element, in this order; 1 to 8 are divided by ``sqrt(mean of squares over its tensor + 1e-5)``:

    1. the gradient
    2. the parameter's value
    3. to 8. averages of the gradient with decays .1, .5, .9, .99, .999, .9999, which start at 0, uncorrected
    9. to 19. ``tanh(t / s - 1)`` for s = 1, 3, 10, 30, ..., 100,000, where t counts the steps taken

    The outputs d and a change the parameter by ``-lr step_scale d exp(magnitude_scale a)``. Untrained, the root mean
    square of d is about .25 (.07 to .67 over 50 seeds): small steps in a random direction.

    The features, scales and initialisation are those of the authors' published code (``MLPLOpt``), which has no second
    moments among its features.

    Args:
        hidden: units of a hidden layer, >= 1.
        step_scale: the scale of a step.
        magnitude_scale: the scale of its logarithm.
        lr: what every step is multiplied by, >= 0.

    Raises:
        ValueError: ``hidden`` below 1, a negative ``lr``.

    Example:
        >>> opt = MLPOptimizer()
        >>> opt
        MLPOptimizer(hidden=32, step_scale=0.001, magnitude_scale=0.001, lr=1.0; 1,762 weights)
        >>> params = {"weight": torch.ones(3, 2)}
        >>> params, state = opt.step(params, {"weight": torch.randn(3, 2)}, opt.init(params))
        >>> state.momenta["weight"].shape
        torch.Size([6, 3, 2])

    References:
        Metz et al., Understanding and Correcting Pathologies in the Training of Learned Optimizers, ICML 2019,
        appendix. Metz et al., Tasks, Stability, Architecture, and Compute, 2020, section on baselines.
    """

    State = MLPState
    architecture = "mlp"

    def __init__(
        self, hidden: int = 32, step_scale: float = 0.001, magnitude_scale: float = 0.001, lr: float = 1.0
    ) -> None:
        super().__init__(lr)
        if hidden < 1:
            raise ValueError(f"hidden must be >= 1, got hidden={hidden}")
        self.hidden, self.step_scale, self.magnitude_scale = hidden, step_scale, magnitude_scale
        register(self, 2 + len(DECAYS) + len(TIMESCALES), hidden, hidden, 2)

    def config(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden,
            "step_scale": self.step_scale,
            "magnitude_scale": self.magnitude_scale,
            "lr": self.lr,
        }

    def init_leaf(self, param: Tensor) -> tuple[Tensor]:
        return (param.new_zeros(len(DECAYS), *param.shape),)

    def change(
        self, param: Tensor, grad: Tensor, step: Tensor, state: tuple[Tensor, ...], weights: Weights, once: Once
    ) -> tuple[Tensor, ...]:
        state = self.accumulate(grad, state, weights, once)
        return self.react(self.features(param, grad, state), None, step, weights, once).view_as(param), *state

    # The same in parts, for those who step a large tensor in chunks: what is after `accumulate` needs its mean squares.

    def accumulate(self, grad: Tensor, state: tuple[Tensor, ...], weights: Weights, once: Once) -> tuple[Tensor, ...]:
        """The state after this gradient, of a tensor or any part of it."""
        (momenta,) = state
        return (averaged(momenta, grad, once(_rates, grad.dtype, grad.device)),)

    def features(self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """The first eight features, not yet normalised: (8, n)."""
        (momenta,) = state
        return torch.cat([grad.reshape(1, -1), param.reshape(1, -1), momenta.reshape(len(DECAYS), -1)])

    def react(self, x: Tensor, squares: Tensor | None, step: Tensor, weights: Weights, once: Once) -> Tensor:
        """What to add to n elements.

        Args:
            x: their features.
            squares: the mean of each feature's squares over the tensor, (8,); (8, n) if the elements are of several
                tensors; None if they are all of one.
            step, weights, once: as for `change`.
        """
        direction, magnitude = network(weights, x, once(time_features, step, x.dtype), squares)
        return -self.step_scale * direction * torch.exp(self.magnitude_scale * magnitude)


def _rates(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([1 - decay for decay in DECAYS], dtype=dtype, device=device)
