"""Contenders judged alike: fresh seeds, the test split, the trained horizon and twice that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.parts.running import meta_losses, run
from experiments.parts.space import cosine
from metaopt import Schedule
from metaopt.functional import Optimizer

# Far from the seeds that anything was learned or searched with.
FRESH = 1_000_000


@dataclass(frozen=True)
class Contender:
    """Hyperparameters with a name.

    Attributes:
        name: for the table.
        numbers: plain numbers, as `metaopt.Hyperparameters.numbers` gives them; a list is a schedule.
        cosine: whether the learning rate falls to 0 over the horizon.
        trainings: how many training runs it took to find them.
    """

    name: str
    numbers: dict[str, Any]
    cosine: bool = False
    trainings: int = 0


@dataclass(frozen=True)
class Result:
    """What a contender reached, one value per fresh seed.

    Attributes:
        loss: test loss at the trained horizon.
        loss_twice: test loss at twice the horizon.
        accuracy: at the trained horizon; None where the task has none.
        curve: meta-loss before training and after each step, shape (steps + 1, seeds).
    """

    contender: Contender
    loss: Tensor
    loss_twice: Tensor
    accuracy: Tensor | None
    curve: Tensor


def read(numbers: Any, optimizer: str, cosine_steps: int | None = None) -> Any:
    """Plain numbers as values for the optimizer.

    Args:
        numbers: a list is a schedule, a dict is per parameter.
        optimizer: its name.
        cosine_steps: let the learning rate (Rprop: the largest step size) fall to 0 along a cosine of this length.
    """
    values = {name: _read(value) for name, value in numbers.items()}
    if cosine_steps is not None and optimizer == "rprop":
        smallest, largest = values["step_sizes"]
        falling = cosine(largest, cosine_steps)
        values["step_sizes"] = (smallest, lambda step: max(smallest, falling(step)))
    elif cosine_steps is not None:
        values["lr"] = cosine(values["lr"], cosine_steps)
    return values


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _read(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_read(item) for item in value)
    return Schedule(len(value), value) if isinstance(value, list) else value


def evaluate(task: Any, opt: Optimizer, optimizer: str, contender: Contender, steps: int, seeds: int) -> Result:
    """Train and test a contender. At twice the horizon a cosine is stretched; a learned schedule holds its last value.

    Args:
        task: one with ``test``.
        opt: the inner optimizer.
        optimizer: its name.
        contender: what is judged.
        steps: the horizon.
        seeds: how many fresh seeds; every contender gets the same.
    """
    curve: list[Tensor] = []

    def trained(horizon: int, record: bool) -> Any:
        values = read(contender.numbers, optimizer, horizon if contender.cosine else None)
        generator = torch.Generator().manual_seed(FRESH)
        keep = (lambda params: curve.append(meta_losses(task, params))) if record else (lambda params: None)
        return torch.vmap(task.test)(run(task, opt, values, horizon, seeds, generator, keep))

    once, twice = trained(steps, True), trained(2 * steps, False)
    return Result(contender, once["loss"], twice["loss"], once.get("accuracy"), torch.stack(curve))
