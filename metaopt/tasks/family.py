"""Families of tasks: what a meta-learner meets is one of many, and each is a configuration.

tasks = metaopt.tasks.TaskBatch(family, 25)                       # new tasks for every meta-gradient
held_out = metaopt.tasks.Tasks(family, family.sample(100, generator))   # always these
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator
from torch.utils import _pytree as pytree

from metaopt.checks import check_count
from metaopt.tasks.runs import Runs
from metaopt.tasks.share import SomeRuns
from metaopt.tasks.task import Batch, Params, Task

Config = Any  # a pytree of tensors


@runtime_checkable
class TaskFamily(Protocol):
    """A distribution over tasks.

    The methods of a task that it makes are vmapped over configurations: torch functions of tensors, without Python
    branches on their values. Random draws in ``init`` and ``batch`` (``torch.rand``, ``randn``, ``randint``,
    ``randperm``, ``multinomial`` with the generator) differ between tasks.
    """

    def sample(self, count: int, generator: Generator | None) -> Config:
        """``count`` configurations: a pytree of tensors with a leading dimension of ``count``."""

    def task(self, config: Config) -> Task:
        """The task of one configuration, which has lost that dimension."""


class Tasks(Runs):
    """Given tasks of a family, trained side by side.

    Args:
        family: what they are tasks of.
        config: their configurations, as ``family.sample`` returns them: with a leading dimension.

    Raises:
        TypeError: what is not a pytree of tensors.
        ValueError: tensors that differ in the leading dimension, or none.

    Example:
        >>> import metaopt
        >>> family = metaopt.tasks.RandomQuadratics(dimension=3)
        >>> tasks = Tasks(family, family.sample(4, torch.Generator().manual_seed(0)))
        >>> tasks.count, tasks.init(None).shape
        (4, torch.Size([4, 3]))
    """

    def __init__(self, family: TaskFamily, config: Config) -> None:
        leaves = pytree.tree_leaves(config)
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
            raise TypeError(f"config must be a pytree of tensors, got leaves: {kinds}")
        shapes = [tuple(tensor.shape) for tensor in leaves]
        if not shapes or len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or shapes[0][0] < 1:
            raise ValueError(f"config must hold tensors with one leading dimension >= 1, got shapes {shapes}")
        self.family = family
        self.config = config
        self.count = shapes[0][0]
        self.key = (family, self.count)

    def single(self, config: Config) -> Task:
        return self.family.task(config)

    def with_config(self, config: Config) -> Tasks:
        return Tasks(self.family, config)

    def init(self, generator: Generator | None) -> Params:
        draw = torch.vmap(lambda config: self.single(config).init(generator), randomness="different")
        return draw(self.config)

    def batch(self, step: int, generator: Generator | None) -> Batch:
        draw = torch.vmap(lambda config: self.single(config).batch(step, generator), randomness="different")
        return draw(self.config)


class TaskBatch:
    """New tasks of a family for every unroll: what an estimator of meta-gradients draws from.

    Args:
        family: the distribution over tasks.
        count: how many at once, >= 1; the meta-loss is their mean.

    Attributes:
        rows: which of those that are drawn are trained here, where several processes share them; None for all.

    Raises:
        ValueError: ``count`` is below 1.

    Example:
        >>> import metaopt
        >>> tasks = TaskBatch(metaopt.tasks.RandomQuadratics(dimension=3), count=8)
        >>> opt = metaopt.functional.sgd(lr=0.01)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> loss = metaopt.metagrad.Unrolled(steps=5).backward(tasks, opt, hyper, torch.Generator().manual_seed(0))
        >>> hyper.lr.grad.item() < 0
        True
    """

    rows: range | None = None

    def __init__(self, family: TaskFamily, count: int) -> None:
        check_count("count", count)
        self.family = family
        self.count = count

    def draw(self, generator: Generator | None) -> Runs:
        """Tasks to train on."""
        tasks = Tasks(self.family, self.family.sample(self.count, generator))
        if tasks.count != self.count:
            raise ValueError(f"sample(count={self.count}) of the family returned {tasks.count} configurations")
        return tasks if self.rows is None else SomeRuns(tasks, self.rows)


def drawn(task: Task | TaskBatch, generator: Generator | None) -> Task:
    """What one unroll trains: a task as it is, or fresh ones of a family."""
    return task.draw(generator) if isinstance(task, TaskBatch) else task
