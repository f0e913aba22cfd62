"""The figure of the main job: meta-loss, hyperparameter trajectories, learned schedules, training before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.parts.evaluation import Result

History = list[dict[str, Any]]


def save(path: Path, results: Mapping[str, list[Result]], histories: Mapping[str, Mapping[str, History]]) -> Path:
    """Draw one row per optimizer and save it as SVG.

    Args:
        path: where to.
        results: the contenders' results by optimizer, torch's defaults first.
        histories: by optimizer and study, the one of scalars first: what meta-training logged.
    """
    with rc_context({"font.size": 9, "axes.titlesize": "medium", "legend.fontsize": "small", "svg.fonttype": "none"}):
        figure = Figure(figsize=(16, 3.6 * len(results)), layout="constrained")
        rows = figure.subplots(len(results), 4, squeeze=False)
        for (optimizer, contenders), (loss, values, schedule, training) in zip(results.items(), rows, strict=True):
            _meta_losses(loss, optimizer, histories[optimizer])
            _trajectories(values, optimizer, next(iter(histories[optimizer].values())))
            _schedules(schedule, contenders[-1].contender.numbers)
            _training(training, contenders)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _meta_losses(axes: Axes, optimizer: str, histories: Mapping[str, History]) -> None:
    for study, history in histories.items():
        axes.plot([record["meta_loss"] for record in history], label=study)
    axes.set(title=f"{optimizer}: meta-loss", xlabel="meta-step", ylabel="validation loss", yscale="log")
    axes.legend()


def _trajectories(axes: Axes, optimizer: str, history: History) -> None:
    """Each hyperparameter relative to its start, to fit on one axis; betas and etas by their distance from 1."""
    flat = [dict(_scalars(record["hyper"])) for record in history]
    for name in flat[0]:
        distances = [abs(1.0 - record[name]) if "beta" in name or "eta" in name else record[name] for record in flat]
        label = f"|1 - {name}|" if "beta" in name or "eta" in name else name
        axes.plot([distance / distances[0] for distance in distances], label=label)
    axes.set(title=f"{optimizer}: learned scalars / start", xlabel="meta-step", yscale="log")
    axes.legend()


def _scalars(numbers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in numbers.items():
        if isinstance(value, tuple | list):
            yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
        else:
            yield name, value


def _schedules(axes: Axes, numbers: Mapping[str, Any]) -> None:
    """The learned rate per step and parameter; for Rprop, whose lr is no rate, the largest step size."""
    name, value = ("largest step size", numbers["step_sizes"][1]) if "step_sizes" in numbers else ("lr", numbers["lr"])
    for parameter, values in value.items():
        axes.plot(values, label=parameter or "all", drawstyle="steps-post")
    axes.set(title=f"learned: {name} per step and parameter", xlabel="inner step", yscale="log")
    axes.legend()


def _training(axes: Axes, contenders: list[Result]) -> None:
    for result in contenders:
        if result.contender.cosine or "random search, per step" in result.contender.name:
            continue
        mean, spread = result.curve.mean(1), result.curve.std(1)
        steps = range(len(mean))
        axes.plot(steps, mean, label=result.contender.name)
        axes.fill_between(steps, (mean - spread).clamp(min=1e-3), mean + spread, alpha=0.2)
    axes.set(title="training on fresh seeds: mean ± standard deviation", xlabel="inner step", yscale="log")
    axes.set_ylabel("validation loss")
    axes.legend()
