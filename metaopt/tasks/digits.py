"""Handwritten digits: 1,797 real 8x8 images that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from metaopt.tasks.classification import Classification, Split, Splits


@lru_cache(maxsize=1)
def load_digits() -> Splits:
    """The three splits (1,000 / 397 / 400 images), drawn once and for all.

    Images have shape (n, 1, 8, 8) and values in [0, 1].

    Raises:
        ImportError: scikit-learn is not installed.

    References:
        Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError("the digits come with scikit-learn: pip install 'metaopt[data]'") from None
    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)[order]
    sizes = [1000, 397, 400]
    return Splits(*(Split(*part) for part in zip(images.split(sizes), labels.split(sizes), strict=True)))


def mlp(hidden: int = 32) -> nn.Module:
    """64-32-10 with tanh: 2,410 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


def convnet(channels: int = 8) -> nn.Module:
    """Two 3x3 convolutions with pooling and a linear layer: 1,898 weights."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 4, 10),
    )


class Digits(Classification):
    """Classification of digits: the inner loss on training batches, the meta-loss on the validation split.

    Args:
        network: makes the model, with buffers (if any) that training does not change.
        batch_size: images per inner step, drawn with replacement.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: ``batch_size`` is below 1.

    Example:
        >>> task = Digits(batch_size=64)
        >>> params = task.init(torch.Generator().manual_seed(0))
        >>> list(params)
        ['1.weight', '1.bias', '3.weight', '3.bias']
        >>> task.meta_loss(params, {}).item() > 2
        True
    """

    def __init__(self, network: Callable[[], nn.Module] = mlp, batch_size: int = 128) -> None:
        super().__init__(load_digits(), network, batch_size)
