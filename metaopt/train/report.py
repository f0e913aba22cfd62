"""A look at what the hyperparameters do: one training run with them, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.ongoing import Start
from metaopt.tasks import Runs, Task, TaskBatch
from metaopt.unroll import InnerStep
from metaopt.unroll.randomness import Snapshot

# A validation set may be large: the meta-loss is taken at this many points of a curve.
_POINTS = 25


class Report(NamedTuple):
    """What came out.

    Attributes:
        train: the inner loss of each step, before it.
        validation: the meta-loss by the number of steps behind it.
        test: figures of ``task.test``, if it has one, at the end.
    """

    train: list[float]
    validation: dict[int, float]
    test: dict[str, float]

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """Those at the end, for a row of metrics."""
        last = list(self.validation.values())[-1]
        return {"train": {"loss": self.train[-1]}, "validation": {"loss": last}} | (
            {"test": self.test} if self.test else {}
        )


@torch.no_grad()
def report(
    task: Task | TaskBatch, opt: Optimizer, values: Mapping[str, Any], steps: int, generator: Generator | None
) -> Report:
    """Train once. The generator is put back afterwards: looking changes nothing.

    Args:
        task: what is trained; figures of several runs are means.
        opt: the inner optimizer.
        values: of hyper; completed by the optimizer's own.
        steps: inner steps.
        generator: for the task's randomness.
    """
    here = Snapshot(generator)
    try:
        start = Start.draw(task, generator)
        inner = InnerStep(start.task, opt)
        complete = inner.complete(values)
        carry = inner.begin(start.params, complete)
        looks = {round(point * steps / _POINTS) for point in range(_POINTS)} | {steps}
        train, validation = [], {}
        for t in range(steps):
            if t in looks:
                validation[t] = float(start.task.meta_loss(carry.params, complete))
            carry, loss = inner(carry, start.task.batch(t, generator), complete, t)
            train.append(float(loss))
        validation[steps] = float(start.task.meta_loss(carry.params, complete))
        return Report(train, validation, _tested(start.task, carry.params))
    finally:
        here.restore()


def schedules(values: Any, name: str = "") -> Iterator[tuple[str, list[float]]]:
    """The lists of floats among the numbers of hyper: its schedules, by name."""
    if isinstance(values, list):
        if values and all(isinstance(value, float) for value in values):
            yield name, values
        return
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, tuple) else ()
    for key, value in items:
        yield from schedules(value, f"{name}[{key}]" if isinstance(values, tuple) else f"{name}/{key}".lstrip("/"))


def _tested(task: Task, params: Any) -> dict[str, float]:
    test = _test_of(task)
    return {} if test is None else {name: float(figure.mean()) for name, figure in test(params).items()}


def _test_of(task: Task) -> Callable[[Any], Mapping[str, Tensor]] | None:
    if not isinstance(task, Runs):
        return getattr(task, "test", None)
    config = task.config
    if not hasattr(task.single(_first(config)), "test"):
        return None

    def test(params: Any) -> Mapping[str, Tensor]:
        figures: Mapping[str, Tensor] = torch.vmap(lambda c, p: task.single(c).test(p))(config, params)  # type: ignore[attr-defined]
        return figures

    return test


def _first(config: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda tensor: tensor[0], config)


def grads_by_name(hyper: nn.Module) -> dict[str, Tensor]:
    """The meta-gradient, by the names of hyper's parameters."""
    return {name: p.grad for name, p in hyper.named_parameters() if p.grad is not None}
