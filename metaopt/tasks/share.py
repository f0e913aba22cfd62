"""Some of several runs: what one of many processes trains of all that every process draws alike."""

from __future__ import annotations

import copy
from typing import Any, final

from torch import Generator
from torch.utils import _pytree as pytree

from metaopt.tasks.runs import Runs
from metaopt.tasks.task import Batch, Params, Task


@final
class SomeRuns(Runs):
    """Some of several runs. Those that are left out are drawn too, and dropped: these draw what they would all draw.

    Args:
        whole: all of them.
        rows: which are trained: a range without gaps.

    Attributes:
        whole, rows: these.

    Example:
        >>> import torch, metaopt
        >>> all_four = metaopt.tasks.Replicas(metaopt.tasks.NoisyQuadratic(dimension=3), count=4)
        >>> last_two = SomeRuns(all_four, range(2, 4))
        >>> one, other = (runs.init(torch.Generator().manual_seed(0)) for runs in (all_four, last_two))
        >>> torch.equal(one[2:], other)
        True
    """

    def __init__(self, whole: Runs, rows: range) -> None:
        self.whole, self.rows, self.count = whole, rows, len(rows)
        self.config = self._of(whole.config)
        self.key = (whole.key, rows.start, rows.stop)

    def single(self, config: Any) -> Task:
        return self.whole.single(config)

    def with_config(self, config: Any) -> SomeRuns:
        """With another configuration of these rows; what is drawn is not touched by it."""
        other = copy.copy(self)
        other.config = config
        return other

    def init(self, generator: Generator | None) -> Params:
        return self._of(self.whole.init(generator))

    def batch(self, step: int, generator: Generator | None) -> Batch:
        return self._of(self.whole.batch(step, generator))

    def _of(self, tree: Any) -> Any:
        return pytree.tree_map(lambda tensor: tensor[self.rows.start : self.rows.stop], tree)


def whole(task: Task) -> Task:
    """All runs, if these are some; else the task itself."""
    return task.whole if isinstance(task, SomeRuns) else task
