"""Trackers that can do little, as ones that can do everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaopt.tracking.nothing import Nothing
from metaopt.tracking.tracker import Run, Tracker


def complete(tracker: Tracker | None) -> Run:
    """A tracker that can do everything.

    Args:
        tracker: a `Run` is returned as it is; None becomes `metaopt.tracking.Nothing`. Of one that has ``log`` alone,
            curves and artifacts are dropped, and the fields of a scope are added to the metrics.

    Raises:
        TypeError: it has no ``log``.

    Example:
        >>> class Prints:
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
        >>> complete(Prints()).scope(optimizer="radam").log({"meta_loss": 0.5}, step=3)
        3 {'optimizer': 'radam', 'meta_loss': 0.5}
    """
    if tracker is None:
        return Nothing()
    if isinstance(tracker, Run):
        return tracker
    if not callable(getattr(tracker, "log", None)):
        raise TypeError(f"tracker must have log(metrics, step), got tracker={tracker!r}")
    return _Logs(tracker, {})


class _Logs(Run):
    """A tracker that can do nothing but log, with the fields of a scope."""

    def __init__(self, tracker: Tracker, fields: Mapping[str, str]) -> None:
        self._tracker = tracker
        self._fields = fields

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._tracker.log({**self._fields, **metrics}, step)

    def curves(self, name: str, columns: Mapping[str, Sequence[float]], step: int) -> None:
        pass

    def artifact(self, name: str, content: Mapping[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def scope(self, **fields: str) -> Run:
        return _Logs(self._tracker, {**self._fields, **fields})

    def finish(self, failed: bool = False) -> None:
        pass
