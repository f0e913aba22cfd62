"""The outer loop: an estimator's gradients, a torch optimizer's steps, a record of what happened.

    hyper = metaopt.Hyperparameters(opt, learn=("lr", "betas"))
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.05)
    result = metaopt.meta_train(task, opt, hyper, metaopt.metagrad.Unrolled(60), meta_optimizer, steps=50)

Clipping of the meta-gradient is torch's own: ``meta_optimizer.register_step_pre_hook``.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable
from signal import Signals
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Generator, nn

from metaopt.checks import check_count
from metaopt.functional import Optimizer
from metaopt.memory import resident
from metaopt.metagrad import Estimator
from metaopt.tasks import Task, TaskBatch
from metaopt.tracking import Nothing, Run, Tracker, complete
from metaopt.train.checkpoint import CheckpointError, Checkpoints
from metaopt.train.diagnosis import NonFiniteError, diagnose, explosion, not_finite
from metaopt.train.interruption import Interruption, Stopped
from metaopt.train.progress import Progress
from metaopt.train.report import grads_by_name, report, schedules
from metaopt.train.result import MetaTrainResult
from metaopt.train.resume import Parts, Saver
from metaopt.unroll.randomness import Snapshot

# With "skip": this many meta-steps in a row without a finite gradient are one too many.
_MOST_SKIPPED = 10
# A meta-gradient this many times the meta-loss says that a change of a millionth is felt: the unroll is chaotic.
_EXPLODED = 1e6
# How many looks a tracked run takes at the training that its hyperparameters give.
_REPORTS = 10


def meta_train(
    task: Task | TaskBatch,
    opt: Optimizer,
    hyper: nn.Module,
    estimator: Estimator,
    meta_optimizer: torch.optim.Optimizer,
    steps: int = 50,
    checkpoint: str | os.PathLike[str] | None = None,
    tracker: Tracker | None = None,
    generator: Generator | None = None,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> MetaTrainResult:
    """Learn ``hyper`` by gradient descent on the meta-loss.

    Where ``torch.distributed`` is initialized, its processes share the runs of the task, or the pairs of `ES` and its
    kind; see `metaopt.metagrad.Ranks`. All of them call this with the same arguments, return the same, stop after the
    same meta-step, and begin with the hyperparameters and the randomness of the first, which alone tracks, prints and
    writes checkpoints. A checkpoint may be resumed by another number of processes.

    Args:
        task: what is learned on; a `metaopt.tasks.TaskBatch` draws new tasks for every meta-gradient.
        opt: the inner optimizer.
        hyper: a module whose call returns a mapping of values, such as `metaopt.Hyperparameters`; one that has a method
            ``numbers()``, as that has, gets its values into the history.
        estimator: of the meta-gradient, such as `metaopt.metagrad.Unrolled`.
        meta_optimizer: any ``torch.optim`` optimizer over ``hyper.parameters()``.
        steps: meta-steps in all, those of the run that a checkpoint continues included; >= 1.
        checkpoint: a folder. A run started again with the same folder goes on from its last checkpoint, bit for bit on
            a CPU, and returns its result at once if it had finished. The last three checkpoints are kept; they are
            written as often as that takes no more than a twentieth of the time. A run with another hyper, optimizer,
            estimator or kind of meta-optimizer is refused; the task, starting values and options of the meta-optimizer
            are not compared, and the checkpoint's values and options are taken. SIGTERM and Ctrl-C end the run after
            the meta-step in hand, with a checkpoint; a second one ends it at once.
        tracker: gets ``log(metrics, step)`` once per meta-step; one of `metaopt.tracking` also gets learning curves,
            schedules, and the final hyperparameters as an artifact. A resumed run logs the steps after its checkpoint
            again, and has a tracker drop what it has of them.
        generator: for the task's randomness; None is torch's default generator.
        scheduler: of the meta-optimizer's learning rate, stepped after each meta-step (``ReduceLROnPlateau`` with the
            meta-loss) and part of the checkpoint.
        on_nonfinite: what to do if meta-loss or meta-gradient is NaN or infinite: "raise" repeats the unroll to say
            where it began; "skip" leaves the hyperparameters as they are, begins new unrolls, and counts.
        progress: show a progress bar in a terminal or a notebook, a line now and then in a log file.

    Returns:
        The meta-losses, the history and the best hyperparameters. ``hyper`` holds the last ones.

    Raises:
        ValueError: ``steps`` below 1, an unknown ``on_nonfinite``, a meta-optimizer that holds none of hyper's
            parameters or steps by a closure, a scheduler of another optimizer, a learned value on which the
            meta-loss does not depend, fewer runs or pairs than processes.
        TypeError: a single task, which several processes cannot share; a ``checkpoint`` that is no path.
        metaopt.train.CheckpointError: the folder is in use, cannot be written to, holds another run or more steps, or
            has no readable checkpoint left.
        metaopt.train.NonFiniteError: see ``on_nonfinite``; also after ten skipped meta-steps in a row.
        metaopt.train.Stopped: a ``SystemExit`` after a signal, with ``checkpoint``.

    Warns:
        UserWarning: the meta-gradient explodes; a checkpoint was passed over, or cannot be written any more.

    Example:
        >>> import metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.01)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.3)
        >>> result = meta_train(
        ...     task, opt, hyper, metaopt.metagrad.Unrolled(steps=20), meta_optimizer, steps=30, progress=False,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> result.losses[-1] < 0.5 * result.losses[0]
        True
        >>> hyper.numbers()["lr"] > 0.1
        True
    """
    check_count("steps", steps)
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"on_nonfinite must be 'raise' or 'skip', got on_nonfinite={on_nonfinite!r}")
    held = {id(p) for group in meta_optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in hyper.parameters()):
        raise ValueError("meta_optimizer holds none of hyper's parameters: make it with hyper.parameters()")
    closure = inspect.signature(type(meta_optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"meta_optimizer must step without a closure, got {type(meta_optimizer).__name__}")
    if scheduler is not None and scheduler.optimizer is not meta_optimizer:
        raise ValueError(f"scheduler must be of meta_optimizer, got {type(scheduler).__name__} of another optimizer")
    parts = Parts(opt, hyper, estimator, meta_optimizer, scheduler, generator)
    ranks = parts.ranks
    ranks.check(estimator, task)
    ranks.align(hyper, generator)
    loop = _Loop(task, parts, steps, tracker, on_nonfinite)
    if checkpoint is None:
        loop.run(0, progress)
        return parts.result
    checkpoints = Checkpoints(checkpoint)
    with contextlib.ExitStack() as stack, Interruption(shown=ranks.first) as interruption:
        ranks.of_first(lambda: stack.enter_context(checkpoints).folder)  # the first has them open, for all
        saver = Saver(checkpoints, parts)
        done = saver.resume()
        if done > steps:
            raise CheckpointError(f"checkpoint={str(checkpoint)!r} has {done} meta-steps behind it, more than {steps=}")
        loop.run(done, progress, saver, interruption)
    return parts.result


class _Loop:
    """The meta-steps of a run."""

    def __init__(
        self,
        task: Task | TaskBatch,
        parts: Parts,
        steps: int,
        tracker: Tracker | None,
        on_nonfinite: Literal["raise", "skip"],
    ) -> None:
        self._task, self._parts, self._steps = task, parts, steps
        self._tracker = complete(tracker) if parts.ranks.first else Nothing()
        # A training run is a price that only those pay who can see it.
        self._looks = isinstance(tracker, Run) and not isinstance(self._tracker, Nothing)
        self._on_nonfinite = on_nonfinite
        self._limit = _EXPLODED

    def run(
        self, done: int, progress: bool, saver: Saver | None = None, interruption: Interruption | None = None
    ) -> None:
        """Take the steps that are left."""
        if done == self._steps:
            return
        parts, ranks = self._parts, self._parts.ranks
        if saver is not None:
            self._tracker.rewind(done)
        with Progress(self._steps, shown=progress and ranks.first, done=done) as bar:
            for step in range(done, self._steps):
                record = self._step(step)
                self._track(record, step)
                bar.update(record["meta_loss"], record.get("hyper", {}))
                if saver is None or interruption is None:
                    continue
                # Signals do not reach all processes at once, and their clocks differ: they stop and save together.
                requested, due = ranks.largest([interruption.requested or 0, ranks.first and saver.due])
                if requested:
                    saver.save(step + 1)
                    if ranks.first:
                        where = f"after meta-step {step + 1} of {self._steps}; start it again to go on"
                        print(f"stopped {where}", file=sys.stderr, flush=True)
                    raise Stopped(Signals(int(requested)))
                last = step + 1 == self._steps
                if due or last:
                    saver.save_or_warn(step + 1, last=last)
        if (numbers := _numbers(parts.hyper)) is not None:
            self._tracker.artifact("hyperparameters", numbers)

    def _step(self, step: int) -> dict[str, Any]:
        """One meta-step, and its record."""
        parts, hyper = self._parts, self._parts.hyper
        started = perf_counter()
        parts.meta_optimizer.zero_grad()
        hyper.zero_grad()  # it may have parameters that the meta-optimizer does not hold
        before = Snapshot(parts.generator)
        loss = parts.ranks.backward(parts.estimator, self._task, parts.opt, hyper, parts.generator).item()
        grads = grads_by_name(hyper)
        norms = {name: float(grad.norm()) for name, grad in grads.items()}
        record: dict[str, Any] = {
            "meta_loss": loss,
            "grad_norm": float(torch.nn.utils.get_total_norm(list(grads.values()))),
            "grad_norms": norms,
        }
        if (numbers := _numbers(hyper)) is not None:
            record["hyper"] = numbers
        trouble = not_finite(hyper, loss)
        if trouble is None:
            record["grad_snr"] = parts.signal.update(grads)
            parts.skipping = 0
            self._maybe_warn(record, before)
            parts.result.add(record, hyper)
            parts.meta_optimizer.step()
        else:
            self._skip_or_raise(step, trouble, before)
            parts.result.add(record | {"skipped": True}, hyper)
            record = parts.result.history[-1]
        if isinstance(parts.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            parts.scheduler.step(loss)
        elif parts.scheduler is not None:
            parts.scheduler.step()
        record["seconds"] = perf_counter() - started
        record["memory_mib"] = _memory()
        return record

    def _skip_or_raise(self, step: int, trouble: str, before: Snapshot) -> None:
        parts = self._parts
        parts.skipping += 1
        if self._on_nonfinite == "raise" or parts.skipping == _MOST_SKIPPED:
            parts.meta_optimizer.zero_grad()
            parts.hyper.zero_grad()
            often = f", for the {_MOST_SKIPPED}th time in a row" if self._on_nonfinite == "skip" else ""
            found = diagnose(self._task, parts.opt, parts.hyper, parts.estimator, before)
            raise NonFiniteError(f"meta-step {step}: {trouble}{often}. {found}")
        if hasattr(parts.estimator, "reset"):  # its unroll is spoilt
            parts.estimator.reset()

    def _maybe_warn(self, record: dict[str, Any], before: Snapshot) -> None:
        """Once, if the meta-gradient explodes."""
        ratio = record["grad_norm"] / max(1.0, abs(record["meta_loss"]))
        if ratio <= self._limit or not self._parts.ranks.first:
            return
        parts = self._parts
        why = explosion(self._task, parts.opt, parts.hyper, parts.estimator, before)
        if why is None:
            self._limit = 10 * ratio  # to look again costs an unroll
            return
        self._limit = math.inf
        warnings.warn(
            f"the meta-gradient explodes: norm {record['grad_norm']:.3g} at meta-loss {record['meta_loss']:.3g}. {why}",
            stacklevel=4,
        )

    def _track(self, record: dict[str, Any], step: int) -> None:
        """Log a step, and now and then what its hyperparameters lead to: at the first, the last, ten times in all."""
        horizon = getattr(self._parts.estimator, "steps", None)
        due = step % max(1, self._steps // _REPORTS) == 0 or step == self._steps - 1
        if not (self._looks and due and isinstance(horizon, int)):
            self._tracker.log(record, step)
            return
        with torch.no_grad():
            seen = report(self._task, self._parts.opt, self._parts.hyper(), horizon, self._parts.generator)
        record.update(seen.figures)
        self._tracker.log(record, step)
        self._tracker.curves("train", {"inner_step": range(horizon), "train/loss": seen.train}, step)
        points = seen.validation
        self._tracker.curves("validation", {"inner_step": list(points), "validation/loss": list(points.values())}, step)
        learned = dict(schedules(record.get("hyper", {})))
        for length in sorted({len(schedule) for schedule in learned.values()}):
            columns = {name: schedule for name, schedule in learned.items() if len(schedule) == length}
            self._tracker.curves("schedule", {"inner_step": range(length), **columns}, step)


def _numbers(hyper: nn.Module) -> dict[str, Any] | None:
    """Of `metaopt.Hyperparameters`, or of another module that can tell them."""
    numbers: Callable[[], dict[str, Any]] | None = getattr(hyper, "numbers", None)
    return None if numbers is None else numbers()


def _memory() -> dict[str, float]:
    memory = {"process": resident() / 2**20}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return memory
