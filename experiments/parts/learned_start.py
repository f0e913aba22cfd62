"""Where training starts, as a hyperparameter: MAML on any family of tasks.

    hyper = Start(family.initial(generator))
    tasks = TaskBatch(FromStart(family, hyper), 25)
    metaopt.metagrad.Unrolled(steps=1).backward(tasks, metaopt.functional.sgd(lr=0.01), hyper, generator)

An estimator takes what ``task.init`` draws as constants, and hands the values of ``hyper`` to the loss. So what is
trained here is the offset from the start, which begins at 0: a step of SGD is the same for the one as for the other,
and so it is for every optimizer that reads gradients alone (none with weight decay).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from metaopt.tasks import Task, TaskFamily
from metaopt.tasks.task import Values

Params = dict[str, Tensor]


class Start(nn.Module):
    """Initial parameters to learn, and with them a learning rate for each of their elements.

    Args:
        params: where learning begins.
        lr: the start of every element's learning rate, which may become negative; None for the optimizer's own.
    """

    def __init__(self, params: Mapping[str, Tensor], lr: float | None = None) -> None:
        super().__init__()
        self.start = nn.ParameterDict({name: p.clone() for name, p in params.items()})
        rates = {} if lr is None else {name: torch.full_like(p, lr) for name, p in params.items()}
        self.lr = nn.ParameterDict(rates)

    def forward(self) -> dict[str, Params]:
        values = {"start": dict(self.start.items()), "lr": dict(self.lr.items())}
        return {name: params for name, params in values.items() if params}


class FromStart:
    """A family whose tasks all begin at ``hyper["start"]``, their parameters being offsets from there.

    Args:
        family: of tasks that agree in their parameters.
        hyper: has the shapes of these.
    """

    def __init__(self, family: TaskFamily, hyper: Start) -> None:
        self.family = family
        self.zeros: Params = {name: torch.zeros_like(p) for name, p in hyper.start.items()}

    def sample(self, count: int, generator: Generator | None) -> Any:
        return self.family.sample(count, generator)

    def task(self, config: Any) -> _FromStart:
        return _FromStart(self.family.task(config), self.zeros)


class _FromStart:
    def __init__(self, task: Task, zeros: Params) -> None:
        self.task = task
        self.zeros = zeros

    def init(self, generator: Generator | None) -> Params:
        return self.zeros

    def batch(self, step: int, generator: Generator | None) -> Any:
        return self.task.batch(step, generator)

    def loss(self, params: Params, batch: Any, hyper: Values) -> Tensor:
        return self.task.loss(_moved(params, hyper), batch, hyper)

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        return self.task.meta_loss(_moved(params, hyper), hyper)


def _moved(offset: Params, hyper: Values) -> Params:
    return {name: hyper["start"][name] + p for name, p in offset.items()}
