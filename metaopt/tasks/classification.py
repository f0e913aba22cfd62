"""Classification of a fixed data set: the task, whatever the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from metaopt.tasks.task import Values

Params = dict[str, Tensor]


class Split(NamedTuple):
    """Images of shape (n, 1, height, width) or signals of shape (n, length), and labels of shape (n,)."""

    images: Tensor
    labels: Tensor


class Splits(NamedTuple):
    train: Split
    validation: Split
    test: Split


class Classification:
    """Classification: the inner loss on training batches, the meta-loss on the validation split.

    Args:
        data: three splits, inputs of shape (n, ...) and labels of shape (n,).
        network: makes the model, with buffers (if any) that training does not change.
        batch_size: examples per inner step.
        order: "random" draws them with replacement; "sequential" takes them as they come, step after step, and begins
            anew at the end.

    Raises:
        ValueError: ``batch_size`` is below 1, or ``order`` is neither.

    Example:
        >>> data = Split(torch.randn(6, 2), torch.arange(6) % 3)
        >>> task = Classification(Splits(data, data, data), lambda: nn.Linear(2, 3), batch_size=4, order="sequential")
        >>> task.batch(1, None).labels
        tensor([1, 2, 0, 1])
        >>> sorted(task.test(task.init(None)))
        ['accuracy', 'loss']
    """

    _tied = True  # of objects that were pickled without it

    def __init__(
        self,
        data: Splits,
        network: Callable[[], nn.Module],
        batch_size: int = 128,
        order: Literal["random", "sequential"] = "random",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got batch_size={batch_size}")
        if order not in ("random", "sequential"):
            raise ValueError(f"order must be 'random' or 'sequential', got order={order!r}")
        self.data = data
        self.network = network
        self.batch_size = batch_size
        self.order = order
        with torch.random.fork_rng(devices=[]):
            self._model = network()
        # Looking for parameters under two names takes a tenth of a small network's time, at every call.
        names = self._model.named_parameters(remove_duplicate=False)
        self._tied = len(list(names)) != len(list(self._model.parameters()))

    def init(self, generator: Generator | None) -> Params:
        """The network's own initialisation (torch's), seeded from the generator."""
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network()
        return {name: p.detach() for name, p in model.named_parameters()}

    def batch(self, step: int, generator: Generator | None) -> Split:
        rows = len(self.data.train.labels)
        if self.order == "random":
            index = torch.randint(rows, (self.batch_size,), generator=generator)
        else:
            index = (step * self.batch_size + torch.arange(self.batch_size)) % rows
        return Split(self.data.train.images[index], self.data.train.labels[index])

    def logits(self, params: Params, images: Tensor) -> Tensor:
        """Shape (n, classes) for inputs of shape (n, ...)."""
        logits: Tensor = torch.func.functional_call(self._model, params, (images,), tie_weights=self._tied)
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
