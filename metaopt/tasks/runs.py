"""Several runs side by side: of one task, or of many that differ by a configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, final

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from metaopt.checks import check_count
from metaopt.tasks.task import Batch, Params, Task, Values


class Runs(ABC):
    """A task of several runs: parameters and batches have a leading dimension, with an entry for each.

    Every run trains on its own; the losses are means over runs.

    Attributes:
        config: in what the runs differ, a pytree of tensors with that dimension; empty if it is in their randomness.
        key: equal for runs that differ in their configuration alone.
        count: how many they are.
    """

    config: Any = ()
    key: Hashable
    count: int

    @abstractmethod
    def single(self, config: Any) -> Task:
        """The task of the run with this configuration, which has lost the leading dimension."""

    @abstractmethod
    def with_config(self, config: Any) -> Runs:
        """The same with other tensors as configuration."""

    @abstractmethod
    def init(self, generator: Generator | None) -> Params:
        """Fresh parameters of each run."""

    @abstractmethod
    def batch(self, step: int, generator: Generator | None) -> Batch:
        """What each run trains on in inner step ``step``."""

    @final
    def loss(self, params: Params, batch: Batch, hyper: Values) -> Tensor:
        """The mean inner loss. A run trains on the gradient of its own, not of the mean; see `metaopt.unroll`."""
        return torch.vmap(lambda c, p, b: self.single(c).loss(p, b, hyper))(self.config, params, batch).mean()

    @final
    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        """The mean outer loss."""
        return torch.vmap(lambda c, p: self.single(c).meta_loss(p, hyper))(self.config, params).mean()


class Replicas(Runs):
    """Several independent runs of one task: own initialisations, own batches.

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
        check_count("count", count)
        self.task = task
        self.count = count
        self.key = self

    def single(self, config: Any) -> Task:
        return self.task

    def with_config(self, config: Any) -> Replicas:
        return self

    def init(self, generator: Generator | None) -> Params:
        return stack([self.task.init(generator) for _ in range(self.count)])

    def batch(self, step: int, generator: Generator | None) -> Batch:
        return stack([self.task.batch(step, generator) for _ in range(self.count)])


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one tree, with a leading dimension."""
    first, spec = pytree.tree_flatten(trees[0])
    if not first:
        return trees[0]
    if not all(isinstance(leaf, torch.Tensor) for leaf in first):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in first}))
        raise TypeError(
            f"parameters and batches of runs side by side must be pytrees of tensors (() for none), got leaves: {kinds}"
        )
    columns = zip(*(pytree.tree_leaves(tree) for tree in trees), strict=True)
    return pytree.tree_unflatten([torch.stack(column) for column in columns], spec)
