"""Hand-designed optimizers at their best learning rate, as what a learned one has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from experiments.parts.running import meta_losses, run
from metaopt import functional
from metaopt.functional import Optimizer
from metaopt.tasks import Task

HAND_DESIGNED: Mapping[str, Callable[[], Optimizer]] = {
    "SGD": functional.sgd,
    "SGD, momentum .9": partial(functional.sgd, momentum=0.9),
    "Adam": functional.adam,
    "RAdam": functional.radam,
    "Rprop": functional.rprop,
}
# Half a decade apart at most: 15 values from 1e-5 to 10, of which every optimizer's best is an inner one.
GRID = tuple(torch.logspace(-5, 1, 15, dtype=torch.float64).tolist())
TUNING_SEED, HELD_OUT_SEED = 1_000, 1_000_000


@dataclass(frozen=True)
class Trained:
    """What an optimizer reached on held-out seeds.

    Attributes:
        name: of the optimizer.
        lr: its best learning rate; None for a learned optimizer, which has none to tune.
        loss: on the test split at the horizon, shape (seeds,).
        curve: meta-loss before training and after each step, shape (steps + 1, seeds).
    """

    name: str
    lr: float | None
    loss: Tensor
    curve: Tensor

    @property
    def mean(self) -> float:
        """NaN and infinity count as infinite."""
        return float(self.loss.nan_to_num(float("inf")).mean())

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(self.loss.std() / len(self.loss) ** 0.5)


def judged(task: Task, opt: Optimizer, name: str, lr: float | None, steps: int, seeds: int) -> Trained:
    """Train on held-out seeds, the same for every optimizer, and test.

    Args:
        task: one with ``test``.
        opt: the optimizer.
        name: for tables.
        lr: its learning rate; None for its own default.
        steps: the horizon.
        seeds: how many.
    """
    curve: list[Tensor] = []
    values = {} if lr is None else {"lr": lr}
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    params = run(task, opt, values, steps, seeds, generator, lambda params: curve.append(meta_losses(task, params)))
    return Trained(name, lr, torch.vmap(task.test)(params)["loss"], torch.stack(curve))  # type: ignore[attr-defined]


def tuned(task: Task, name: str, steps: int, seeds: int, tuning_seeds: int) -> Trained:
    """A hand-designed optimizer with the learning rate of `GRID` that has the lowest meta-loss on other seeds."""
    opt = HAND_DESIGNED[name]()

    def loss(lr: float) -> float:
        generator = torch.Generator().manual_seed(TUNING_SEED)
        params = run(task, opt, {"lr": lr}, steps, tuning_seeds, generator)
        return float(meta_losses(task, params).nan_to_num(float("inf")).mean())

    return judged(task, opt, name, min(GRID, key=loss), steps, seeds)
