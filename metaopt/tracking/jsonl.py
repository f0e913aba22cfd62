"""A record of a run that survives everything: a file with a line of JSON per call."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaopt.tracking.plain import columns_as_lists, dumps, whole_step
from metaopt.tracking.tracker import Run

_OURS = ("step", "kind")


class JSONL(Run):
    """One line of JSON per call, written through at once: what was logged survives the process.

    A row of metrics is ``{fields…, "step": …, metrics…}``. Curves and artifacts have a ``kind``, which a row has not:
    ``{fields…, "step": …, "kind": "curves", "name": …, "columns": {…}}`` and
    ``{fields…, "kind": "artifact", "name": …, "content": {…}}``. Numbers that are not finite are strings: "NaN",
    "Infinity", "-Infinity", which ``float`` reads. The rest of a line that a killed process left half-written is
    removed when the file is written to again. One process at a time may write to a file.

    Args:
        path: the file; its folder is made, and lines are added to what is there.
        **fields: repeated on every line (the name of a run).

    Raises:
        ValueError: a field called ``step`` or ``kind``.
        OSError: its folder cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tracker = JSONL(Path(folder) / "record.jsonl", run="a")
        ...     tracker.log({"meta_loss": 0.5}, step=0)
        ...     print(tracker.path.read_text(), end="")
        {"run": "a", "step": 0, "meta_loss": 0.5}
    """

    def __init__(self, path: Path | str, **fields: Any) -> None:
        _refuse_taken("fields", fields, _OURS)
        self.path = Path(path)
        with _explained(f"cannot make the folder {self.path.parent} for {self.path.name}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fields = fields
        self._whole = False  # whether the last line is known to be complete

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write one line.

        Raises:
            TypeError: a value that JSON cannot hold, or a step that is no integer.
            ValueError: a metric called ``step``, ``kind`` or as one of the fields.
            OSError: the line could not be written; what was there before is whole.
        """
        _refuse_taken("metrics", metrics, (*_OURS, *self._fields))
        self._write({**self._fields, "step": whole_step(step), **metrics})

    def curves(self, name: str, columns: Mapping[str, Sequence[float]], step: int) -> None:
        """Write one line with all columns.

        Raises:
            TypeError: a step that is no integer.
            ValueError: fewer than two columns, columns of different lengths, or empty ones.
        """
        curves = {"kind": "curves", "name": name, "columns": columns_as_lists(columns)}
        self._write({**self._fields, "step": whole_step(step), **curves})

    def artifact(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one line; it has no step, and no rewinding removes it."""
        self._write({**self._fields, "kind": "artifact", "name": name, "content": content})

    def rewind(self, step: int) -> None:
        """Remove the rows and curves of these very fields from ``step`` on; all at once or, if that fails, none.

        Raises:
            TypeError: a step that is no integer.
            OSError: the file could not be written anew.
        """
        step = whole_step(step)
        if not self.path.exists():
            return
        fields = json.loads(dumps(self._fields))
        path = self.path.resolve()  # a link stays one
        shorter = path.with_name(path.name + ".rewinding")
        with _explained(f"cannot rewind {self.path}"), path.open("rb") as lines:
            try:
                with shorter.open("wb") as kept:
                    kept.writelines(line for line in _whole_lines(lines) if not _counts_from(line, fields, step))
                    kept.flush()
                    os.fsync(kept.fileno())
                shutil.copymode(path, shorter)
                os.replace(shorter, path)
            finally:
                shorter.unlink(missing_ok=True)

    def scope(self, **fields: str) -> JSONL:
        """The same file, with further fields on every line."""
        return JSONL(self.path, **{**self._fields, **fields})

    def finish(self, failed: bool = False) -> None:
        """Nothing is left to do."""

    def _write(self, line: Mapping[str, Any]) -> None:
        data = (dumps(line) + "\n").encode()
        # Opened anew for each line: another JSONL may have put a rewound file in the place of this one.
        with _explained(f"cannot write to {self.path}"), self.path.open("ab", buffering=0) as file:
            if not self._whole:
                _remove_torn_line(self.path)
            self._whole = False  # until this one is written
            while data:
                data = data[file.write(data) :]
            self._whole = True


def _refuse_taken(argument: str, names: Mapping[str, Any], taken: Sequence[str]) -> None:
    for name in taken:
        if name in names:
            raise ValueError(f"{argument} must have no {name!r}, which every line has, got {name}={names[name]!r}")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """An error of the operating system that says what could not be done."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}") from error


def _remove_torn_line(path: Path) -> None:
    """End the file with the end of a line: a killed process, or a full disk, may have left it inside one."""
    size = path.stat().st_size
    if not size:
        return
    with path.open("r+b") as file:
        end, tail = size, b""
        while end and b"\n" not in tail:
            start = max(0, end - 65536)
            file.seek(start)
            tail, end = file.read(end - start) + tail, start
        last = tail.rpartition(b"\n")[2]
        if last and _parsed(last) is None:
            file.truncate(size - len(last))
        elif last:
            file.seek(size)
            file.write(b"\n")


def _whole_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line.endswith(b"\n"):
            yield line
        elif _parsed(line) is not None:
            yield line + b"\n"


def _counts_from(line: bytes, fields: dict[str, Any], step: int) -> bool:
    """Whether a line has these fields, which come before its step, and a step that is not below this one."""
    row = _parsed(line)
    if row is None or "step" not in row:
        return False
    names = list(row)
    head = {name: row[name] for name in names[: names.index("step")]}
    return head == fields and bool(row["step"] >= step)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None for what is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
