"""The metric of a trial, read from what its program leaves in the trial's folder.

A program logs to wandb, whose run file is read by wandb's own reader, or writes lines of JSON such as
``{"step": 3, "validation/loss": 0.5}`` to the file that METAOPT_RECORD names. A trial that was cut off and went on has
several such files, or one with a jump back: a line that is logged at a step replaces everything from that step on.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metaopt.sweeps import process
from metaopt.sweeps.definition import SweepError

RECORD = "record.jsonl"


class Metric:
    """A metric, as it is known so far.

    Args:
        folder: of the trial.
        name: of the metric, as logged; in nested mappings with dots.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder, name
        self._sources: dict[Path, _Record | _Run | _PastRun] = {path: _PastRun(path) for path in _run_files(folder)}
        self._rows: list[tuple[int, float]] = []

    def history(self) -> list[float]:
        """Every value logged so far, in order."""
        record = self._folder / RECORD
        if record.exists():
            self._sources.setdefault(record, _Record(record))
        for path in _run_files(self._folder):
            if path not in self._sources:
                self._sources[path] = _Run(path)
        for source in self._sources.values():
            for step, row in source.rows():
                value = _number(_find(row, self.name))
                if value is not None:
                    while self._rows and self._rows[-1][0] >= step:
                        self._rows.pop()
                    self._rows.append((step, value))
        return [value for _, value in self._rows]

    def final(self) -> float | None:
        """The value that wandb's summary has: the last one, unless the program says otherwise. None without any."""
        record = self._folder / RECORD
        if record.exists():
            for line in reversed(record.read_text(encoding="utf-8").splitlines()):
                value = _number(_find(_parsed(line), self.name))
                if value is not None:
                    return value
        for path in reversed(_run_files(self._folder)):
            value = _number(_find(_summary(path), self.name))
            if value is not None:
                return value
        return None

    def close(self) -> None:
        """Stop reading."""
        for source in self._sources.values():
            source.close()


Row = tuple[int, Mapping[str, Any]]


class _Record:
    """The file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._count = path, 0, 0

    def rows(self) -> Iterator[Row]:
        """What came since the last call: steps and rows."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            row = _parsed(line)
            step = row.get("step", self._count)
            self._count = int(step) + 1
            yield int(step), row

    def close(self) -> None:
        """Nothing is held."""


class _PastRun:
    """The run file of a program that has ended."""

    def __init__(self, path: Path) -> None:
        self._path: Path | None = path

    def rows(self) -> Iterator[Row]:
        """All of them, the first time."""
        if self._path is not None:
            done = subprocess.run(_inspect(self._path), capture_output=True, check=False)
            yield from _history(done.stdout.splitlines())
        self._path = None

    def close(self) -> None:
        """Nothing is held."""


class _Run:
    """wandb's run file, followed by wandb's reader in a process of its own."""

    def __init__(self, path: Path) -> None:
        self._reader = subprocess.Popen(
            _inspect(path, "--follow", "--idle-timeout", "0"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=process.bound(),
        )
        assert self._reader.stdout is not None
        self._pipe = self._reader.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._rest = b""

    def rows(self) -> Iterator[Row]:
        """What came since the last call: steps and rows."""
        while True:
            try:
                new = os.read(self._pipe, 1 << 20)
            except BlockingIOError:
                return
            if not new:
                return
            *whole, self._rest = (self._rest + new).split(b"\n")
            yield from _history(whole)

    def close(self) -> None:
        """End the reader."""
        self._reader.kill()
        self._reader.communicate()


def _history(lines: Iterable[bytes]) -> Iterator[Row]:
    """What was logged, of the records that wandb's reader prints."""
    for line in lines:
        logged = _parsed(line).get("history")
        if logged is not None:
            yield int(logged["step"]["num"]), logged["item"]


def _run_files(folder: Path) -> list[Path]:
    """wandb's run files, the oldest first."""
    return sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def _summary(path: Path) -> Mapping[str, Any]:
    done = subprocess.run(_inspect(path, "--summary"), capture_output=True, check=False)
    if done.returncode != 0:
        raise SweepError(f"wandb cannot read {path}: {done.stderr.decode(errors='replace').strip()}")
    found: Mapping[str, Any] = _parsed(done.stdout).get("summary", {})
    return found


def _inspect(path: Path, *options: str) -> list[str]:
    """``wandb leet inspect --json``, without the half second that wandb takes to be imported for it."""
    return [_core(), "leet", "inspect", "--no-observability", "--json", *options, "--run-file", str(path)]


@functools.cache
def _core() -> str:
    spec = importlib.util.find_spec("wandb")
    path = Path(str(spec.origin)).parent / "bin" / "wandb-core" if spec is not None else None
    if path is None or not path.exists():
        raise SweepError(
            'reading the metrics that a program logs to wandb needs wandb >= 0.31: pip install "metaopt[wandb]"'
        )
    return str(path)


def _parsed(line: str | bytes) -> Mapping[str, Any]:
    """A line of JSON; nothing for one that is damaged, as the last one is when its writer was killed."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _find(row: Mapping[str, Any], name: str) -> Any:
    """A value by its name, or by its path through nested mappings.

    Example:
        >>> _find({"validation/loss": 1}, "validation/loss"), _find({"validation": {"loss": 2}}, "validation.loss")
        (1, 2)
    """
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first)
    return _find(inner, rest) if dot and isinstance(inner, Mapping) else None


def _number(value: Any) -> float | None:
    """A number; wandb writes those that are not finite as text."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, bool | int | float) else None
