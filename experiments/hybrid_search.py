"""Hybrid search: what can be differentiated is learned inside each trial, and the sweep searches the rest.

    python -m experiments.hybrid_search [--resume]

Three sweeps over the same networks and the same hyperparameters of RAdam, on digits: at random, by Bayesian
optimization, and hybrid (their files are in ``experiments/sweeps``, the program of their trials is
``experiments/hybrid.py``). Each runs several times. They are compared in the inner training steps that they take, those
of the hypergradients counted, until they find the validation loss that the searches without hypergradients end with.

The sweeps and their trials are in ``runs/sweeps/hybrid-search-*``.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from matplotlib.figure import Figure
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from experiments.parts.session import Tracked, options, session
from experiments.parts.study import save_figure
from metaopt.sweeps import Sweep, engine, read, report
from metaopt.sweeps.metric import Metric
from metaopt.sweeps.study import latest

Kind = Literal["random", "bayes", "hybrid"]
ALONE: tuple[Kind, ...] = ("random", "bayes")
FILES = Path(__file__).parent / "sweeps"
FIGURES = ("validation/loss", "test/loss", "inner_steps", "seconds")
COLORS = {"random": "tab:gray", "bayes": "tab:blue", "hybrid": "tab:red"}


@dataclass(frozen=True)
class Config(Tracked):
    """Compare hybrid search with random and Bayesian search alone."""

    repeats: int = 2
    """Sweeps of each kind."""
    workers: int = 2
    """Trials that run at a time."""
    trials: int | None = None
    """Of each sweep; None for the run_cap of its file."""
    out: Path = Path("runs/hybrid_search")
    """Folder for hybrid_search.svg, table.md, config.yaml and record.jsonl."""

    def __post_init__(self) -> None:
        for name in ("repeats", "workers", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={value}")


@dataclass(frozen=True)
class Trial:
    """What a trial found and took.

    Attributes:
        validation_loss, test_loss: on fresh seeds.
        inner_steps: training steps of all its networks, learning included.
        seconds: of training, without the start of its process.
    """

    validation_loss: float
    test_loss: float
    inner_steps: int
    seconds: float


Sweeps = Mapping[Kind, Sequence[Sequence[Trial]]]


def best_so_far(trials: Iterable[Trial]) -> list[Trial]:
    """After each trial: the losses of the one with the lowest validation loss so far, and what all have taken.

    Example:
        >>> [best.inner_steps for best in best_so_far([Trial(2, 2, 10, 1), Trial(1, 2, 30, 1), Trial(3, 1, 5, 1)])]
        [10, 40, 45]
    """
    course: list[Trial] = []
    best, steps, seconds = Trial(math.inf, math.nan, 0, 0.0), 0, 0.0
    for trial in trials:
        steps, seconds = steps + trial.inner_steps, seconds + trial.seconds
        if trial.validation_loss < best.validation_loss:  # one that is not a number is not
            best = trial
        course.append(replace(best, inner_steps=steps, seconds=seconds))
    return course


def until(trials: Iterable[Trial], loss: float) -> Trial | None:
    """What it took to find a validation loss as low as this one; None if it was not found."""
    return next((best for best in best_so_far(trials) if best.validation_loss <= loss), None)


def search(kind: Kind, repeat: int, config: Config) -> list[Trial]:
    """Run a sweep by the local engine, or go on with it; its trials in the order in which they ended."""
    sweep = read(FILES / f"{kind}.yaml")
    sweep = replace(sweep, name=f"hybrid-search-{kind}-{repeat}", run_cap=config.trials or sweep.run_cap)
    place = engine.folder(sweep)
    if not config.resume:
        shutil.rmtree(place, ignore_errors=True)
    begin = engine.resume if (place / "sweep.db").exists() else engine.run
    print(f"{sweep.name}: {sweep.run_cap} trials", flush=True)
    code = begin(sweep, workers=config.workers)
    if code:
        print("the study goes on with --resume", file=sys.stderr)
        sys.exit(code)
    return found(sweep)


def found(sweep: Sweep) -> list[Trial]:
    """The trials of a sweep by its database, with the figures that they have logged."""
    trials = latest(report.load(sweep, None).get_trials(deepcopy=False))
    done = {number: trial for number, trial in trials.items() if trial.state is TrialState.COMPLETE}
    order = sorted(done, key=lambda number: (done[number].datetime_complete, number))
    return [logged(engine.folder(sweep) / "trials" / str(number)) for number in order]


def logged(folder: Path) -> Trial:
    """The figures of a trial.

    Raises:
        ValueError: it has not logged one of them.
    """
    figures = {name: Metric(folder, name).final() for name in FIGURES}
    values = [value for value in figures.values() if value is not None]
    if len(values) < len(figures):
        raise ValueError(f"{folder} must have logged {', '.join(figures)}, got {figures}")
    validation, test, steps, seconds = values
    return Trial(validation, test, round(steps), seconds)


def ends(sweeps: Sweeps) -> list[tuple[str, ...]]:
    """Rows: what each sweep ended with."""
    rows: list[tuple[str, ...]] = [("search", "sweep", "trials", "inner steps", "s", "validation loss", "test loss")]
    for kind, repeats in sweeps.items():
        for repeat, trials in enumerate(repeats):
            end = best_so_far(trials)[-1]
            losses = (f"{end.validation_loss:.3f}", f"{end.test_loss:.3f}")
            rows.append((kind, str(repeat), str(len(trials)), f"{end.inner_steps:,}", f"{end.seconds:.0f}", *losses))
    return rows


@dataclass(frozen=True)
class Comparison:
    """How soon the hybrid sweeps found the loss that another sweep ended with.

    Attributes:
        kind, repeat: of the other sweep.
        loss: its lowest validation loss.
        to_it: what it took until then.
        whole: what it took in all.
        hybrid: what each hybrid sweep took to find a loss as low; None for one that did not.
    """

    kind: Kind
    repeat: int
    loss: float
    to_it: Trial
    whole: Trial
    hybrid: tuple[Trial | None, ...]

    @property
    def steps(self) -> float:
        """Inner steps of the median hybrid sweep; infinite if that did not find it."""
        return median(float("inf") if trial is None else trial.inner_steps for trial in self.hybrid)


def comparisons(sweeps: Sweeps) -> list[Comparison]:
    """Each sweep without hypergradients against all the hybrid ones."""
    compared = []
    for kind in ALONE:
        for repeat, trials in enumerate(sweeps[kind]):
            whole = best_so_far(trials)[-1]
            to_it = until(trials, whole.validation_loss)
            assert to_it is not None
            hybrid = tuple(until(other, whole.validation_loss) for other in sweeps["hybrid"])
            compared.append(Comparison(kind, repeat, whole.validation_loss, to_it, whole, hybrid))
    return compared


def equal_losses(compared: Iterable[Comparison]) -> list[tuple[str, ...]]:
    """Rows: inner steps at equal validation loss."""
    head = (
        "search",
        "sweep",
        "validation loss",
        "inner steps",
        "until found",
        "hybrid, each sweep",
        "of all",
        "of until",
        "s",
        "hybrid, s",
    )
    rows: list[tuple[str, ...]] = [head]
    for one in compared:
        steps = ", ".join("not found" if trial is None else f"{trial.inner_steps:,}" for trial in one.hybrid)
        seconds = ", ".join("-" if trial is None else f"{trial.seconds:.0f}" for trial in one.hybrid)
        shares = (f"{one.steps / one.whole.inner_steps:.2f}", f"{one.steps / one.to_it.inner_steps:.2f}")
        spent = (f"{one.whole.inner_steps:,}", f"{one.to_it.inner_steps:,}")
        rows.append(
            (one.kind, str(one.repeat), f"{one.loss:.3f}", *spent, steps, *shares, f"{one.whole.seconds:.0f}", seconds)
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one being the head, for a README."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def draw(figure: Figure, sweeps: Sweeps) -> None:
    """The best validation loss so far against the inner steps taken, a line for each sweep."""
    axes = figure.subplots()
    for kind, repeats in sweeps.items():
        for repeat, trials in enumerate(repeats):
            course = best_so_far(trials)
            steps, losses = [best.inner_steps for best in course], [best.validation_loss for best in course]
            label = kind if repeat == 0 else None
            axes.step(steps, losses, where="post", color=COLORS[kind], alpha=0.8, label=label)
            axes.plot(steps[-1], losses[-1], "o", color=COLORS[kind], markersize=3)
    axes.set(xlabel="inner training steps", ylabel="best validation loss so far", xscale="log", yscale="log")
    ticks = [0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()


def main(config: Config) -> list[Comparison]:
    """Run the sweeps, compare, print the tables, save the figure."""
    with session(config, "hybrid_search") as run:
        os.environ.setdefault("WANDB_MODE", "disabled")  # of the trials, which are many and short
        kinds: tuple[Kind, ...] = (*ALONE, "hybrid")
        found: dict[Kind, list[list[Trial]]] = {kind: [] for kind in kinds}
        for repeat in range(config.repeats):  # of all kinds in turn, as the machine's load changes
            for kind in kinds:
                found[kind].append(search(kind, repeat, config))
        compared = comparisons(found)
        content: dict[str, Any] = {
            kind: [[asdict(trial) for trial in trials] for trials in found[kind]] for kind in kinds
        }
        run.tracker.artifact("trials", content)
    tables = {
        "Where each sweep ended": ends(found),
        "Inner steps to the loss that a search alone ended with": equal_losses(compared),
    }
    console = Console(width=max(Console().width, 128))
    for title, (head, *rows) in tables.items():
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    (config.out / "table.md").write_text("\n".join(map(markdown, tables.values())), encoding="utf-8")
    path = config.out / "hybrid_search.svg"
    save_figure(path, lambda figure: draw(figure, found), (6.4, 3.6))
    console.print(f"figure in {path}, tables in {config.out / 'table.md'}")
    return compared


if __name__ == "__main__":
    main(options(Config, __doc__))
