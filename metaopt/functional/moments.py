r"""What Adam and RAdam share: running averages of the gradient and of its square, and weight decay both ways.

    g <- g + weight_decay p                           (or, decoupled: p <- p (1 - lr weight_decay))
    m <- beta1 m + (1 - beta1) g                      v <- beta2 v + (1 - beta2) g^2
    p <- p - lr factor / (1 - beta1^t) direction(m, v)

An algorithm says what the factor is, and whether the direction is adaptive: m / (sqrt(v) / correction + eps), or m.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.moments_step import Inputs, moments_step
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
    eps: Tensor
    root_correction: Tensor | None
    rectified: Tensor | None


class Scale(NamedTuple):
    """What sets Adam and RAdam apart, in float64.

    Attributes:
        factor: of the step size.
        eps: added to the root of the second moment, after ``root_correction``.
        root_correction: what that root is divided by; None for 1.
        rectified: a flag: whether the step is adaptive, and not a plain step along the first moment; None for always.
    """

    factor: Tensor | float
    eps: Tensor
    root_correction: Tensor | None
    rectified: Tensor | None


class Moments(Elementwise[StateT]):
    """The base of Adam and RAdam; flags are ``decoupled_weight_decay`` and ``maximize``."""

    @abstractmethod
    def scale(self, once: Once, step: Tensor, beta2: Tensor, eps: Tensor) -> Scale:
        """What depends on the step, and on the algorithm."""

    @final
    def init_leaf(self, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(param), torch.zeros_like(param)

    @final
    def coefficients(self, once: Once, step: Tensor, *values: Tensor) -> Coefficients:
        lr, beta1, beta2, eps, weight_decay = values
        scale = self.scale(once, step, beta2, eps)
        decays = weight_decay is not ZERO
        decoupled = self.flags["decoupled_weight_decay"]
        return Coefficients(
            beta1=beta1,
            one_minus_beta1=once(_one_minus, beta1),
            beta2=beta2,
            one_minus_beta2=once(_one_minus, beta2),
            step_size=lr * scale.factor / once(one_minus_power, beta1, step),
            weight_decay=weight_decay if decays and not decoupled else None,
            shrink=1.0 - lr * weight_decay if decays and decoupled else None,
            eps=scale.eps,
            root_correction=scale.root_correction,
            rectified=scale.rectified,
        )

    @final
    def update(self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], c: Coefficients) -> tuple[Tensor, ...]:
        exp_avg, exp_avg_sq = state
        return moments_step(
            Inputs(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                beta1=c.beta1,
                weight1=c.one_minus_beta1,
                beta2=c.beta2,
                weight2=c.one_minus_beta2,
                step_size=c.step_size,
                eps=c.eps,
                root_correction=c.root_correction,
                weight_decay=c.weight_decay,
                shrink=c.shrink,
                rectified=c.rectified,
                maximize=self.flags["maximize"],
            )
        )


def _one_minus(x: Tensor) -> Tensor:
    return 1.0 - x
