r"""Adam and AdamW: steps scaled by running averages of the gradient and of its square.

    m <- beta1 m + (1 - beta1) g                      v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps)

with ``g + weight_decay p`` in place of ``g`` (Adam), or ``p (1 - lr weight_decay)`` in place of ``p`` (AdamW).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.moments import Moments, Scale, domains
from metaopt.functional.optimizer import Params
from metaopt.functional.values import Once
from metaopt.numerics import one_minus_power


class AdamState(NamedTuple):
    step: Params
    exp_avg: Params
    exp_avg_sq: Params


class Adam(Moments[AdamState]):
    State = AdamState
    domains = domains(beta2=constraints.unit_interval)

    def scale(self, once: Once, step: Tensor, beta2: Tensor, eps: Tensor) -> Scale:
        return Scale(1.0, eps, root_correction=once(_root_correction, beta2, step), rectified=None)


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
