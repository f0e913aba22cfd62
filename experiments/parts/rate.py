"""A learning rate that is learned as it is, not by its logarithm: what studies of additive updates do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rate(nn.Module):
    """The learning rate as a parameter, for the optimizers that call it ``lr``.

    Args:
        start: its first value.

    Example:
        >>> Rate(0.5)()
        {'lr': Parameter containing: tensor(0.5000, dtype=torch.float64, requires_grad=True)}
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self) -> dict[str, Tensor]:
        return {"lr": self.lr}

    def numbers(self) -> dict[str, float]:
        return {"lr": self.lr.item()}
