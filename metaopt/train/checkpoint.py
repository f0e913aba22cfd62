"""The checkpoints of a run: written whole or not at all, read without running what is in them.

    with Checkpoints("runs/a") as checkpoints:      # the folder is this process's, until the end of the block
        found = checkpoints.latest()                # None at the start, else (step, state)
        checkpoints.save(step=10, state={"hyper": hyper.state_dict()})

A file is written beside its place, flushed to the disk and renamed. Its first line says what it is, in which version,
and the checksum of the rest, which ``torch.load(weights_only=True)`` reads: tensors and plain values.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from metaopt.checks import check_count

VERSION = 1
_HEAD = re.compile(rb"metaopt checkpoint (\d+) ([0-9a-f]{64})\n")
# A lock belongs to all who inherited its file, and workers that are forked in a run, for data, can outlive it.
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written, or its folder is in use."""


class Checkpoints:
    """A folder of checkpoints, locked while the block runs; the lock of a process that was killed goes with it.

    Args:
        folder: where; made if it is not there.
        keep: how many of the last checkpoints stay, >= 1.

    Raises:
        CheckpointError: another process, or another block of this one, has the folder; it cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpoints(folder) as checkpoints:
        ...         checkpoints.save(7, {"lr": torch.tensor(0.1)})
        ...     with Checkpoints(folder) as checkpoints:
        ...         print(checkpoints.latest())
        (7, {'lr': tensor(0.1000)})
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        check_count("keep", keep)
        if not isinstance(folder, str | os.PathLike) or not str(folder):
            raise TypeError(f"checkpoint must be a folder, got checkpoint={folder!r}")
        self.folder = Path(folder).expanduser()
        self._keep = keep
        self._lock: int | None = None

    def __enter__(self) -> Checkpoints:
        with _explained(f"checkpoint folder {self.folder} cannot be used"):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise CheckpointError(f"checkpoint folder {self.folder} is in use by another run") from error
        self._lock = lock
        _held.add(lock)
        for left in self.folder.glob("*.partial"):  # by a process that was killed
            left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        if self._lock in _held:  # not in a forked process
            _held.remove(self._lock)
            os.close(self._lock)
        self._lock = None

    def latest(self) -> tuple[int, Any] | None:
        """The last good checkpoint, its step and its state; None if there has been none.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.

        Warns:
            UserWarning: for each file that was passed over; it is renamed to ``*.refused``.
        """
        refused: list[tuple[Path, CheckpointError]] = []
        for step, path in sorted(self._files(), reverse=True):
            try:
                state = read(path)
            except CheckpointError as error:
                refused.append((path, error))
                continue
            for other, reason in refused:
                warnings.warn(f"{reason}; going on from step {step} before it", stacklevel=2)
                other.rename(other.with_suffix(".refused"))
            return step, state
        if refused:
            raise CheckpointError(f"{refused[0][1]}; there is no good one before it")
        return None

    def save(self, step: int, state: Any) -> None:
        """Write the checkpoint of a step, and remove the oldest.

        Raises:
            CheckpointError: the disk is full, the folder read-only. What was written before is still there.
            TypeError: the state holds what is neither a tensor nor a plain value.
        """
        path = self.folder / f"step-{step:09d}.checkpoint"
        content = encode(state)
        partial = path.with_suffix(".partial")
        with _explained(f"checkpoint {path} cannot be written"):
            try:
                write_whole(partial, content)
                partial.replace(path)
                _flush_folder(self.folder)
            except OSError:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
        for _, old in sorted(self._files())[: -self._keep]:
            old.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        names = (re.fullmatch(r"step-(\d+)\.checkpoint", path.name) for path in self.folder.iterdir())
        return [(int(name[1]), self.folder / name[0]) for name in names if name]


def encode(state: Any) -> bytes:
    """The content of a checkpoint file.

    Raises:
        TypeError: the state holds what is neither a tensor nor a plain value.
    """
    file = io.BytesIO()
    torch.save(state, file)
    body = file.getvalue()
    try:
        _load(body)
    except pickle.UnpicklingError as error:
        raise TypeError(f"a checkpoint holds tensors and plain values alone: {_first_line(error)}") from error
    return b"metaopt checkpoint %d %s\n" % (VERSION, hashlib.sha256(body).hexdigest().encode()) + body


def read(path: Path) -> Any:
    """What a checkpoint file holds. Code that may be in it is not run.

    Raises:
        CheckpointError: what is wrong with it, in one line.
    """
    with _explained(f"checkpoint {path} cannot be read"):
        content = path.read_bytes()
    head = _HEAD.match(content)
    if head is None:
        raise CheckpointError(f"{path} is not a checkpoint of metaopt")
    if int(head[1]) > VERSION:
        raise CheckpointError(f"checkpoint {path} has version {int(head[1])}: a newer metaopt wrote it")
    body = content[head.end() :]
    if hashlib.sha256(body).hexdigest().encode() != head[2]:
        raise CheckpointError(f"checkpoint {path} is torn: its checksum is not that of its content")
    try:
        return _load(body)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} is refused: {_first_line(error)}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, down to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _load(body: bytes) -> Any:
    return torch.load(io.BytesIO(body), weights_only=True)


def _flush_folder(folder: Path) -> None:
    """So that a rename outlives a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or error}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
