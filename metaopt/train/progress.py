"""How far a run is: a bar in a terminal or a notebook, a line now and then in a log file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any


class Progress:
    """Shows meta-step, meta-loss and the current hyperparameters.

    Args:
        steps: how many there will be.
        shown: False for silence.
        lines: how many lines a log file gets.
        done: steps that are behind already.
    """

    def __init__(self, steps: int, *, shown: bool = True, lines: int = 10, done: int = 0) -> None:
        self._steps = steps
        self._every = max(1, steps // lines)
        self._done = done
        self._first = done + 1
        self._bar: Any = None
        self._console: Any = None
        if shown:
            from rich.console import Console

            self._console = Console()

    def __enter__(self) -> Progress:
        if self._console is not None and _can_redraw(self._console):
            from rich import progress
            from rich.table import Column

            whole = Column(no_wrap=True)
            self._bar = progress.Progress(
                progress.TextColumn("meta-step"),
                progress.MofNCompleteColumn(table_column=whole),
                progress.BarColumn(bar_width=20, table_column=whole),
                progress.TimeRemainingColumn(compact=True, table_column=whole),
                # Where the terminal is narrow, the values go on in the next line.
                progress.TextColumn("{task.fields[status]}", markup=False, table_column=Column(overflow="fold")),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps, completed=self._done, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, meta_loss: float, values: Mapping[str, Any]) -> None:
        """One step further."""
        self._done += 1
        status = f"meta-loss {meta_loss:.4g}  " + "  ".join(f"{name} {brief(value)}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, advance=1, status=status)
        elif self._console is not None and (self._done % self._every == 0 or self._done in (self._first, self._steps)):
            print(f"meta-step {self._done}/{self._steps}  {status}", flush=True)


def _can_redraw(console: Any) -> bool:
    """A terminal, or a notebook with the widgets that rich needs to draw there."""
    widgets = all(find_spec(name) is not None for name in ("IPython", "ipywidgets"))
    return bool(console.is_terminal or (console.is_jupyter and widgets))


def brief(value: Any) -> str:
    """A value in a few characters: numbers to three digits, many of them as a range.

    Example:
        >>> brief((0.9, 0.999)), brief({"weight": [0.1, 0.05], "bias": [0.2, 0.01]})
        ('(0.9, 0.999)', '0.01..0.2')
    """
    if isinstance(value, tuple):
        return f"({', '.join(brief(item) for item in value)})"
    numbers = _flat(value)
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if len(numbers) == 1 else f"{low:.3g}..{high:.3g}"


def _flat(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _flat(item)]
    return [float(value)]
