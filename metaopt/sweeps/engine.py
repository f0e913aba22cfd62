"""The local engine: one process that starts the workers, and starts them again when they die."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import optuna

from metaopt.sweeps import worker
from metaopt.sweeps.command import expand
from metaopt.sweeps.definition import Sweep, SweepError
from metaopt.sweeps.storage import StorageError, Timing, exclusive, one_line, open_storage, parse
from metaopt.sweeps.study import best, create, find, finite, in_words, latest, outcome, recover, retry_failed, size
from metaopt.sweeps.worker import say

FOLDER = Path("runs") / "sweeps"

_OWNER = "study.json"  # in the folder of results: whose they are
_CONNECTING = 15.0  # seconds that it may take to find out that there is no server
_TWICE = 0.5  # seconds within which a second signal is the first once more, from a program that passes it on
_HASTY = 3.0  # seconds; a worker that dies within has a reason that will not go away


def named(sweep: Sweep, path: Path) -> Sweep:
    """A sweep without a name gets that of its file."""
    return sweep if sweep.name is not None else replace(sweep, name=path.stem)


def folder(sweep: Sweep) -> Path:
    """Where the results of a sweep are: in a folder of its name, as far as that can be one."""
    return FOLDER / (re.sub(r"[^\w.-]+", "-", str(sweep.name)).lstrip(".-") or "sweep")


def default_storage(sweep: Sweep) -> str:
    """Its database, unless another is named: an SQLite file beside the results."""
    return f"sqlite:///{folder(sweep) / 'sweep.db'}"


def check_started(sweep: Sweep, *, new: bool = False) -> None:
    """Before the database beside the results is used: whether it is there, or may be made.

    Raises:
        SweepError: it is gone, and the results of its trials are there; or it has to be there and nothing is.
    """
    place, file = folder(sweep), Path(str(parse(default_storage(sweep)).database))
    if file.exists():
        return
    if (place / _OWNER).exists():
        raise SweepError(
            f"{place} holds the trials of a sweep, but not its database {file.name}: name that one with --storage, "
            "put it back, or move the folder away and start anew"
        )
    if not new:
        raise SweepError(f"sweep {sweep.name!r} has not been started: metaopt sweep run does that")


def run(sweep: Sweep, storage: str | None = None, *, workers: int = 1, timing: Timing | None = None) -> int:
    """Start a sweep.

    Args:
        sweep: as read from a file.
        storage: address of the database; None is an SQLite file beside the results.
        workers: processes that run one trial at a time each.
        timing: heartbeats and graces.

    Returns:
        The exit code: 0 if nothing is left and something succeeded.

    Raises:
        SweepError: the program is not there, or the sweep has been started already.
        StorageError: the database cannot be used.
    """
    return _start(sweep, storage, workers, timing or Timing(), new=True)


def resume(
    sweep: Sweep,
    storage: str | None = None,
    *,
    workers: int = 1,
    timing: Timing | None = None,
    retry_failed: bool = False,
) -> int:
    """Go on with a sweep, or join it from another machine.

    Args:
        sweep, storage, workers, timing: as for `run`.
        retry_failed: whether trials that have failed are run once more, with the same parameters.

    Raises:
        SweepError: it has not been started, or with another method, metric or parameters.
        StorageError: the database cannot be used.
    """
    return _start(sweep, storage, workers, timing or Timing(), new=False, again=retry_failed)


def _start(sweep: Sweep, storage: str | None, workers: int, timing: Timing, *, new: bool, again: bool = False) -> int:
    if workers < 1:
        raise SweepError(f"workers must be >= 1, got {workers}")
    if timing.heartbeat < 1:
        raise SweepError(f"heartbeat must be a whole number of seconds >= 1, got {timing.heartbeat}")
    _check_program(sweep)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = folder(sweep)
    if storage is None:
        storage = default_storage(sweep)
        check_started(sweep, new=new)
        place.mkdir(parents=True, exist_ok=True)
    database = open_storage(storage, timing, create=new)
    with one_line(storage), exclusive(database, str(sweep.name)):
        study = create(sweep, database) if new else find(sweep, database)
        _claim_folder(place, study.user_attrs["id"])
        recover(study)
        if again:
            retry_failed(study)
    if size(sweep) is None:
        say("no run_cap: in its file: the sweep goes on until Ctrl-C")
    return _Engine(sweep, storage, workers, timing).supervise()


def _check_program(sweep: Sweep) -> None:
    """Before anything is written."""
    if sweep.program is not None and not Path(sweep.program).exists():
        raise SweepError(f"program: there is no file {sweep.program} in {Path.cwd()}")
    first = expand(sweep, {}, sys.executable)[0]
    if shutil.which(first) is None:
        raise SweepError(f"command: there is no program {first}")


def _claim_folder(place: Path, identity: str) -> None:
    """Results and checkpoints of another study of the same name must not be taken for this one's."""
    place.mkdir(parents=True, exist_ok=True)
    owner = place / _OWNER
    if owner.exists() and json.loads(owner.read_text(encoding="utf-8")) != identity:
        raise SweepError(f"{place} holds the trials of another sweep of this name: move it away")
    owner.write_text(json.dumps(identity), encoding="utf-8")


@dataclass
class _Slot:
    """A worker, and how its predecessors ended."""

    process: Any = None
    started: float = 0.0
    hasty: int = 0
    waits_until: float = 0.0
    away_since: float | None = None
    finished: bool = False


@dataclass
class _Engine:
    """Starts workers, watches them, stops them."""

    sweep: Sweep
    storage: str
    workers: int
    timing: Timing
    _signals: int = 0
    _signalled: float = -math.inf
    _given_up: str = ""
    _slots: list[_Slot] = field(default_factory=list)

    def supervise(self) -> int:
        """Until nothing is left or somebody stops it."""
        before = {number: signal.signal(number, self._signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self._slots = [_Slot() for _ in range(self.workers)]
        try:
            told = 0
            while not all(slot.finished for slot in self._slots):
                for slot in self._slots:
                    self._look(slot)
                if self._signals > told:
                    told = self._signals
                    self._stop(at_once=told > 1)
                time.sleep(0.05)
        finally:
            for slot in self._slots:
                if slot.process is not None and slot.process.is_alive():
                    slot.process.kill()
                    slot.process.join()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._finish()

    def _signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._signalled > _TWICE:
            self._signals += 1
        self._signalled = now

    def _look(self, slot: _Slot) -> None:
        """Start a worker where one is missing."""
        if slot.finished:
            return
        now = time.monotonic()
        if slot.process is None:
            if now >= slot.waits_until:
                slot.process = self._fork(complain=slot.away_since is None)
                slot.started = now
            return
        code = slot.process.exitcode
        if code is None:
            return
        slot.process = None
        lived = now - slot.started
        if code == worker.DONE or self._signals or self._given_up:
            slot.finished = True
        elif code == worker.REFUSED:
            self._give_up("stopped; go on with metaopt sweep resume")
        elif code == worker.STORAGE:
            if slot.away_since is None or lived > self.timing.patience + _CONNECTING:
                slot.away_since = now
            if now - slot.away_since > self.timing.patience:
                self._give_up("the database did not come back: go on with metaopt sweep resume when it does")
            slot.waits_until = now + 1
        else:
            slot.away_since = None
            slot.hasty = slot.hasty + 1 if lived < _HASTY else 0
            if slot.hasty >= 3:
                self._give_up("a worker ended three times in a row as soon as it was started")
            say(f"a worker {_ended(code)}; its trial goes on in a new one", sys.stderr)

    def _fork(self, *, complain: bool) -> Any:
        """A new worker: it needs what is imported here already, and nothing here is connected to the database."""
        context = multiprocessing.get_context("fork")
        arguments = (self.sweep, self.storage, folder(self.sweep), self.timing, complain)
        process = context.Process(target=worker.main, args=arguments)
        # A signal that comes before the worker has handlers of its own is to wait for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, worker.SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = why
            self._stop(at_once=False)
        for slot in self._slots:
            slot.finished = slot.finished or slot.process is None

    def _stop(self, *, at_once: bool) -> None:
        if at_once:
            say("stopping at once", sys.stderr)
        elif not self._given_up:
            say(
                f"stopping: running trials have {self.timing.stop:g} s to write a checkpoint; again: at once",
                sys.stderr,
            )
        for slot in self._slots:
            if slot.process is None:
                slot.finished = True
            else:
                with suppress(ProcessLookupError):
                    os.kill(slot.process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    def _finish(self) -> int:
        """Say how it ended; the exit code.

        Raises:
            StorageError: it was given up.
        """
        failed = False
        try:
            failed = self._summary()
        except StorageError:
            if not self._given_up:
                raise
        if self._given_up:
            raise StorageError(self._given_up)
        if self._signals:
            say("stopped; go on with metaopt sweep resume", sys.stderr)
            return 130
        return int(failed)

    def _summary(self) -> bool:
        """Print how many trials ended how; whether all failed or, with a metric, have none that is finite."""
        database = open_storage(self.storage, self.timing, create=False)
        with one_line(self.storage):
            with exclusive(database, str(self.sweep.name)):
                study = find(self.sweep, database)
                recover(study)
            trials = latest(study.get_trials(deepcopy=False))
        outcomes = [outcome(trial) for trial in trials.values()]
        parts = [f"{outcomes.count(name)} {name}" for name in dict.fromkeys(sorted(outcomes))]
        line = ", ".join(parts) or "no trials"
        ranked = best(trials, self.sweep)
        if ranked and self.sweep.metric is not None:
            number, trial = ranked[0]
            line += f"; best {self.sweep.metric.name} {in_words(trial.value)} (trial {number})"
        if "failed" in outcomes:
            line += "; what failed stays so: metaopt sweep resume --retry-failed runs it once more"
        say(line)
        if ranked:
            return not finite(ranked)
        return "failed" in outcomes and "complete" not in outcomes


def _ended(code: int) -> str:
    if code == worker.STOPPED:
        return "was stopped"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
