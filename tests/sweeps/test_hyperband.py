"""The decisions of hyperband, computed by hand from the definition."""

import math
from collections.abc import Iterable

import optuna
import pytest

from metaopt.sweeps.definition import Hyperband
from metaopt.sweeps.hyperband import HyperbandPruner, brackets

# Brackets at 2, 6, 18, ... The second values are 4, 6, 9, 2, 7, 8, 6.5, in order 2, 4, 6, 6.5, 7, 8, 9: n = 7,
# floor(7 / 3) = 2, and at place 2 counted from 0 stands the threshold, 6.
RUNS = {
    "fallen to 3": [5, 4, 3, 3],
    "6, a tie": [6, 6, 6],
    "1 before the bracket, 9 at it": [1, 9, 9],
    "best": [2, 2, 2, 2],
    "no bracket behind it": [9],
    "7 at the bracket, 3 after it": [7, 7, 3],
    "8 at the bracket, 4.5 after it": [8, 8, 4.5],
    "6.2 after the bracket": [7, 6.5, 6.2],
}
STOPPED = {"6.2 after the bracket"}
STOPPED_STRICTLY = {
    "1 before the bracket, 9 at it",
    "7 at the bracket, 3 after it",
    "8 at the bracket, 4.5 after it",
    "6.2 after the bracket",
}

# Brackets at 8 / 4 = 2 and 8 / 2 = 4. At 2: 2, 4, 6, 9, place 2: threshold 6. At 4: 2, 3, 6, place 1: threshold 3.
FROM_ABOVE = {"3": [5, 4, 3, 3], "6": [6, 6, 6, 6], "1, 9": [1, 9, 9], "2": [2, 2, 2, 2]}


def stopped(
    rule: Hyperband, runs: dict[str, list[float]], direction: str = "minimize", steps: Iterable[int] = range(100)
) -> set[str]:
    """The runs that the rule stops once all have reported."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, pruner=HyperbandPruner(rule))
    trials = {name: study.ask() for name in runs}
    for name, values in runs.items():
        for step, value in zip(steps, values, strict=False):
            trials[name].report(value, step)
    return {name for name, trial in trials.items() if trial.should_prune()}


def test_a_run_stops_if_its_best_is_worse_than_the_last_brackets_threshold() -> None:
    assert stopped(Hyperband(min_iter=2), RUNS) == STOPPED


def test_strictly_a_run_stops_if_its_value_at_the_bracket_is() -> None:
    assert stopped(Hyperband(min_iter=2, strict=True), RUNS) == STOPPED_STRICTLY


def test_brackets_may_be_counted_from_the_last() -> None:
    assert stopped(Hyperband(max_iter=8, s=2, eta=2), FROM_ABOVE) == {"6"}
    assert stopped(Hyperband(max_iter=8, s=2, eta=2, strict=True), FROM_ABOVE) == {"6", "1, 9"}


@pytest.mark.parametrize(("strict", "expected"), [(False, STOPPED), (True, STOPPED_STRICTLY)])
def test_maximizing_is_minimizing_the_negative(strict: bool, expected: set[str]) -> None:
    negative = {name: [-value for value in values] for name, values in RUNS.items()}
    assert stopped(Hyperband(min_iter=2, strict=strict), negative, "maximize") == expected


def test_the_numbers_of_the_steps_play_no_part() -> None:
    assert stopped(Hyperband(min_iter=2), RUNS, steps=range(0, 1000, 10)) == STOPPED


def test_values_that_are_not_finite_are_not_counted() -> None:
    broken = {name: [math.nan, *values, math.inf, math.nan] for name, values in RUNS.items()}
    assert stopped(Hyperband(min_iter=2), broken) == STOPPED
    assert stopped(Hyperband(min_iter=2), {"good": [1.0, 1.0], "nothing": [math.nan] * 5}) == set()


def test_a_lone_run_goes_on() -> None:
    assert stopped(Hyperband(min_iter=1, eta=2), {"alone": [1, 2, 3, 4, 5]}) == set()


def test_runs_that_have_ended_count() -> None:
    study = optuna.create_study(pruner=HyperbandPruner(Hyperband(min_iter=2, eta=2)))
    for state in (optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE):
        value = 1.0 if state == optuna.trial.TrialState.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, value=value, intermediate_values={0: 2.0, 1: 1.0}))
    late = study.ask()
    late.report(2.0, 0)
    assert not late.should_prune()
    late.report(1.5, 1)
    assert late.should_prune()


def test_a_run_that_was_requeued_counts_once() -> None:
    # With the crashed first attempts, two more 1s: the threshold would be 1.
    study = optuna.create_study(pruner=HyperbandPruner(Hyperband(min_iter=1, eta=2)))
    for _ in range(2):
        study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, intermediate_values={0: 1.0}))
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE,
            value=1.0,
            intermediate_values={0: 1.0},
            system_attrs={"failed_trial": 0, "retry_history": [0, 1]},
        )
    )
    late = study.ask()
    late.report(2.0, 0)
    assert not late.should_prune()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Hyperband(min_iter=3), [3, 9, 27, 81]),
        (Hyperband(min_iter=2, eta=2.5), [2, 5, 12, 31, 78]),
        (Hyperband(max_iter=81, s=3), [3, 9, 27]),
        (Hyperband(max_iter=18, s=2), [2, 6]),
        (Hyperband(max_iter=5, s=9, eta=2), [1, 2]),
        (Hyperband(min_iter=50, max_iter=9, s=1), [3]),
    ],
)
def test_brackets_are_where_they_are_defined(rule: Hyperband, expected: list[int]) -> None:
    assert list(brackets(rule, 100)) == expected
