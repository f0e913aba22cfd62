"""What a sweep has found so far: tables for the terminal."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metaopt.sweeps.definition import Sweep, SweepError
from metaopt.sweeps.engine import check_started, default_storage, folder
from metaopt.sweeps.process import alive
from metaopt.sweeps.storage import Timing, one_line, open_storage
from metaopt.sweeps.study import best, find, finite, in_words, latest, outcome, size, why

_QUICK = Timing(patience=10.0)  # nobody waits a minute for a table
_OUTCOMES = ("complete", "pruned", "failed", "running", "cut off", "waiting")


def load(sweep: Sweep, storage: str | None) -> optuna.Study:
    """The study of a sweep, for reading.

    Raises:
        SweepError: it has not been started.
        StorageError: the database cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if storage is None:
        storage = default_storage(sweep)
        check_started(sweep)
    database = open_storage(storage, _QUICK, create=False)
    with one_line(storage):
        return find(sweep, database)


def status(sweep: Sweep, storage: str | None = None, console: Console | None = None) -> None:
    """Print how far a sweep is.

    Raises:
        SweepError: it has not been started.
        StorageError: the database cannot be used.
    """
    console = console or Console()
    with one_line(storage or default_storage(sweep)):
        study = load(sweep, storage)
        trials = latest(study.get_trials(deepcopy=False))
    outcomes = {number: _outcome(trial) for number, trial in trials.items()}
    console.print(f"sweep {sweep.name}", markup=False)
    table = Table()
    table.add_column("trials")
    table.add_column("", justify="right")
    for name in _OUTCOMES:
        count = sum(found == name for found in outcomes.values())
        if count:
            table.add_row(name, str(count))
    total = size(sweep)
    table.add_row("all" if total is None else f"of {total}", str(len(trials)), style="dim")
    console.print(table)
    ranked = best(trials, sweep)
    if ranked and sweep.metric is not None:
        number, trial = ranked[0]
        console.print(
            f"best {sweep.metric.name} {in_words(trial.value)}: trial {number}, {_words(trial)}", markup=False
        )
    running = [number for number, found in outcomes.items() if found == "running"]
    if running:
        console.print(_listed("running", {number: trials[number] for number in running}, "for", _age))
    failed = {number: trials[number] for number, found in outcomes.items() if found == "failed"}
    if failed:
        console.print(_listed("failed", failed, "because", why))


def show(sweep: Sweep, storage: str | None = None, top: int = 10, console: Console | None = None) -> Path | None:
    """Print the best trials and which parameters mattered, and save a picture.

    Args:
        sweep: as read from a file.
        storage: address of its database.
        top: how many trials.
        console: where to print.

    Returns:
        The picture, if there was something to draw.

    Raises:
        SweepError: it has not been started, or has no metric.
        StorageError: the database cannot be used.
    """
    console = console or Console()
    if sweep.metric is None:
        raise SweepError("metric: the file has none, so no trial is better than another")
    with one_line(storage or default_storage(sweep)):
        study = load(sweep, storage)
        trials = latest(study.get_trials(deepcopy=False))
    ranked = best(trials, sweep)
    if not ranked:
        console.print("no trial is complete yet")
        return None
    names = _varied(trials)
    console.print(f"sweep {sweep.name}: the best of {len(ranked)} complete trials", markup=False)
    table = Table()
    for heading in ("trial", sweep.metric.name, *names):
        table.add_column(heading, justify="right")
    for number, trial in ranked[:top]:
        config = trial.user_attrs["config"]
        table.add_row(str(number), in_words(trial.value), *(escape(_word(config.get(name))) for name in names))
    console.print(table)
    if not finite(ranked):
        console.print(f"no trial has a finite {sweep.metric.name}: importance of parameters not known", markup=False)
        return None
    _importances(study, console)
    return _picture(sweep, trials, names, console)


def _importances(study: optuna.Study, console: Console) -> None:
    """How much of what is good each parameter explains (PED-ANOVA)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError, ImportError) as problem:
        console.print(f"importance of parameters: not known ({problem})", markup=False)
        return
    # A parameter that Optuna draws by another variable bears that one's name after a slash.
    words = [f"{name.partition('/')[0]} {share:.0%}" for name, share in found.items()]
    console.print(f"importance of parameters: {', '.join(words) or 'not known (none varies)'}", markup=False)


def _picture(sweep: Sweep, trials: Mapping[int, FrozenTrial], names: list[str], console: Console) -> Path | None:
    try:
        from metaopt.sweeps.picture import draw
    except ImportError:
        console.print('no picture: it needs matplotlib, pip install "metaopt[plots]"', markup=False)
        return None
    path = folder(sweep) / "sweep.svg"
    draw(sweep, trials, names, path)
    console.print(f"picture: {path}", markup=False)
    return path


def _outcome(trial: FrozenTrial) -> str:
    """As `outcome`, and "cut off" for a trial whose worker has gone but was not missed yet."""
    worker = trial.user_attrs.get("worker", {})
    gone = trial.state is TrialState.RUNNING and worker.get("trial") == trial.number and alive(worker) is False
    return "cut off" if gone else outcome(trial)


def _varied(trials: Mapping[int, FrozenTrial]) -> list[str]:
    """The parameters that differ between trials."""
    configs = [trial.user_attrs.get("config", {}) for trial in trials.values()]
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({repr(config.get(name)) for config in configs if config}) > 1]


def _listed(title: str, trials: Mapping[int, FrozenTrial], heading: str, say: Callable[[FrozenTrial], str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("trial", heading, "parameters"):
        table.add_column(column)
    for number, trial in trials.items():
        table.add_row(str(number), escape(say(trial)), escape(_words(trial)))
    return table


def _age(trial: FrozenTrial) -> str:
    seconds = int(time.time() - (trial.datetime_start or datetime.now()).timestamp())
    minutes, seconds = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _words(trial: FrozenTrial) -> str:
    config: Mapping[str, Any] = trial.user_attrs.get("config", {})
    return " ".join(f"{name}={_word(value)}" for name, value in config.items())


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
