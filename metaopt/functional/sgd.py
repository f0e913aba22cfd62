r"""Stochastic gradient descent with momentum.

    b <- momentum b + (1 - dampening) g    (the first time: b <- g)
    p <- p - lr b                          (nesterov: p <- p - lr (g + momentum b))

with ``g + weight_decay p`` in place of ``g``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from metaopt.functional.optimizer import Elementwise, Params
from metaopt.functional.values import ZERO, Domain, Once

_NON_NEGATIVE = constraints.greater_than_eq(0.0)


class SGDState(NamedTuple):
    step: Params
    momentum_buffer: Params


class _Coefficients(NamedTuple):
    lr: Tensor
    momentum: Tensor | None
    keep: Tensor | None
    weight_decay: Tensor | None


class SGD(Elementwise[SGDState]):
    State = SGDState
    domains: ClassVar = {
        "lr": Domain(_NON_NEGATIVE, constraints.positive),
        "momentum": Domain(_NON_NEGATIVE, constraints.unit_interval),
        "dampening": Domain(constraints.real, constraints.real),
        "weight_decay": Domain(_NON_NEGATIVE, constraints.nonnegative),
    }

    def __init__(self, flags: Mapping[str, bool], defaults: Mapping[str, Any]) -> None:
        super().__init__(flags, defaults)
        momentum, dampening = defaults["momentum"], defaults["dampening"]
        lacks_momentum = isinstance(momentum, Real) and momentum == 0
        if flags["nesterov"] and (lacks_momentum or (isinstance(dampening, Real) and dampening != 0)):
            raise ValueError(
                "nesterov=True requires a momentum > 0 and zero dampening, "
                f"got momentum={momentum} and dampening={dampening}"
            )

    def init_leaf(self, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros_like(param),)

    def coefficients(self, once: Once, step: Tensor, *values: Tensor) -> _Coefficients:
        lr, momentum, dampening, weight_decay = values
        keep = None
        if momentum is not ZERO and dampening is not ZERO:
            # torch dampens neither the first gradient nor, leaving the buffer out, any at a momentum of exactly 0.
            keep = torch.where((step == 1) | (momentum == 0), 1.0, 1.0 - dampening)
            momentum = _without_derivative(momentum, (momentum == 0) & (dampening != 0))
        return _Coefficients(
            lr=lr,
            momentum=None if momentum is ZERO else momentum,
            keep=keep,
            weight_decay=None if weight_decay is ZERO else weight_decay,
        )

    def update(self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], c: Any) -> tuple[Tensor, ...]:
        (buffer,) = state
        if self.flags["maximize"]:
            grad = -grad
        if c.weight_decay is not None:
            grad = grad + c.weight_decay * param
        if c.momentum is None:
            return param - c.lr * grad, grad
        buffer = c.momentum * buffer + (grad if c.keep is None else c.keep * grad)
        direction = grad + c.momentum * buffer if self.flags["nesterov"] else buffer
        return param - c.lr * direction, buffer


def _without_derivative(x: Tensor, where: Tensor) -> Tensor:
    """``x``, whose derivative does not exist ``where``: asking for it raises, or is NaN where nothing can be read."""
    # The slope of sqrt(0 x) is infinity times 0; the value is 0, and the rest of the graph stays untouched.
    root = torch.sqrt(torch.where(where, x * 0.0, 1.0))
    x = x + torch.where(where, root, 0.0)
    if x.requires_grad and not torch.compiler.is_compiling():
        x.register_hook(_refuse_where(where))
    return x


def _refuse_where(where: Tensor) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        try:
            refused = bool(where.any())
        except RuntimeError:  # batched by vmap: the NaN speaks
            return
        if refused:
            raise RuntimeError(
                "SGD with dampening is discontinuous at momentum=0 (torch leaves the buffer out there), "
                "so it has no derivative with respect to momentum; use dampening=0 or a momentum > 0"
            )

    return hook


def sgd(
    lr: Any = 1e-3,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> SGD:
    """SGD with the arguments and the numbers of ``torch.optim.SGD``, differentiable in all of them.

    Args:
        lr: learning rate, >= 0.
        momentum: >= 0.
        dampening: the share of a gradient that does not enter the momentum buffer.
        weight_decay: L2 penalty, >= 0.
        nesterov: look one step ahead.
        maximize: ascend.

    Each hyperparameter may be a number, a tensor that broadcasts against the parameter, a mapping from parameter name
    to these, or a callable of the number of steps taken.

    Raises:
        TypeError, ValueError: a value of a wrong form or outside its domain; nesterov without momentum, or with
            dampening.
        RuntimeError: in the backward pass, for the derivative with respect to a momentum of 0 with dampening.

    Note:
        The state at momentum 0 is the limit from above (the buffer holds the last gradient), so that the derivative at
        0 exists. torch keeps no buffer there: the two differ for a momentum that changes from 0 to another value in
        mid-training.

    Example:
        >>> opt = sgd(lr=0.1, momentum=0.9)
        >>> params, state = torch.tensor([1.0]), opt.init(torch.tensor([1.0]))
        >>> for _ in range(2):
        ...     params, state = opt.step(params, params, state)
        >>> params  # 1 - .1, then - .1 (.9 + .9 * 1)
        tensor([0.7200])

    References:
        Sutskever et al., On the Importance of Initialization and Momentum in Deep Learning, ICML 2013.
    """
    return SGD(
        {"nesterov": nesterov, "maximize": maximize},
        {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay},
    )
