"""A worker: takes up one trial after the other until nothing is left.

Taking up is done by one worker at a time, of all on all machines: under the lock, what was cut off is queued again and
a trial is drawn. So no point is taken twice, and run_cap is kept to the letter. Optuna's ``study.optimize`` runs each
trial, as heartbeats are beaten nowhere else; the lock is given back inside it, once the trial has its parameters.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.trial import TrialState

from metaopt.sweeps import process
from metaopt.sweeps.definition import Sweep, SweepError
from metaopt.sweeps.metric import Metric
from metaopt.sweeps.storage import ERRORS, StorageError, Timing, exclusive, one_line, open_storage
from metaopt.sweeps.study import Queue, find, in_one_line, in_words, recover, root
from metaopt.sweeps.trial import Failed, Pruned, Stopped, run_trial

# What a worker ends with
DONE, STOPPED, STORAGE, REFUSED = 0, 10, 11, 12
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(sweep: Sweep, url: str, folder: Path, timing: Timing, complain: bool) -> None:
    """A worker's process; ``complain``: whether it says that the database is away, which its predecessor may have."""
    worker = Worker(sweep, folder, timing)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    signal.signal(signal.SIGTERM, worker.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    process.die_with_parent(signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it died in between
        sys.exit(STOPPED)
    try:
        with one_line(url):
            worker.work(url)
    except StorageError as error:
        if complain:
            say(str(error), sys.stderr)
        sys.exit(STORAGE)
    except (SweepError, OSError) as error:
        say(str(error), sys.stderr)
        sys.exit(REFUSED)
    sys.exit(STOPPED if worker.stopping else DONE)


def say(line: str, stream: Any = None) -> None:
    """One line, whole, of several processes that share an output."""
    stream = stream or sys.stdout
    stream.write(line + "\n")
    stream.flush()


class Worker:
    """Takes up trials and runs them.

    Args:
        sweep: as read from its file.
        folder: for its results.
        timing: heartbeats and graces.
    """

    def __init__(self, sweep: Sweep, folder: Path, timing: Timing) -> None:
        self._sweep, self._folder, self._timing = sweep, folder, timing
        self._study: optuna.Study
        self._taking = ExitStack()  # holds the lock while a trial is taken up
        self._numbers: list[int] = []  # of the trials so far, the present one last
        self.stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM."""
        self.stopping = True

    def work(self, url: str) -> None:
        """Run trials until none is left, or `stop`."""
        storage = open_storage(url, self._timing, create=False)
        self._study = find(self._sweep, storage)
        queue = Queue(self._study, self._sweep)
        while not self.stopping:
            with self._taking:
                self._taking.enter_context(exclusive(storage, str(self._sweep.name)))
                recover(self._study)
                if queue.ready():
                    self._one()
                    continue
            # A trial of a sibling that is cut off now brings a new worker; one from elsewhere does not.
            if not any(_elsewhere(trial) for trial in self._study.get_trials(deepcopy=False)):
                return
            self._wait()
        with exclusive(storage, str(self._sweep.name)):
            recover(self._study)

    def _one(self) -> None:
        """Run one trial."""
        before = len(self._numbers)
        try:
            self._study.optimize(self._objective, n_trials=1, catch=(Failed, Stopped))
        except UnboundLocalError as error:  # Optuna's own, after the database went away while it recorded the end
            if isinstance(error.__context__, ERRORS):
                raise error.__context__ from error.__context__.__cause__
            raise
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            trials = self._study.get_trials(deepcopy=False)
            if len(self._numbers) == before or trials[self._numbers[-1]].state is not TrialState.FAIL:
                raise
            say(f"trial {root(trials[self._numbers[-1]])} was given up by the others, as no sign of life reached them")

    def _wait(self) -> None:
        end = time.monotonic() + self._timing.heartbeat
        while time.monotonic() < end and not self.stopping:
            time.sleep(0.1)

    def _objective(self, trial: optuna.Trial) -> float:
        self._numbers.append(trial.number)
        known = trial.user_attrs
        config = known.get("config")
        if config is None:
            config = self._sweep.suggest(trial)
            trial.set_user_attr("config", config)
        by = {"trial": trial.number, "engine": os.getppid(), **process.mark(os.getpid())}
        trial.set_user_attr("worker", by)
        number = root(self._study.get_trials(deepcopy=False)[trial.number])
        self._taking.close()  # the lock

        folder = self._folder / "trials" / str(number)
        reporter = _Reporter(trial, self._study, self, self._timing)
        started = time.monotonic()
        try:
            if self.stopping:
                raise Stopped
            value = run_trial(self._sweep, config, folder, self._study.user_attrs["id"], self._timing, reporter.look)
        except Failed as error:
            trial.set_user_attr("error", str(error))
            say(f"trial {number} failed: {in_one_line(str(error))}; see {folder / 'output.log'}")
            raise
        except Pruned:
            say(f"trial {number} pruned after {time.monotonic() - started:.1f} s")
            raise optuna.TrialPruned from None
        except Stopped:
            trial.set_user_attr("stops", int(known.get("stops", 0)) + 1)
            say(f"trial {number} stopped, to go on later")
            raise
        named = f": {self._sweep.metric.name} {in_words(value)}" if self._sweep.metric is not None else " complete"
        say(f"trial {number}{named} ({time.monotonic() - started:.1f} s)")
        return value


def _elsewhere(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial is run by others than this process and its siblings."""
    worker = trial.user_attrs.get("worker", {})
    here = process.alive(worker) and worker["engine"] == os.getppid()
    return trial.state is TrialState.RUNNING and not here


class _Reporter:
    """Looks at a running trial once in a while."""

    def __init__(self, trial: optuna.Trial, study: optuna.Study, worker: Worker, timing: Timing) -> None:
        self._trial, self._study, self._worker = trial, study, worker
        self._prunes = not isinstance(study.pruner, optuna.pruners.NopPruner)
        self._reported: list[float] = []
        self._interval = timing.heartbeat
        self._asked = time.monotonic()

    def look(self, metric: Metric | None, *, ended: bool) -> None:
        """Report what was logged.

        Raises:
            Pruned: the study's pruner says so.
            Stopped: the worker is to stop, or the others have given this trial up and it is not ours any more.
        """
        if not ended and (self._worker.stopping or self._given_up()):
            raise Stopped
        if metric is not None and self._prunes and self._report(metric.history()) and not ended:
            raise Pruned

    def _report(self, values: list[float]) -> bool:
        """Hand what is new to the pruner; whether it would stop the trial."""
        known = self._reported
        same = next((i for i, pair in enumerate(zip(values, known, strict=False)) if not _equal(*pair)), len(known))
        for step in range(same, len(values)):
            self._trial.report(values[step], step)
        self._reported = values
        return len(values) > same and self._trial.should_prune()

    def _given_up(self) -> bool:
        if time.monotonic() - self._asked < self._interval:
            return False
        self._asked = time.monotonic()
        try:
            trial = self._study.get_trials(deepcopy=False)[self._trial.number]
        except ERRORS:  # the database is away for a while
            return False
        return trial.state is not TrialState.RUNNING


def _equal(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)
