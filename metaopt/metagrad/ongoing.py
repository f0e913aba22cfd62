"""Unrolls that outlast a call: where they stand, and how that is saved.

    state = estimator.state_dict()       # tensors, numbers and lists: torch.save and weights_only=True will do
    other.load_state_dict(state)         # the next call of the other goes on from there

What is saved is the tensors alone. The trees that they belong to are the task's to know, and it is asked at the next
call: with the generator put back afterwards, so that an unroll that was saved draws what it would have drawn.

Of several runs, or pairs, the tensors under "rows" have a row for each (or no dimension, if they all share it): of
unrolls that many processes share they can be put together, and divided again among another number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, final

from torch import Generator, Tensor

from metaopt.tasks import Runs, Task, TaskBatch
from metaopt.tasks.family import drawn
from metaopt.tasks.share import SomeRuns, whole
from metaopt.unroll.program import Split, Tensors
from metaopt.unroll.randomness import Snapshot


class Run(Protocol):
    """What goes on between calls.

    Attributes:
        owners: the task, optimizer and hyper that it is a run of, and of pairs which of them.
    """

    @property
    def owners(self) -> tuple[Any, ...]: ...

    def state(self) -> dict[str, Any]:
        """Its tensors, and where it stands."""


RunT = TypeVar("RunT", bound=Run)
BegunT = TypeVar("BegunT")


class Resumable:
    """An estimator with a run that outlasts its calls, and that can be saved between two of them."""

    _run: Run | None = None
    _saved: dict[str, Any] | None = None

    @final
    def reset(self) -> None:
        """Let the next call begin anew."""
        self._run = self._saved = None

    @final
    def state_dict(self) -> dict[str, Any]:
        """Where the unrolls stand: tensors, numbers, and lists of them; empty if the next call begins anew."""
        if self._saved is not None:
            return self._saved
        return {} if self._run is None else dict(self._run.state())

    @final
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next call go on where another estimator with the same arguments stood.

        Args:
            state: of its ``state_dict``. Task, optimizer and hyper of the next call must be what they were.
        """
        self._run, self._saved = None, dict(state) or None

    @final
    def _going_on(
        self, owners: tuple[Any, ...], begin: Callable[[], BegunT], restore: Callable[[dict[str, Any]], RunT]
    ) -> RunT | BegunT:
        """The run if it is one of these, the one that was saved, or a new one."""
        run: Any
        if self._saved is not None:
            run = restore(self._saved)
        elif self._run is not None and all(map(_same, self._run.owners, owners)):
            run = self._run
        else:
            run = begin()
        self._saved = None
        return run  # type: ignore[no-any-return]


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, range) and one == other)


class Start(NamedTuple):
    """What is trained, and from where.

    Attributes:
        task: drawn from a `TaskBatch`, if it is one.
        params: where training starts.
    """

    task: Task
    params: Any

    @staticmethod
    def draw(task: Task | TaskBatch, generator: Generator | None) -> Start:
        """A fresh one."""
        trained = drawn(task, generator)
        return Start(trained, trained.init(generator))

    def state(self) -> dict[str, Any]:
        return {"config": list(config(whole(self.task)).tensors), "rows": {"params": list(Split(self.params).tensors)}}

    @staticmethod
    def restored(state: Mapping[str, Any], task: Task | TaskBatch, generator: Generator | None) -> Start:
        """The one that was saved."""
        here = Snapshot(generator)
        like = Start.draw(task, generator)
        here.restore()
        trained = like.task
        everything = whole(trained)
        if isinstance(everything, Runs):  # what is drawn may depend on the configuration of all
            everything = everything.with_config(_join(config(everything), state["config"]))
            trained = SomeRuns(everything, trained.rows) if isinstance(trained, SomeRuns) else everything
        return Start(trained, _join(Split(like.params), state["rows"]["params"]))


class Ongoing(NamedTuple):
    """An unroll between two windows.

    Attributes:
        owners: the task, optimizer and hyper that it is an unroll of.
        start: what is trained, and from where.
        carry: where it is, cut off; None at the start.
        step: the next inner step.
        batch: of the next step, where it is drawn already.
    """

    owners: tuple[Any, ...]
    start: Start
    carry: Tensors | None = None
    step: int = 0
    batch: Any = None

    @staticmethod
    def begin(owners: tuple[Any, ...], generator: Generator | None) -> Ongoing:
        """A fresh one."""
        return Ongoing(owners, Start.draw(owners[0], generator))

    def at(self, carry: Tensors, step: int, horizon: int, batch: Any = None) -> Ongoing | None:
        """The same further on; None at the end."""
        return self._replace(carry=carry, step=step, batch=batch) if step < horizon else None

    def state(self) -> dict[str, Any]:
        carry = None if self.carry is None else list(self.carry)
        start, batch = self.start.state(), list(Split(self.batch).tensors)
        return {**start, "rows": {**start["rows"], "carry": carry, "batch": batch}, "step": self.step}

    @staticmethod
    def restored(state: Mapping[str, Any], owners: tuple[Any, ...], generator: Generator | None) -> Ongoing:
        """The one that was saved."""
        start, rows = Start.restored(state, owners[0], generator), state["rows"]
        batch = None
        if rows["batch"]:
            here = Snapshot(generator)
            batch = _join(Split(start.task.batch(state["step"], generator)), rows["batch"])
            here.restore()
        carry = None if rows["carry"] is None else tuple(placed(rows["carry"], start.params))
        return Ongoing(owners, start, carry, state["step"], batch)


def config(task: Task) -> Split:
    """In what its runs differ."""
    return Split(task.config if isinstance(task, Runs) else ())


def placed(tensors: Sequence[Tensor], params: Any) -> list[Tensor]:
    """The tensors on the device of the parameters."""
    device = Split(params).tensors[0].device
    return [tensor.to(device) for tensor in tensors]


def _join(like: Split, tensors: Sequence[Tensor]) -> Any:
    """A tree like this one of the tensors that were saved.

    Raises:
        ValueError: they are not of its shapes.
    """
    if [tensor.shape for tensor in like.tensors] != [tensor.shape for tensor in tensors]:
        raise ValueError(
            f"the unroll that was saved is not of this task: its tensors have shapes "
            f"{[tuple(tensor.shape) for tensor in tensors]}, the task's {[tuple(t.shape) for t in like.tensors]}"
        )
    placed = [tensor.to(other.device, other.dtype) for tensor, other in zip(tensors, like.tensors, strict=True)]
    return like.join(placed)
