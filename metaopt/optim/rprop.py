"""``torch.optim.Rprop`` with a differentiable step that is right, and a fused one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from metaopt import functional
from metaopt.optim.base import DropIn


class Rprop(DropIn, torch.optim.Rprop):
    """Drop-in for ``torch.optim.Rprop``: what is neither differentiable nor fused is torch's own code.

    With ``differentiable=True`` every hyperparameter may be a tensor (0-d, or one that broadcasts against the
    parameters), autograd reaches all of them, and any number of steps can be unrolled. Parameters are then non-leaf
    tensors that are updated in place, so a loss that saves them reads ``p.clone()``. A gradient needs no graph of its
    own (``create_graph``): its sign has no derivative.

    Args:
        params: as in torch: tensors, named tensors, or groups.
        lr: initial step size, >= 0.
        etas: factors (minus, plus) by which a step size shrinks and grows, 0 < minus < 1 < plus.
        step_sizes: the smallest and the largest step size.
        foreach, maximize, capturable, differentiable: as in torch.
        fused: one pass over memory for all parameters. None takes it for CUDA parameters of floating point where
            neither ``foreach`` nor ``differentiable`` is set; True always (on a CPU it needs ``metaopt[fused]``); False
            never. A group may set ``"state_dtype": torch.float32`` to keep its state in that precision beside
            half-precision parameters.

    Raises:
        ValueError: a hyperparameter outside its domain.
        RuntimeError: ``fused=True`` together with ``foreach`` or ``differentiable``; in ``step``, if it cannot run.

    Example:
        >>> etas = (torch.tensor(0.5), torch.tensor(1.2, requires_grad=True))
        >>> p = torch.tensor([1.0], requires_grad=True).clone()
        >>> optimizer = Rprop([p], lr=0.1, etas=etas, differentiable=True)
        >>> for _ in range(3):  # step sizes .1, .1 eta+, .1 eta+^2
        ...     p.grad, = torch.autograd.grad(p.clone().square().sum(), p)
        ...     optimizer.step()
        >>> p.sum().backward()
        >>> etas[1].grad  # - (.1 + .2 eta+)
        tensor(-0.3400)

    References:
        Riedmiller & Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm, 1993.
    """

    _torch_class = torch.optim.Rprop
    _functional = staticmethod(functional.rprop)
    _algorithm = "rprop"
    _state_keys = ("prev", "step_size")

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-2,
        etas: tuple[Any, Any] = (0.5, 1.2),
        step_sizes: tuple[Any, Any] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._construct(
            params,
            {
                "lr": lr,
                "etas": etas,
                "step_sizes": step_sizes,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "capturable": capturable,
            },
            fused,
        )

    def _fused_arguments(self, group: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, bool]]:
        return (*group["etas"], *group["step_sizes"]), {"maximize": group["maximize"]}
