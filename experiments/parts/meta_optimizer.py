"""The meta-optimizer of the studies: Adam, its learning rate annealed and its gradients clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def annealed_adam(
    hyper: nn.Module, lr: float, steps: int, clip: float, betas: tuple[float, float] = (0.9, 0.999)
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.CosineAnnealingLR]:
    """Adam over the parameters of ``hyper``, which clips before every step; and the annealing of its learning rate.

    Args:
        hyper: what is learned.
        lr: at the first step; it falls to 0 along a cosine.
        steps: meta-steps until then.
        clip: largest norm of a meta-gradient; one that is not finite raises torch's RuntimeError.
        betas: Adam's.
    """
    optimizer = torch.optim.Adam(hyper.parameters(), lr=lr, betas=betas)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def clipped(*_: Any) -> None:
        nn.utils.clip_grad_norm_(hyper.parameters(), clip, error_if_nonfinite=True)

    optimizer.register_step_pre_hook(clipped)
    return optimizer, annealing
