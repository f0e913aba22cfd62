"""Training with given hyperparameters, without a graph: many seeds side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.functional import Optimizer
from metaopt.tasks import Replicas, Task
from metaopt.unroll import InnerStep


@torch.no_grad()
def run(
    task: Task,
    opt: Optimizer,
    values: Mapping[str, Any],
    steps: int,
    seeds: int,
    generator: Generator,
    each_step: Callable[[Any], None] = lambda params: None,
) -> Any:
    """Train ``seeds`` replicas for ``steps`` steps; the parameters, with a leading dimension of seeds."""
    replicas = Replicas(task, seeds)
    step = InnerStep(replicas, opt)
    carry = step.init(values, generator)
    each_step(carry.params)
    for t in range(steps):
        carry, _ = step(carry, replicas.batch(t, generator), values, t)
        each_step(carry.params)
    return carry.params


def meta_losses(task: Task, params: Any) -> Tensor:
    """The meta-loss of each replica, shape (seeds,). No value of the hyperparameters enters it."""
    return torch.vmap(lambda p: task.meta_loss(p, {}))(params)


@dataclass(frozen=True)
class Trial:
    """One draw of a random search and its meta-loss, the mean over its runs."""

    values: Any
    meta_loss: float


def random_search(
    task: Task,
    opt: Optimizer,
    sample: Callable[[Generator], Any],
    read: Callable[[Any], Mapping[str, Any]],
    *,
    trials: int,
    steps: int,
    replicas: int,
    seed: int,
) -> list[Trial]:
    """Draw, train, judge by the mean meta-loss of ``replicas`` runs: what a meta-step measures, as often.

    Args:
        task: what is trained.
        opt: the inner optimizer.
        sample: draws a description of hyperparameters.
        read: turns a description into values for the optimizer.
        trials: how many draws.
        steps: inner steps of a run.
        replicas: runs per draw.
        seed: of draws and runs.

    Returns:
        All trials, the best first; a loss that is not finite counts as infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(trials):
        drawn = sample(generator)
        loss = meta_losses(task, run(task, opt, read(drawn), steps, replicas, generator)).mean().item()
        found.append(Trial(drawn, loss if loss == loss else float("inf")))
    return sorted(found, key=lambda trial: trial.meta_loss)
