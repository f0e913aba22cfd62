"""wandb's early termination by hyperband, as a pruner.

The definition (wandb's documentation of ``early_terminate``; what it leaves open, after the engine that it published):

- An iteration is one logged value of the metric; the number that the step counter shows plays no part. Values that are
  no finite numbers are not counted.
- Brackets are iterations. From ``min_iter``: floor(min_iter * eta^k), k = 0, 1, 2, ... From ``max_iter`` and ``s``:
  floor(max_iter / eta^k), k = 1, ..., s, as long as that is at least 1. With both, those of ``max_iter``.
- The threshold of a bracket b: of all n runs with at least b values, running or not, the b-th values, the best first;
  of these the one at place floor(n / eta), counted from 0. So one in eta is better than it, and ties stay.
- A run with at least one bracket behind it is judged by the last of them whenever a value comes in, between brackets
  too. It is stopped if the best of all its values so far is worse than that bracket's threshold. ``strict``: if its
  b-th value is, whatever came before and after.

``strict`` is off unless set, as documented (the schema of the published engine turns it on).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, takewhile
from typing import TYPE_CHECKING

from optuna.pruners import BasePruner
from optuna.study import StudyDirection

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from metaopt.sweeps.definition import Hyperband


class HyperbandPruner(BasePruner):
    """Stops a trial that wandb's hyperband would stop.

    A trial that was requeued after a crash goes on in its successor: what the crashed one reported is left out.

    Args:
        rule: as read from a sweep file.

    Example:
        >>> import optuna
        >>> from metaopt.sweeps.definition import Hyperband
        >>> study = optuna.create_study(pruner=HyperbandPruner(Hyperband(min_iter=2, eta=2)))
        >>> good, bad = study.ask(), study.ask()
        >>> for step, (value, worse) in enumerate([(3.0, 5.0), (1.0, 4.0)]):
        ...     good.report(value, step)
        ...     bad.report(worse, step)
        >>> good.should_prune(), bad.should_prune()
        (False, False)
        >>> best = study.ask()
        >>> for step, value in enumerate([2.0, 0.5]):
        ...     best.report(value, step)
        >>> good.should_prune(), bad.should_prune()
        (False, True)
    """

    def __init__(self, rule: Hyperband) -> None:
        self._rule = rule

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Whether to stop the trial now."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        history = _history(trial, sign)
        behind = list(brackets(self._rule, len(history)))
        if not behind:
            return False
        bracket = behind[-1]
        others = [_history(other, sign) for other in _runs(study) if other.number != trial.number]
        reached = sorted(values[bracket - 1] for values in [history, *others] if len(values) >= bracket)
        threshold = reached[int(len(reached) // self._rule.eta)]
        return (history[bracket - 1] if self._rule.strict else min(history)) > threshold


def brackets(rule: Hyperband, iterations: int) -> Iterator[int]:
    """The brackets up to and including ``iterations``, in order.

    Example:
        >>> from metaopt.sweeps.definition import Hyperband
        >>> list(brackets(Hyperband(min_iter=3), 81)), list(brackets(Hyperband(max_iter=27, s=2), 81))
        ([3, 9, 27, 81], [3, 9])
    """
    if rule.max_iter is not None and rule.s is not None:
        all_of_them: Iterator[float] = (rule.max_iter / rule.eta**k for k in range(rule.s, 0, -1))
    else:
        assert rule.min_iter is not None  # the reader of sweep files saw to it
        start = rule.min_iter
        all_of_them = (start * rule.eta**k for k in count())
    whole = (math.floor(bracket) for bracket in all_of_them if bracket >= 1)
    return takewhile(lambda bracket: bracket <= iterations, whole)


def _history(trial: FrozenTrial, sign: float) -> list[float]:
    """The logged values in order; less is better."""
    return [sign * value for _, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)]


def _runs(study: optuna.study.Study) -> list[FrozenTrial]:
    """All trials but those that were requeued."""
    trials = study.get_trials(deepcopy=False)
    requeued = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    return [trial for trial in trials if trial.number not in requeued]
