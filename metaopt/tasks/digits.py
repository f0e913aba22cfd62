"""Handwritten digits: 1,797 real 8x8 images that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from metaopt.tasks.task import Values

Params = dict[str, Tensor]


class Split(NamedTuple):
    """Images of shape (n, 1, 8, 8) with values in [0, 1], and labels of shape (n,)."""

    images: Tensor
    labels: Tensor


class DigitsData(NamedTuple):
    train: Split
    validation: Split
    test: Split


@lru_cache(maxsize=1)
def load_digits() -> DigitsData:
    """The three splits (1,000 / 397 / 400 images), drawn once and for all.

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
    return DigitsData(*(Split(*part) for part in zip(images.split(sizes), labels.split(sizes), strict=True)))


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


class Digits:
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
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got batch_size={batch_size}")
        self.data = load_digits()
        self.network = network
        self.batch_size = batch_size
        with torch.random.fork_rng(devices=[]):
            self._model = network()

    def init(self, generator: Generator | None) -> Params:
        """The network's own initialisation (torch's), seeded from the generator."""
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network()
        return {name: p.detach() for name, p in model.named_parameters()}

    def batch(self, step: int, generator: Generator | None) -> Split:
        index = torch.randint(len(self.data.train.labels), (self.batch_size,), generator=generator)
        return Split(self.data.train.images[index], self.data.train.labels[index])

    def logits(self, params: Params, images: Tensor) -> Tensor:
        """Shape (n, 10) for images of shape (n, 1, 8, 8)."""
        logits: Tensor = torch.func.functional_call(self._model, params, (images,))
        return logits

    def loss(self, params: Params, batch: Split, hyper: Values) -> Tensor:
        return nn.functional.cross_entropy(self.logits(params, batch.images), batch.labels)

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        return self.loss(params, self.data.validation, hyper)

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, Tensor]:
        """``loss`` and ``accuracy`` on the test split, both 0-d."""
        logits = self.logits(params, self.data.test.images)
        accuracy = (logits.argmax(-1) == self.data.test.labels).float().mean()
        return {"loss": nn.functional.cross_entropy(logits, self.data.test.labels), "accuracy": accuracy}
