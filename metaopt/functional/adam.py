r"""Adam and AdamW: steps scaled by running averages of the gradient and of its square.

    m <- beta1 m + (1 - beta1) g                      v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps)

with ``g + weight_decay p`` in place of ``g`` (Adam), or ``p (1 - lr weight_decay)`` in place of ``p`` (AdamW).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.optimizer import Elementwise, Params
from metaopt.functional.values import ZERO, Domain, Once
from metaopt.numerics import one_minus_power, safe_sqrt

_NON_NEGATIVE = constraints.greater_than_eq(0.0)
_BETA = constraints.half_open_interval(0.0, 1.0)


class AdamState(NamedTuple):
    step: Params
    exp_avg: Params
    exp_avg_sq: Params


class _Coefficients(NamedTuple):
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    root_correction: Tensor
    eps: Tensor
    weight_decay: Tensor | None
    shrink: Tensor | None


class Adam(Elementwise[AdamState]):
    State = AdamState
    domains: ClassVar = {
        "lr": Domain(_NON_NEGATIVE, constraints.positive),
        "betas": Domain((_BETA, _BETA), (constraints.unit_interval, constraints.unit_interval)),
        "eps": Domain(_NON_NEGATIVE, constraints.positive),
        "weight_decay": Domain(_NON_NEGATIVE, constraints.nonnegative),
    }

    def init_leaf(self, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(param), torch.zeros_like(param)

    def coefficients(self, once: Once, step: Tensor, *values: Tensor) -> _Coefficients:
        lr, beta1, beta2, eps, weight_decay = values
        decays = weight_decay is not ZERO
        decoupled = self.flags["decoupled_weight_decay"]
        return _Coefficients(
            beta1=beta1,
            one_minus_beta1=once(_one_minus, beta1),
            beta2=beta2,
            one_minus_beta2=once(_one_minus, beta2),
            step_size=lr / once(one_minus_power, beta1, step),
            root_correction=once(_root_correction, beta2, step),
            eps=eps,
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
        exp_avg_sq = c.beta2 * exp_avg_sq + (c.one_minus_beta2 * grad) * grad
        direction = exp_avg / (safe_sqrt(exp_avg_sq) / c.root_correction + c.eps)
        if c.shrink is not None:
            param = c.shrink * param
        return param - c.step_size * direction, exp_avg, exp_avg_sq


def _one_minus(x: Tensor) -> Tensor:
    return 1.0 - x


def _root_correction(beta2: Tensor, step: Tensor) -> Tensor:
    return torch.sqrt(one_minus_power(beta2, step))


def adam(
    lr: Any = 1e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Adam:
    """Adam with the arguments and the numbers of ``torch.optim.Adam`` (amsgrad aside), differentiable in all of them.

    Args:
        lr: learning rate, >= 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the bias-corrected root of the second moment, >= 0.
        weight_decay: L2 penalty, >= 0.
        decoupled_weight_decay: shrink the parameters instead, as `adamw` does.
        maximize: ascend.

    Each hyperparameter may be a number, a tensor that broadcasts against the parameter, a mapping from parameter name
    to these, or a callable of the number of steps taken.

    Raises:
        TypeError, ValueError: a value of a wrong form or outside its domain.

    Example:
        >>> opt = adam(lr=0.5)
        >>> params = torch.tensor([1.0, -2.0])
        >>> params, state = opt.step(params, torch.tensor([3.0, -4.0]), opt.init(params))
        >>> params  # the first step is lr times the gradient's sign
        tensor([ 0.5000, -1.5000])

    References:
        Kingma & Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, algorithm 1.
    """
    return Adam(
        {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize},
        {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
    )


def adamw(
    lr: Any = 1e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
    *,
    maximize: bool = False,
) -> Adam:
    """Adam with decoupled weight decay; the arguments and the numbers of ``torch.optim.AdamW``. See `adam`.

    Example:
        >>> opt = adamw(lr=0.5, weight_decay=0.1)
        >>> params = torch.tensor([1.0])
        >>> opt.step(params, torch.tensor([3.0]), opt.init(params))[0]  # 1 (1 - .05) - .5
        tensor([0.4500])

    References:
        Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2.
    """
    return adam(lr, betas, eps, weight_decay, decoupled_weight_decay=True, maximize=maximize)
