"""Families of tasks through every way to differentiate: the mean over tasks of what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaopt import Hyperparameters, PerParameter, Schedule
from metaopt.functional import REGISTRY, radam, sgd
from metaopt.metagrad import Estimator, Forward, Unrolled
from metaopt.tasks import RandomQuadratics, Sinusoids, TaskBatch, TaskFamily, Tasks
from tests.metagrad.reference import STARTS, UPDATES, seeded, unroll

COUNT, STEPS = 3, 7


class Doubled(RandomQuadratics):
    """In float64, with two parameters, a random batch and an inner loss that reads a hyperparameter."""

    def sample(self, count: int, generator: Any) -> Any:
        return [x.to(torch.float64) for x in super().sample(count, generator)]

    def task(self, config: Any) -> Any:
        return One(*config)


class One:
    def __init__(self, matrix: Tensor, target: Tensor) -> None:
        self.matrix, self.target = matrix, target

    def init(self, generator: Any) -> dict[str, Tensor]:
        draw = torch.randn(4, 1, generator=generator, dtype=torch.float64)
        return {"x": draw[:, 0], "b": draw[0, 0]}

    def batch(self, step: int, generator: Any) -> Tensor:
        return 0.1 * torch.randn(4, generator=generator, dtype=torch.float64)

    def loss(self, params: Any, batch: Tensor, hyper: Any) -> Tensor:
        residual = torch.tanh(self.matrix @ params["x"] + params["b"]) - self.target + batch
        return residual.square().sum() + hyper.get("penalty", 0.0) * params["x"].square().sum()

    def meta_loss(self, params: Any, hyper: Any) -> Tensor:
        return self.loss(params, torch.zeros((), dtype=torch.float64), {})


class Alone:
    """One of several tasks, replaying what they drew together."""

    def __init__(self, tasks: Tasks, index: int, start: Any, batches: Tensor) -> None:
        config = [x[index] for x in tasks.config]
        self.task, self.start, self.batches = tasks.family.task(config), start, batches

    def init(self, generator: Any) -> Any:
        return self.start

    def batch(self, step: int, generator: Any) -> Tensor:
        return self.batches[step]

    def loss(self, params: Any, batch: Any, hyper: Any) -> Tensor:
        return self.task.loss(params, batch, hyper)

    def meta_loss(self, params: Any, hyper: Any) -> Tensor:
        return self.task.meta_loss(params, hyper)


def by_hand(name: str, opt: Any, hyper: nn.Module, objective: str) -> tuple[Tensor, list[Tensor]]:
    """Every task unrolled by itself, from the same draws."""
    generator = seeded()
    tasks = TaskBatch(Doubled(4), COUNT).draw(generator)
    starts = tasks.init(generator)
    batches = torch.stack([tasks.batch(t, generator) for t in range(STEPS)], dim=1)
    values = {**opt.defaults, **hyper()}
    losses = []
    for i in range(COUNT):
        alone = Alone(tasks, i, {key: x[i].clone() for key, x in starts.items()}, batches[i])
        losses.append(unroll(UPDATES[name], alone, values, STEPS, objective))
    mean = torch.stack(losses).mean()
    return mean.detach(), list(torch.autograd.grad(mean, list(hyper.parameters())))


def assert_equals_by_hand(name: str, estimator: Any, learn: dict[str, Any], rtol: float = 1e-9) -> None:
    opt = REGISTRY[name]()
    hyper = Hyperparameters(opt, learn)
    loss = estimator.backward(TaskBatch(Doubled(4), COUNT), opt, hyper, seeded())
    expected, grads = by_hand(name, opt, hyper, estimator.objective)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    for p, grad in zip(hyper.parameters(), grads, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize(
    "estimator",
    [
        Unrolled(STEPS),
        Unrolled(STEPS, "mean"),
        Unrolled(STEPS, "inner", segments=3),
        Forward(STEPS, "mean"),
    ],
    ids=repr,
)
def test_every_mode_gives_the_mean_over_tasks(name: str, estimator: Estimator) -> None:
    assert_equals_by_hand(name, estimator, STARTS[name])


def test_a_value_that_the_inner_loss_reads() -> None:
    from torch.distributions import constraints

    for estimator in (Unrolled(STEPS), Forward(STEPS, "inner")):
        assert_equals_by_hand("sgd", estimator, {"lr": 0.05, "penalty": (0.1, constraints.positive)})


@pytest.mark.parametrize(
    "estimator",
    [
        Unrolled(STEPS, "mean", compile=True),
        pytest.param(Unrolled(STEPS, segments="sqrt", compile=True), marks=pytest.mark.long),
    ],
    ids=repr,
)
def test_compiled_once_for_all_tasks(estimator: Any) -> None:
    from torch._dynamo.utils import counters

    assert_equals_by_hand("radam", estimator, STARTS["radam"], rtol=1e-7)
    before = counters["stats"]["unique_graphs"]
    family, opt = Doubled(4), radam()
    hyper = Hyperparameters(opt, STARTS["radam"])
    for seed in range(2):  # another family object: one more set of graphs, for all of its tasks
        estimator.backward(TaskBatch(family, COUNT), opt, hyper, seeded(seed))
    once = counters["stats"]["unique_graphs"] - before
    for seed in range(2, 5):
        estimator.backward(TaskBatch(family, COUNT), opt, hyper, seeded(seed))
    assert counters["stats"]["unique_graphs"] - before == once


def test_schedules_and_values_per_parameter() -> None:
    opt = sgd()
    hyper = Hyperparameters(opt, {"lr": PerParameter(["x", "b"], Schedule(STEPS, 0.03))})
    loss = Unrolled(STEPS).backward(TaskBatch(Doubled(4), COUNT), opt, hyper, seeded())
    expected, grads = by_hand("sgd", opt, hyper, "final")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(hyper.lr.grad, grads[0], rtol=1e-9, atol=1e-12)


def test_given_tasks_are_always_the_same_and_drawn_ones_are_new() -> None:
    family, opt = RandomQuadratics(3), sgd(lr=0.01)
    assert isinstance(family, TaskFamily)
    hyper, generator = Hyperparameters(opt, ("lr",)), seeded()
    fixed = Tasks(family, family.sample(4, generator))

    def losses(task: Any) -> list[float]:
        return [Unrolled(1).backward(task, opt, hyper, seeded(seed)).item() for seed in (1, 1, 2)]

    for task in (fixed, TaskBatch(family, 4)):
        same, again, other = losses(task)
        assert same == again != other
    assert torch.equal(fixed.config[0], fixed.with_config(fixed.config).config[0])


def test_every_task_has_its_own_draws() -> None:
    tasks = TaskBatch(Sinusoids(), 4).draw(seeded())
    params = tasks.init(seeded())
    assert len({tuple(x.flatten()[:3].tolist()) for x in params["w1"]}) == 4
    batches = TaskBatch(Doubled(4), 4).draw(seeded()).batch(0, seeded())
    assert len({tuple(row.tolist()) for row in batches}) == 4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TaskBatch(RandomQuadratics(3), 2.5), "count must be a whole number, got count=2.5"),  # type: ignore[arg-type]
        (lambda: Tasks(RandomQuadratics(3), {"a": 0.5}), "config must be a pytree of tensors, got leaves: float"),
        (lambda: TaskBatch(RandomQuadratics(3), 0), "count must be >= 1, got count=0"),
        (
            lambda: Tasks(RandomQuadratics(3), [torch.zeros(2), torch.zeros(3)]),
            r"one leading dimension >= 1, got shapes",
        ),
        (lambda: Tasks(RandomQuadratics(3), []), "one leading dimension >= 1"),
        (lambda: Tasks(RandomQuadratics(3), torch.zeros(())), "one leading dimension >= 1"),
    ],
)
def test_bad_arguments_are_named(make: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def test_a_family_that_returns_another_number_of_configurations_is_refused() -> None:
    class One(RandomQuadratics):
        def sample(self, count: int, generator: Any) -> Any:
            return super().sample(1, generator)

    with pytest.raises(ValueError, match=r"sample\(count=4\) of the family returned 1 configurations"):
        TaskBatch(One(3), 4).draw(seeded())
