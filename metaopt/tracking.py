"""Where measurements go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Gets the measurements of a run as they are made."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...


class JSONL:
    """One line of JSON per call, written through at once: what was logged survives the process.

    Args:
        path: the file; its folder is made, and lines are added to what is there.
        **fields: repeated on every line (the name of a run).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tracker = JSONL(Path(folder) / "record.jsonl", run="a")
        ...     tracker.log({"meta_loss": 0.5}, step=0)
        ...     print(tracker.path.read_text(), end="")
        {"run": "a", "step": 0, "meta_loss": 0.5}
    """

    def __init__(self, path: Path | str, **fields: Any) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fields = fields

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write one line.

        Raises:
            TypeError: a value that JSON cannot hold.
        """
        line = json.dumps({**self._fields, "step": step, **metrics})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
