"""Scalar maths that stays exact and finite where the textbook formula does not.

Three places in the Adam family break under autograd: the square root at 0 (infinite slope), ``1 - beta**t`` at
beta near 0 (``log 0``) or near 1 (cancellation), and RAdam's rectification, whose square root has a negative argument
in the first steps. A ``where`` around the finished value does not help, because ``0 * inf`` in the backward pass is
NaN; each function here moves the argument to a harmless place first, and selects afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of ``x >= 0`` whose derivative at 0 is 0 in place of infinity.

    Args:
        x: any shape, floating point.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> safe_sqrt(x).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.2500])
    """
    zero = x == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))


def one_minus_power(base: Tensor, exponent: Tensor) -> Tensor:
    """``1 - base**exponent`` for a base in [0, 1) and an exponent >= 1, without cancellation as base nears 1.

    Args:
        base: any shape, floating point; float64 for full accuracy.
        exponent: broadcasts against ``base``; carries no derivative.

    Example:
        >>> one_minus_power(torch.tensor(1 - 2**-50, dtype=torch.float64), torch.tensor(4.0)).item() * 2**50
        3.99999999999999...
    """
    # Below 1/2 the plain power cancels nothing, and has the right derivative down to 0, which exp(t log b) has not.
    cancels = base > 0.5
    log_base = torch.log(torch.where(cancels, base, 0.75))
    return torch.where(cancels, -torch.expm1(exponent * log_base), 1.0 - base**exponent)


def rectification(beta2: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """RAdam's variance rectification: whether step ``t`` is rectified, and the factor ``r_t``.

    ``rho_inf = 2 / (1 - beta2) - 1``, ``rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)`` and, where ``rho_t > 5``,
    ``r_t = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))``; elsewhere the factor is 1 with
    derivative 0.

    Args:
        beta2: any shape, float64, in [0, 1).
        step: the count of this step, from 1; broadcasts against ``beta2``.

    References:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, ICLR 2020, eq. 5 and algorithm 2
        (with torch's threshold of 5 in place of 4).

    Example:
        >>> beta2 = torch.tensor(0.999, dtype=torch.float64)
        >>> [bool(rectification(beta2, torch.tensor(t))[0]) for t in (5, 6)]
        [False, True]
    """
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    one_minus = one_minus_power(beta2, step)
    rho = rho_inf - 2.0 * step * (1.0 - one_minus) / one_minus
    rectified = rho > 5.0
    rho = torch.where(rectified, rho, 6.0)
    # rho_inf too: for 1/3 < beta2 <= 0.6 the product (rho_inf - 4)(rho_inf - 2) is negative or 0.
    rho_inf = torch.where(rectified, rho_inf, 19.0)
    squared = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    return rectified, torch.where(rectified, torch.sqrt(squared), 1.0)
