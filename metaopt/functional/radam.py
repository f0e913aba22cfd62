r"""RAdam: Adam whose step is rectified for the variance of the second moment's early estimates.

    m <- beta1 m + (1 - beta1) g                      v <- beta2 v + (1 - beta2) g^2
    rho_t > 5:   p <- p - lr r_t (m / (1 - beta1^t)) sqrt(1 - beta2^t) / (sqrt(v) + eps)
    else:        p <- p - lr m / (1 - beta1^t)

with ``g + weight_decay p`` in place of ``g``, or ``p (1 - lr weight_decay)`` in place of ``p`` if decoupled. As in
torch, eps stands outside the bias correction and the threshold is 5. See `metaopt.numerics.rectification` for ``r_t``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.moments import Moments, Scale, domains
from metaopt.functional.optimizer import Params
from metaopt.functional.values import Once
from metaopt.numerics import one_minus_power, rectification


class RAdamState(NamedTuple):
    step: Params
    exp_avg: Params
    exp_avg_sq: Params


class RAdam(Moments[RAdamState]):
    State = RAdamState
    # Above 2/3, or no step is ever rectified (rho_inf <= 5) and beta2 has no effect.
    domains = domains(beta2=constraints.interval(2 / 3, 1.0))

    def scale(self, once: Once, step: Tensor, beta2: Tensor, eps: Tensor) -> Scale:
        rectified, factor = once(rectification, beta2, step)
        adaptive = once(_adaptive_scale, once(one_minus_power, beta2, step), rectified, factor)
        # Where a step is not rectified, m / (sqrt(v) + eps) is computed and not used: it must still be finite.
        return Scale(adaptive, torch.where(rectified, eps, 1.0), root_correction=None, rectified=rectified)


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
