"""What a tracker is: the little that is demanded of one, and all that one can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable


class Tracker(Protocol):
    """Gets the measurements of a run as they are made."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...


@runtime_checkable
class Run(Tracker, Protocol):
    """A run, or a part of it: what a tracker can do. ``with run:`` finishes it."""

    def curves(self, name: str, columns: Mapping[str, Sequence[float]], step: int) -> None:
        """Curves that a step has brought forth, such as the losses of an inner training run or a learned schedule.

        Args:
            name: of the figure.
            columns: of equal length; the first one is the x-axis, the others are curves over it.
            step: as in `log`.
        """

    def artifact(self, name: str, content: Mapping[str, Any]) -> None:
        """A result of the run, such as its final hyperparameters; a later one of the same name takes its place."""

    def rewind(self, step: int) -> None:
        """Say that steps from this one on will be logged again: what was logged of them does not count."""

    def scope(self, **fields: str) -> Run:
        """A part of the run: all it logs bears these fields, and has steps of its own to rewind."""

    def finish(self, failed: bool = False) -> None:
        """End the run with all its parts. Nothing is logged afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(failed=error is not None)
