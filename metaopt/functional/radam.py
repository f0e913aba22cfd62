r"""RAdam: Adam whose step is rectified for the variance of the second moment's early estimates.

    m <- beta1 m + (1 - beta1) g                      v <- beta2 v + (1 - beta2) g^2
    rho_t > 5:   p <- p - lr r_t (m / (1 - beta1^t)) sqrt(1 - beta2^t) / (sqrt(v) + eps)
    else:        p <- p - lr m / (1 - beta1^t)

with ``g + weight_decay p`` in place of ``g``, or ``p (1 - lr weight_decay)`` in place of ``p`` if decoupled. As in
torch, eps stands outside the bias correction and the threshold is 5. See `metaopt.numerics.rectification` for ``r_t``.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.optimizer import Elementwise, Params
from metaopt.functional.values import ZERO, Domain, Once
from metaopt.numerics import one_minus_power, rectification, safe_sqrt

_NON_NEGATIVE = constraints.greater_than_eq(0.0)
_BETA = constraints.half_open_interval(0.0, 1.0)


class RAdamState(NamedTuple):
    step: Params
    exp_avg: Params
    exp_avg_sq: Params


class _Coefficients(NamedTuple):
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    eps: Tensor
    rectified: Tensor
    weight_decay: Tensor | None
    shrink: Tensor | None


class RAdam(Elementwise[RAdamState]):
    State = RAdamState
    domains: ClassVar = {
        "lr": Domain(_NON_NEGATIVE, constraints.positive),
        # Above 2/3, or no step is ever rectified (rho_inf <= 5) and beta2 has no effect.
        "betas": Domain((_BETA, _BETA), (constraints.unit_interval, constraints.interval(2 / 3, 1.0))),
        "eps": Domain(_NON_NEGATIVE, constraints.positive),
        "weight_decay": Domain(_NON_NEGATIVE, constraints.nonnegative),
    }

    def init_leaf(self, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(param), torch.zeros_like(param)

    def coefficients(self, once: Once, step: Tensor, *values: Tensor) -> _Coefficients:
        lr, beta1, beta2, eps, weight_decay = values
        rectified, factor = once(rectification, beta2, step)
        adaptive = once(_adaptive_scale, once(one_minus_power, beta2, step), rectified, factor)
        decays = weight_decay is not ZERO
        decoupled = self.flags["decoupled_weight_decay"]
        return _Coefficients(
            beta1=beta1,
            one_minus_beta1=once(_one_minus, beta1),
            beta2=beta2,
            one_minus_beta2=once(_one_minus, beta2),
            step_size=lr * adaptive / once(one_minus_power, beta1, step),
            # Where a step is not rectified, m / (sqrt(v) + eps) is computed and not used: it must still be finite.
            eps=torch.where(rectified, eps, 1.0),
            rectified=rectified,
            weight_decay=weight_decay if decays and not decoupled else None,
            shrink=1.0 - lr * weight_decay if decays and decoupled else None,
        )

    def update(self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], c: Any) -> tuple[Tensor, ...]:
        exp_avg, exp_avg_sq = state
        if self.flags["maximize"]:
            grad = -grad
        if c.weight_decay is not None:
            grad = grad + c.weight_decay * param
        exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad
        # torch's order of products, which overflows where torch does and not earlier.
        exp_avg_sq = c.beta2 * exp_avg_sq + (c.one_minus_beta2 * grad) * grad
        direction = torch.where(c.rectified, exp_avg / (safe_sqrt(exp_avg_sq) + c.eps), exp_avg)
        if c.shrink is not None:
            param = c.shrink * param
        return param - c.step_size * direction, exp_avg, exp_avg_sq


def _one_minus(x: Tensor) -> Tensor:
    return 1.0 - x


def _adaptive_scale(one_minus_beta2_power: Tensor, rectified: Tensor, factor: Tensor) -> Tensor:
    return torch.where(rectified, torch.sqrt(one_minus_beta2_power) * factor, 1.0)


def radam(
    lr: Any = 1e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> RAdam:
    """RAdam with the arguments and the numbers of ``torch.optim.RAdam``, differentiable in all of them.

    Args:
        lr: learning rate, >= 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0. At 0 a coordinate whose gradients were all 0 is 0 / 0, as in
            torch.
        weight_decay: >= 0; an L2 penalty, or (decoupled) a shrinkage by ``lr * weight_decay`` a step.
        decoupled_weight_decay: which of the two.
        maximize: ascend.

    Each hyperparameter may be a number, a tensor that broadcasts against the parameter, a mapping from parameter name
    to these, or a callable of the number of steps taken.

    Raises:
        TypeError, ValueError: a value of a wrong form or outside its domain.

    Note:
        At a coordinate whose gradients were all exactly 0 the derivative of a rectified step with respect to the
        gradient is about ``lr (1 - beta1) / eps``: large, and right.

    Example:
        >>> opt = radam(lr=0.1)
        >>> lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        >>> params = {"x": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
        >>> state = opt.init(params)
        >>> for _ in range(8):  # f(x) = (x1^2 + 2 x2^2 + 3 x3^2) / 2
        ...     grads = {"x": torch.tensor([1.0, 2.0, 3.0]) * params["x"]}
        ...     params, state = opt.step(params, grads, state, lr=lr)
        >>> loss = params["x"].square().sum()
        >>> print(f"{loss.item():.12f}")
        0.489775845062
        >>> (slope,) = torch.autograd.grad(loss, lr)

    References:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, ICLR 2020, algorithm 2.
        Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
    """
    return RAdam(
        {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize},
        {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
    )
