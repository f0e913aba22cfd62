"""The record of a sweep: an Optuna study that knows its file, its points and which of its trials were cut off.

A trial that is cut off (its worker was killed, its machine went away, somebody pressed Ctrl-C) is queued again as a new
trial with the same configuration, as Optuna does. The first of such a line is its root, whose number names the folder
of results, so that the next one finds the checkpoint. What failed by its own fault has the attribute "error".
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from metaopt.sweeps.definition import Sweep, SweepError
from metaopt.sweeps.process import alive
from metaopt.sweeps.storage import Storage

DEATHS = 5  # of its workers, after which a trial is taken for the cause

_SAME = ("method", "metric", "parameters")


def create(sweep: Sweep, storage: Storage) -> optuna.Study:
    """A new study.

    Raises:
        SweepError: there is one of this name.
    """
    try:
        study = optuna.create_study(storage=storage, study_name=str(sweep.name), direction=_direction(sweep))
    except optuna.exceptions.DuplicatedStudyError:
        raise SweepError(
            f"sweep {sweep.name!r} has been started already: go on with metaopt sweep resume, "
            "or give the new one another name: in its file"
        ) from None
    study.set_user_attr("id", uuid.uuid4().hex)
    study.set_user_attr("text", sweep.text)
    return study


def find(sweep: Sweep, storage: Storage) -> optuna.Study:
    """The study that was created from a sweep's file.

    Raises:
        SweepError: there is none, or it was created from a file with another method, metric or parameters.
    """
    try:
        study = optuna.load_study(
            study_name=str(sweep.name), storage=storage, sampler=_sampler(sweep), pruner=_pruner(sweep)
        )
    except KeyError:
        raise SweepError(f"sweep {sweep.name!r} has not been started: metaopt sweep run does that") from None
    known = study.user_attrs
    # Somebody may have been killed in the middle of create.
    if "id" not in known:
        study.set_user_attr("id", uuid.uuid4().hex)
    if "text" not in known:
        study.set_user_attr("text", sweep.text)
        return study
    before, now = (yaml.safe_load(text) for text in (known["text"], sweep.text))
    changed = [key for key in _SAME if before.get(key) != now.get(key)]
    if changed:
        raise SweepError(
            f"{' and '.join(changed)} changed in the file since sweep {sweep.name!r} was started: "
            "change back, or give the new one another name: in its file"
        )
    return study


def _direction(sweep: Sweep) -> Literal["minimize", "maximize"]:
    return sweep.metric.goal if sweep.metric is not None else "minimize"


def _sampler(sweep: Sweep) -> optuna.samplers.BaseSampler:
    """TPE for method bayes: it takes conditions, choices and pruned trials as they come, needs no torch, and stays out
    of the way of trials that still run (constant_liar)."""
    if sweep.method != "bayes":
        return optuna.samplers.RandomSampler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(constant_liar=True)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    if sweep.early_terminate is None:
        return optuna.pruners.NopPruner()
    from metaopt.sweeps.hyperband import HyperbandPruner

    return HyperbandPruner(sweep.early_terminate)


class Queue:
    """What a sweep still has to run. All of it is to be called under the lock.

    Args:
        study: of the sweep.
        sweep: as read from its file.
    """

    def __init__(self, study: optuna.Study, sweep: Sweep) -> None:
        self._study, self._sweep = study, sweep
        # The points come one by one: a grid of a thousand would take half a minute to be written down at once.
        self._points = sweep.grid()[: sweep.run_cap] if sweep.method == "grid" else []
        self._distributions = _choices(self._points)

    def ready(self) -> bool:
        """Whether the next trial that the study asks for is one to run; a grid's next point is put in its queue."""
        trials = latest(self._study.get_trials(deepcopy=False))
        if reached(trials, self._sweep):
            return False
        if any(outcome(trial) == "waiting" for trial in trials.values()):
            return True
        if self._sweep.method != "grid":
            return self._sweep.run_cap is None or len(trials) < self._sweep.run_cap
        taken = {trial.user_attrs["point"] for trial in trials.values()}
        number = next((number for number in range(len(self._points)) if number not in taken), None)
        if number is not None:
            self._add(number, self._points[number])
        return number is not None

    def _add(self, number: int, point: dict[str, Any]) -> None:
        self._study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params={name: point[name] for name in self._distributions},
                distributions=self._distributions,
                user_attrs={"point": number, "config": point},
            )
        )


def size(sweep: Sweep) -> int | None:
    """How many trials there will be; None if it goes on until somebody stops it."""
    if sweep.method != "grid":
        return sweep.run_cap
    count = math.prod(len(distribution.values()) for distribution in sweep.parameters.values())
    return count if sweep.run_cap is None else min(count, sweep.run_cap)


def _choices(points: list[dict[str, Any]]) -> dict[str, BaseDistribution]:
    """What Optuna is to know of a grid: the parameters that vary, as far as they are plain values."""
    choices: dict[str, BaseDistribution] = {}
    for name in points[0] if points else ():
        values = [point[name] for point in points]
        if all(isinstance(value, bool | int | float | str) for value in values):
            distinct = tuple(dict.fromkeys(values))
            if len(distinct) > 1:
                choices[name] = CategoricalDistribution(distinct)
    return choices


def recover(study: optuna.Study) -> None:
    """Queue again what was cut off. To be called under the lock.

    Cut off is: a trial whose worker is gone from this machine, one that shows no sign of life from another, one whose
    worker died while it took the trial up, and one that failed without an error of its own.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker is None or worker["trial"] != trial.number or alive(worker) is False:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        fail_stale_trials(study)
    for trial in latest(study.get_trials()).values():
        if outcome(trial) == "cut off":
            _again(study, trial)


def retry_failed(study: optuna.Study) -> None:
    """Queue again, once, what failed by its own fault, with the same parameters. To be called under the lock."""
    for trial in latest(study.get_trials()).values():
        if outcome(trial) == "failed":
            if trial.user_attrs.pop("error", None) is not None:
                trial.user_attrs["stops"] = int(trial.user_attrs.get("stops", 0)) + 1  # no worker died of it
            _again(study, trial)


def _again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the successor of the last trial of a line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        again = RetryHeartbeatStaleTrialCallback()
    again(study, trial)


def root(trial: FrozenTrial) -> int:
    """The number of the first trial of the line that a trial goes on with."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def latest(trials: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Root -> the last of its line."""
    return {root(trial): trial for trial in sorted(trials, key=lambda trial: trial.number)}


def outcome(trial: FrozenTrial) -> str:
    """What became of the last trial of a line: "waiting", "running", "complete", "pruned", "failed" or "cut off"."""
    if trial.state is not TrialState.FAIL:
        return trial.state.name.lower()
    return "failed" if "error" in trial.user_attrs or deaths(trial) >= DEATHS else "cut off"


def deaths(trial: FrozenTrial) -> int:
    """How many workers have died with a line, its last trial, which has failed, among them."""
    return len(trial.system_attrs.get("retry_history", ())) + 1 - int(trial.user_attrs.get("stops", 0))


def why(trial: FrozenTrial) -> str:
    """Why a trial failed, in one line."""
    return in_one_line(trial.user_attrs.get("error", f"its worker died {deaths(trial)} times"))


def in_one_line(error: str) -> str:
    """The error of a trial, and the last line that its program has printed.

    Example:
        >>> in_one_line("the program ended with exit code 1\\nTraceback\\nValueError: no")
        'the program ended with exit code 1 (ValueError: no)'
    """
    first, *printed = error.splitlines()
    return f"{first} ({printed[-1].strip()})" if printed else first


def best(trials: Mapping[int, FrozenTrial], sweep: Sweep) -> list[tuple[int, FrozenTrial]]:
    """Complete trials by root, the best first; none if the sweep has no metric."""
    if sweep.metric is None:
        return []
    sign = -1.0 if sweep.metric.goal == "maximize" else 1.0
    done = [(number, trial) for number, trial in trials.items() if trial.state is TrialState.COMPLETE]
    return sorted(done, key=lambda item: sign * (item[1].value or 0.0))


def reached(trials: Mapping[int, FrozenTrial], sweep: Sweep) -> bool:
    """Whether the best trial is as good as the sweep's target."""
    ranked = best(trials, sweep)
    if not ranked or sweep.metric is None or sweep.metric.target is None:
        return False
    value = float(ranked[0][1].value or 0.0)
    return value >= sweep.metric.target if sweep.metric.goal == "maximize" else value <= sweep.metric.target


def finite(ranked: Iterable[tuple[int, FrozenTrial]]) -> bool:
    """Whether any of the complete trials has a metric that is a finite number."""
    return any(math.isfinite(trial.value or 0.0) for _, trial in ranked)


def in_words(value: float | None) -> str:
    """A metric in words: what stands for one that is not finite (`worst`) was measured by nobody.

    Example:
        >>> in_words(0.25), in_words(math.inf)
        ('0.25', 'not finite')
    """
    return f"{value:.6g}" if value is not None and math.isfinite(value) else "not finite"


def worst(sweep: Sweep) -> float:
    """What counts in place of a metric that is not a finite number: search is to learn that such a run diverged."""
    return -math.inf if _direction(sweep) == "maximize" else math.inf
