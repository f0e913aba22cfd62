"""What a task is: something to train, and a judgement of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

Params = Any  # a pytree of tensors
Batch = Any  # a pytree of tensors
Values = Mapping[str, Any]


@runtime_checkable
class Task(Protocol):
    """What is learned on.

    Randomness enters through ``init`` and ``batch`` alone (a dropout mask is drawn there), so that ``loss`` and
    ``meta_loss`` are pure and can be vmapped and compiled.
    """

    def init(self, generator: Generator | None) -> Params:
        """Fresh parameters: a pytree of tensors. None is torch's default generator."""

    def batch(self, step: int, generator: Generator | None) -> Batch:
        """What inner step ``step`` (from 0) trains on: a pytree of tensors."""

    def loss(self, params: Params, batch: Batch, hyper: Values) -> Tensor:
        """The inner loss, 0-d. ``hyper`` holds all values, also those that are not the optimizer's."""

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        """The outer loss, 0-d."""


class Replicas:
    """Several independent runs of one task, side by side: own initialisations, own batches, one meta-loss.

    The hypergradient of a single run depends on its seed; the mean over a few is a better direction, and vmap makes it
    cheap. Parameters and batches have a leading dimension of ``count``.

    Args:
        task: what is run.
        count: how many times, >= 1.

    Raises:
        ValueError: ``count`` is below 1.

    Example:
        >>> import metaopt
        >>> task = Replicas(metaopt.tasks.NoisyQuadratic(dimension=3), count=4)
        >>> task.init(None).shape
        torch.Size([4, 3])
    """

    def __init__(self, task: Task, count: int) -> None:
        if count < 1:
            raise ValueError(f"count must be >= 1, got count={count}")
        self.task = task
        self.count = count

    def init(self, generator: Generator | None) -> Params:
        return _stack([self.task.init(generator) for _ in range(self.count)])

    def batch(self, step: int, generator: Generator | None) -> Batch:
        return _stack([self.task.batch(step, generator) for _ in range(self.count)])

    def loss(self, params: Params, batch: Batch, hyper: Values) -> Tensor:
        """The mean inner loss. Its gradient is ``1 / count`` of what each run trains on; see `metaopt.unroll`."""
        return torch.vmap(lambda p, b: self.task.loss(p, b, hyper))(params, batch).mean()

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        return torch.vmap(lambda p: self.task.meta_loss(p, hyper))(params).mean()


def _stack(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
