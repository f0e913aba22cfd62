r"""What Adam and RAdam share: running averages of the gradient and of its square, and weight decay both ways.

    g <- g + weight_decay p                           (or, decoupled: p <- p (1 - lr weight_decay))
    m <- beta1 m + (1 - beta1) g                      v <- beta2 v + (1 - beta2) g^2
    p <- p - lr scale / (1 - beta1^t) direction(m, v)

An algorithm says what ``scale`` and ``direction`` are.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.optimizer import Elementwise, StateT
from metaopt.functional.values import ZERO, Domain, Once
from metaopt.numerics import one_minus_power

NON_NEGATIVE = constraints.greater_than_eq(0.0)
BETA = constraints.half_open_interval(0.0, 1.0)


def domains(beta2: constraints.Constraint) -> dict[str, Domain]:
    """The hyperparameters' domains, given where beta2 can be learned."""
    return {
        "lr": Domain(NON_NEGATIVE, constraints.positive),
        "betas": Domain((BETA, BETA), (constraints.unit_interval, beta2)),
        "eps": Domain(NON_NEGATIVE, constraints.positive),
        "weight_decay": Domain(NON_NEGATIVE, constraints.nonnegative),
    }


class Coefficients(NamedTuple):
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    weight_decay: Tensor | None
    shrink: Tensor | None
    direction: Any  # what the algorithm's direction needs


class Moments(Elementwise[StateT]):
    """The base of Adam and RAdam; flags are ``decoupled_weight_decay`` and ``maximize``."""

    @abstractmethod
    def scale(self, once: Once, step: Tensor, beta2: Tensor, eps: Tensor) -> tuple[Tensor | float, Any]:
        """The factor of the step size, and a NamedTuple for `direction`, in float64."""

    @abstractmethod
    def direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any) -> Tensor:
        """Where to go, before the step size. ``c`` is what `scale` returned, cast."""

    @final
    def init_leaf(self, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(param), torch.zeros_like(param)

    @final
    def coefficients(self, once: Once, step: Tensor, *values: Tensor) -> Coefficients:
        lr, beta1, beta2, eps, weight_decay = values
        scale, direction = self.scale(once, step, beta2, eps)
        decays = weight_decay is not ZERO
        decoupled = self.flags["decoupled_weight_decay"]
        return Coefficients(
            beta1=beta1,
            one_minus_beta1=once(_one_minus, beta1),
            beta2=beta2,
            one_minus_beta2=once(_one_minus, beta2),
            step_size=lr * scale / once(one_minus_power, beta1, step),
            weight_decay=weight_decay if decays and not decoupled else None,
            shrink=1.0 - lr * weight_decay if decays and decoupled else None,
            direction=direction,
        )

    @final
    def update(self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], c: Coefficients) -> tuple[Tensor, ...]:
        exp_avg, exp_avg_sq = state
        if self.flags["maximize"]:
            grad = -grad
        if c.weight_decay is not None:
            grad = grad + c.weight_decay * param
        exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad
        # torch's order of products, which overflows where torch does and not earlier.
        exp_avg_sq = c.beta2 * exp_avg_sq + (c.one_minus_beta2 * grad) * grad
        direction = self.direction(exp_avg, exp_avg_sq, c.direction)
        if c.shrink is not None:
            param = c.shrink * param
        return param - c.step_size * direction, exp_avg, exp_avg_sq


def _one_minus(x: Tensor) -> Tensor:
    return 1.0 - x
