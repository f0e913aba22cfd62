r"""Rprop: each element has its own step size, which grows while the gradient keeps its sign and shrinks when it flips.

    s      <- sign(g prev)
    size   <- clamp(size * (eta+ if s > 0, eta- if s < 0, else 1), min, max)
    g      <- 0 where s < 0
    p      <- p - sign(g) size,   prev <- g

This is torch's variant, iRprop-: after a flip the step is left out and not taken back. The learning rate is the
initial step size and nothing else. A sign has no derivative, so a hypergradient flows through ``size`` alone: an unroll
needs no second-order graph, and loses nothing by that.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.optimizer import Elementwise, Params
from metaopt.functional.rprop_step import Inputs, rprop_step
from metaopt.functional.values import Domain, Once, OpenInterval


class RpropState(NamedTuple):
    step: Params
    prev: Params
    step_size: Params


class _Coefficients(NamedTuple):
    eta_minus: Tensor
    eta_plus: Tensor
    smallest: Tensor
    largest: Tensor


class Rprop(Elementwise[RpropState]):
    State = RpropState
    differentiates_gradients = False
    domains: ClassVar = {
        "lr": Domain(constraints.greater_than_eq(0.0), constraints.positive),
        "etas": Domain(
            (OpenInterval(0.0, 1.0), constraints.greater_than(1.0)),
            (constraints.unit_interval, constraints.greater_than(1.0)),
        ),
        "step_sizes": Domain(
            (constraints.greater_than_eq(0.0), constraints.greater_than_eq),
            (constraints.positive, constraints.greater_than),
        ),
    }

    def init_leaf(self, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        lr = values[0]
        return torch.zeros_like(param), torch.zeros_like(param) + lr.to(param.dtype)

    def coefficients(self, once: Once, step: Tensor, *values: Tensor) -> _Coefficients:
        _, eta_minus, eta_plus, smallest, largest = values
        # An infinite factor is allowed, and leads to the largest step size; but it is also multiplied by 0.
        return _Coefficients(eta_minus, eta_plus.clamp(max=torch.finfo(torch.float32).max), smallest, largest)

    def update(self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], c: Any) -> tuple[Tensor, ...]:
        ascent = -grad if self.flags["maximize"] else grad
        return rprop_step(Inputs(param, ascent, *state, *c))


def rprop(
    lr: Any = 1e-2,
    etas: Any = (0.5, 1.2),
    step_sizes: Any = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> Rprop:
    """Rprop with the arguments and the numbers of ``torch.optim.Rprop``, differentiable in all of them.

    Args:
        lr: initial step size, >= 0; read by ``init`` only.
        etas: factors (minus, plus) by which a step size shrinks and grows, 0 < minus < 1 < plus.
        step_sizes: the smallest and the largest step size, 0 <= smallest <= largest.
        maximize: ascend.

    Each hyperparameter may be a number, a tensor that broadcasts against the parameter, a mapping from parameter name
    to these, or a callable of the number of steps taken.

    Raises:
        TypeError, ValueError: a value of a wrong form or outside its domain.

    Note:
        Where a step size is clamped, its derivative goes to the bound and none to lr and the etas.

    Example:
        >>> opt = rprop(lr=0.1)
        >>> params = torch.tensor([1.0, -1.0])
        >>> state = opt.init(params)
        >>> for _ in range(2):
        ...     params, state = opt.step(params, 2 * params, state)
        >>> params, state.step_size  # .1 + .12 nearer to 0
        (tensor([ 0.7800, -0.7800]), tensor([0.1200, 0.1200]))

    References:
        Riedmiller & Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm, 1993.
        Igel & Hüsken, Improving the Rprop Learning Algorithm, 2000 (iRprop-).
    """
    return Rprop({"maximize": maximize}, {"lr": lr, "etas": etas, "step_sizes": step_sizes})
