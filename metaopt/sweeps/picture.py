"""A sweep as a picture: the best value over time, and the metric over each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from metaopt.sweeps.definition import Sweep

_COLUMNS = 3


def draw(sweep: Sweep, trials: Mapping[int, FrozenTrial], names: list[str], path: Path) -> None:
    """Save the picture.

    Args:
        sweep: with a metric.
        trials: by root.
        names: of the parameters to draw.
        path: the file; its ending says in which format.
    """
    assert sweep.metric is not None
    done = [
        trial for trial in trials.values() if trial.state is TrialState.COMPLETE and math.isfinite(trial.value or 0)
    ]
    done.sort(key=lambda trial: trial.datetime_complete or trial.number)
    values = [float(trial.value or 0.0) for trial in done]
    rows = math.ceil((1 + len(names)) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3 * rows), layout="constrained")
    first, *others = (figure.add_subplot(rows, _COLUMNS, place + 1) for place in range(1 + len(names)))
    order = range(1, len(values) + 1)
    first.plot(order, values, ".", color="0.6")
    first.step(order, list(accumulate(values, max if sweep.metric.goal == "maximize" else min)), where="post")
    first.set(xlabel="trials complete", ylabel=sweep.metric.name, title="best so far")
    for axes, name in zip(others, names, strict=True):
        at = [trial.user_attrs["config"].get(name) for trial in done]
        axes.scatter(_places(at), values, c=list(order), s=16)
        if _spread(at):
            axes.set_xscale("log")
        axes.set(xlabel=name)
    if others:
        figure.suptitle("colours: from the first trial (dark) to the last (light)", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _places(values: list[Any]) -> list[Any]:
    """Numbers as they are, anything else by its name."""
    return values if all(_numeric(value) for value in values) else [str(value) for value in values]


def _spread(values: list[Any]) -> bool:
    """Whether numbers span so much that only their logarithms can be told apart."""
    return all(_numeric(value) and value > 0 for value in values) and max(values, default=1) > 50 * min(
        values, default=1
    )


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
