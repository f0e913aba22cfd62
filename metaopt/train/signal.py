"""How much of a gradient is signal: its mean over recent steps against its scatter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class SignalToNoise:
    """``|E g| / sqrt(tr Cov g)`` of each of several gradients, by exponential averages.

    An average weighs the last ``1 / (1 - decay)`` steps or so. Above 1 the steps agree on a direction; far below 1 the
    gradient is noise, and more runs side by side, a shorter horizon or a smaller step are in order.

    Args:
        decay: of the averages, in (0, 1).

    Example:
        >>> snr = SignalToNoise()
        >>> for value in (1.0, 3.0) * 50:
        ...     ratios = snr.update({"lr": torch.tensor(value)})
        >>> round(ratios["lr"], 1)  # mean 2, deviation 1
        2.1
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._weight = 0.0  # of all steps so far, as in Adam's correction of the bias
        self._means: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def update(self, grads: Mapping[str, Tensor]) -> dict[str, float]:
        """Take in a step; the ratio of each, where it is defined: from the second step on."""
        first = not self._means
        self._weight = self._decay * self._weight + 1 - self._decay
        ratios: dict[str, float] = {}
        for name, grad in grads.items():
            grad = grad.detach().to(torch.float64)
            zero = torch.zeros_like(grad)
            mean = self._means.get(name, zero).to(grad).lerp(grad, 1 - self._decay)
            square = self._squares.get(name, zero).to(grad).lerp(grad.square(), 1 - self._decay)
            self._means[name], self._squares[name] = mean, square
            noise = (square / self._weight - (mean / self._weight).square()).clamp_min(0).sum().sqrt()
            if not first and noise > 0:
                ratios[name] = float((mean / self._weight).norm() / noise)
        return ratios

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight, "means": dict(self._means), "squares": dict(self._squares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weight = state["weight"]
        self._means, self._squares = dict(state["means"]), dict(state["squares"])
