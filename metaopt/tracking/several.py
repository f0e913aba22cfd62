"""Several trackers as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metaopt.tracking.completing import complete
from metaopt.tracking.tracker import Run, Tracker


class Several(Run):
    """Hands everything to each of its trackers.

    The first is the record: what goes wrong there is raised; if it could not be written (OSError), after the others
    have got theirs. Any other that fails is left out from then on, with a warning, so that a run of hours does not die
    of a chart.

    Args:
        record: the one that counts.
        *others: more of them.

    Example:
        >>> class Prints:
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
        >>> Several(Prints(), Prints()).log({"loss": 0.5}, step=0)
        0 {'loss': 0.5}
        0 {'loss': 0.5}
    """

    def __init__(self, record: Tracker, *others: Tracker) -> None:
        self._record = complete(record)
        self._others = [complete(other) for other in others]
        self._failed: set[int] = set()  # by number, and shared with the parts of the run

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._each(lambda run: run.log(metrics, step))

    def curves(self, name: str, columns: Mapping[str, Sequence[float]], step: int) -> None:
        self._each(lambda run: run.curves(name, columns, step))

    def artifact(self, name: str, content: Mapping[str, Any]) -> None:
        self._each(lambda run: run.artifact(name, content))

    def rewind(self, step: int) -> None:
        self._each(lambda run: run.rewind(step))

    def scope(self, **fields: str) -> Several:
        part = Several(self._record.scope(**fields), *(other.scope(**fields) for other in self._others))
        part._failed = self._failed
        return part

    def finish(self, failed: bool = False) -> None:
        self._each(lambda run: run.finish(failed))

    def _each(self, call: Callable[[Run], None]) -> None:
        lost: OSError | None = None
        try:
            call(self._record)
        except OSError as error:  # a full disk, say; an argument that it refuses is refused for all
            lost = error
        for number, other in enumerate(self._others):
            if number not in self._failed:
                self._try(number, other, call)
        if lost is not None:
            raise lost

    def _try(self, number: int, other: Run, call: Callable[[Run], None]) -> None:
        try:
            call(other)
        except Exception as error:
            self._failed.add(number)
            name = type(other).__name__
            message = f"{name} failed and is left out from now on: {type(error).__name__}: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
