"""Where an unroll stands that outlasts a call."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Generator, nn

from metaopt.functional import Optimizer
from metaopt.tasks import Task, TaskBatch
from metaopt.tasks.family import drawn
from metaopt.unroll.program import Tensors


class Ongoing(NamedTuple):
    """An unroll between two windows.

    Attributes:
        owners: the task, optimizer and hyper that it is an unroll of.
        task: what is trained, drawn from the first of them.
        params: where it started.
        carry: where it is, cut off; None at the start.
        step: the next inner step.
    """

    owners: tuple[Any, ...]
    task: Task
    params: Any
    carry: Tensors | None
    step: int

    @staticmethod
    def begin(task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None) -> Ongoing:
        """A fresh one."""
        trained = drawn(task, generator)
        return Ongoing((task, opt, hyper), trained, trained.init(generator), None, 0)

    def at(self, carry: Tensors, step: int, horizon: int) -> Ongoing | None:
        """The same further on; None at the end."""
        return self._replace(carry=carry, step=step) if step < horizon else None


class _Owned(Protocol):
    @property
    def owners(self) -> tuple[Any, ...]: ...


OwnedT = TypeVar("OwnedT", bound=_Owned)


def ongoing(run: OwnedT | None, *owners: Any) -> OwnedT | None:
    """The run if it is one of these, else None."""
    same = run is not None and all(a is b for a, b in zip(run.owners, owners, strict=True))
    return run if same else None
