"""``torch.optim.RAdam`` with a differentiable step that is right, and a fused one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from metaopt import functional
from metaopt.optim.base import DropIn


class RAdam(DropIn, torch.optim.RAdam):
    """Drop-in for ``torch.optim.RAdam``: what is neither differentiable nor fused is torch's own code.

    With ``differentiable=True`` every hyperparameter may be a tensor (0-d, or one that broadcasts against the
    parameters), autograd reaches all of them, and any number of steps can be unrolled. Parameters are then non-leaf
    tensors that are updated in place, so a loss that saves them reads ``p.clone()``.

    Args:
        params: as in torch: tensors, named tensors, or groups.
        lr: learning rate, >= 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: >= 0.
        decoupled_weight_decay: shrink the parameters rather than add an L2 penalty.
        foreach, maximize, capturable, differentiable: as in torch.
        fused: one pass over memory for all parameters. None takes it for CUDA parameters of floating point where
            neither ``foreach`` nor ``differentiable`` is set; True always (on a CPU it needs ``metaopt[fused]``); False
            never. A group may set ``"state_dtype": torch.float32`` to keep its state in that precision beside
            half-precision parameters.

    Raises:
        ValueError: a hyperparameter outside its domain.
        RuntimeError: ``fused=True`` together with ``foreach`` or ``differentiable``; in ``step``, if it cannot run.

    Example:
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> start = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> p = start.clone()
        >>> optimizer = RAdam([p], lr=lr, differentiable=True)
        >>> for _ in range(8):
        ...     p.grad, = torch.autograd.grad(p.clone().square().sum(), p, create_graph=True)
        ...     optimizer.step()
        >>> p.sum().backward()
        >>> bool(lr.grad < 0)
        True

    References:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, ICLR 2020.
    """

    _torch_class = torch.optim.RAdam
    _functional = staticmethod(functional.radam)
    _algorithm = "radam"
    _state_keys = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._construct(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "decoupled_weight_decay": decoupled_weight_decay,
                "differentiable": differentiable,
            },
            fused,
        )

    def _fused_arguments(self, group: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, bool]]:
        values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        return values, {"maximize": group["maximize"], "decoupled": group["decoupled_weight_decay"]}
