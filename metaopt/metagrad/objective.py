"""What is minimised over an unroll: the end, the way there, or the inner loss."""

from __future__ import annotations

from typing import Literal, get_args

from metaopt.checks import check_count, check_whole
from metaopt.unroll.stretch import Stretch

Objective = Literal["final", "mean", "inner"]


def check_objective(steps: int, objective: str) -> None:
    """Raise for a horizon that is no whole number >= 1, or an unknown objective."""
    check_count("steps", steps)
    if objective not in get_args(Objective):
        raise ValueError(f"objective must be one of {get_args(Objective)}, got objective={objective!r}")


def check_truncation(steps: int, truncation: int) -> None:
    """Raise for a window that is no whole number, empty, or longer than the horizon."""
    check_whole("truncation", truncation)
    if not 1 <= truncation <= steps:
        raise ValueError(f"truncation must be in 1..steps ({steps}), got truncation={truncation}")


def window_at(objective: Objective, steps: int, start: int, length: int) -> Stretch:
    """Some steps of the horizon, with their share of the objective.

    Args:
        objective: ``"final"`` is ``meta_loss(params_T)``, ``"mean"`` the mean of ``meta_loss(params_t)`` over t = 1..T,
            ``"inner"`` the mean of the inner losses over t = 0..T-1.
        steps: the horizon T.
        start: the first step.
        length: how many; less where the horizon ends before.
    """
    loss_weight = 1.0 / steps if objective == "inner" else 0.0
    everywhere = 1.0 / steps if objective == "mean" else 0.0
    at_end = 1.0 if objective == "final" else everywhere
    return Stretch(
        range(start, min(start + length, steps)), loss_weight, lambda t: at_end if t == steps else everywhere
    )


def windows(objective: Objective, steps: int, length: int) -> list[Stretch]:
    """The horizon cut into windows of this length; the last may be shorter."""
    return [window_at(objective, steps, start, length) for start in range(0, steps, length)]


def whole(objective: Objective, steps: int) -> Stretch:
    """The horizon as one window."""
    return window_at(objective, steps, 0, steps)
