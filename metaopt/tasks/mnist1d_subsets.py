"""Small tasks out of MNIST-1D: some of its classes, some of its rows, in some order of the points."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from metaopt.tasks.few_shot import FewShot
from metaopt.tasks.mnist1d import load_mnist1d
from metaopt.tasks.network import Dense


@lru_cache(maxsize=2)
def _bank(split: Literal["train", "test"]) -> Tensor:
    """Shape (10, n, 40): the first n rows of each class, n being what the smallest class has."""
    images, labels = getattr(load_mnist1d(), split)
    size = int(labels.bincount().min())
    return torch.stack([images[labels == label][:size] for label in range(10)])


class MNIST1DSubsets(FewShot):
    """Tasks of ``ways`` classes and ``shots`` rows of each out of MNIST-1D, for a network with one hidden layer (tanh).

    Args:
        split: "train" draws from the 4,000 training rows, "test" from the 1,000 test rows, which gives new tasks.
        ways: classes of a task.
        shots: rows of each class for the inner loss.
        queries: other rows of each class, for the meta-loss.
        batch_size: support rows per inner step, drawn with replacement; None for all of them.
        permute: each task sees the 40 points in an order of its own.
        hidden: units of the hidden layer.

    Raises:
        ValueError: an unknown ``split``, a number below 1, or more classes or rows than there are.

    Example:
        >>> family = MNIST1DSubsets(ways=3, shots=10, queries=20)
        >>> family.sample(4, None).query.images.shape
        torch.Size([4, 60, 40])

    References:
        Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D, ICML 2024, for the data.
    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        ways: int = 5,
        shots: int = 40,
        queries: int = 40,
        batch_size: int | None = 32,
        permute: bool = True,
        hidden: int = 32,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got split={split!r}")
        bank = _bank(split)
        network = Dense(bank.shape[-1], hidden, ways, activation=torch.tanh)
        super().__init__(bank, network, ways, shots, queries, batch_size, permute)
