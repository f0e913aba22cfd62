"""What an unroll draws: the same batches going back as going forth, and no more than a plain loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor

from metaopt import Hyperparameters
from metaopt.functional import radam, sgd
from metaopt.metagrad import Estimator, Forward, Unrolled
from metaopt.tasks import Replicas
from metaopt.unroll.randomness import Snapshot
from tests.metagrad.reference import Regression, seeded

F64 = torch.float64
STEPS = 11

ESTIMATORS: dict[str, Any] = {
    "recorded": lambda objective: Unrolled(STEPS, objective),
    "segments of 1": lambda objective: Unrolled(STEPS, objective, segments=1),
    "segments of 4": lambda objective: Unrolled(STEPS, objective, segments=4),
    "segments of a root": lambda objective: Unrolled(STEPS, objective, segments="sqrt"),
    "one segment": lambda objective: Unrolled(STEPS, objective, segments=STEPS),
    "segments in windows": lambda objective: Unrolled(STEPS, objective, truncation=5, segments=2),
    "forward": lambda objective: Forward(STEPS, objective),
}
SEGMENTED = [name for name in ESTIMATORS if "segment" in name]
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)
each_segmented = pytest.mark.parametrize("name", SEGMENTED)
each_objective = pytest.mark.parametrize("objective", ["final", "mean", "inner"])


class Drawn(NamedTuple):
    step: int
    x: Tensor
    y: Tensor


class Recorder(Regression):
    """Writes down every batch that it hands out, and the parameters of every gradient that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Drawn] = []

    def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        x, y = super().batch(step, generator)
        self.drawn.append(Drawn(step, x, y))
        return x, y


class Dropout(Regression):
    """Masks of the hidden layer are part of the batch."""

    def batch(self, step: int, generator: Generator | None) -> Any:
        keep = (torch.rand(6, 4, generator=generator, dtype=F64) < 0.7) / 0.7
        return super().batch(step, generator), keep

    def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
        (x, y), keep = batch
        hidden = torch.tanh(x @ params["in.weight"].T + params["in.bias"]) * keep
        return (hidden @ params["out.weight"] - y).square().mean()


def learn() -> tuple[Any, Hyperparameters]:
    opt = radam(eps=0.01)
    return opt, Hyperparameters(opt, {"lr": 0.05, "betas": (0.8, 0.97)})


def grads_of(estimator: Estimator, task: Any, generator: Generator | None) -> Tensor:
    opt, hyper = learn()
    estimator.backward(task, opt, hyper, generator)
    return torch.stack([p.grad for p in hyper.parameters() if p.grad is not None])


def drawn_by_a_plain_loop(generator: Generator | None) -> list[Drawn]:
    task = Recorder()
    task.init(generator)
    for t in range(STEPS):
        task.batch(t, generator)
    return task.drawn


@each_segmented
@each_objective
@pytest.mark.parametrize("given", [True, False])
def test_each_step_draws_the_same_batch_every_time(name: str, objective: str, given: bool) -> None:
    generator = seeded(5) if given else None
    torch.manual_seed(5)
    want = drawn_by_a_plain_loop(seeded(5))
    task = Recorder()
    grads_of(ESTIMATORS[name](objective), task, generator)
    assert {drawn.step for drawn in task.drawn} == set(range(STEPS))
    for drawn in task.drawn:
        assert torch.equal(drawn.x, want[drawn.step].x)
        assert torch.equal(drawn.y, want[drawn.step].y)
    assert len({drawn.x.sum().item() for drawn in want}) == STEPS  # or any batch would do


@each_segmented
def test_a_step_is_drawn_once_on_the_way_and_once_going_back(name: str) -> None:
    """Those of the last segment of a window are kept on the way: they are drawn once."""
    task = Recorder()
    estimator: Any = ESTIMATORS[name]("mean")
    grads_of(estimator, task, seeded())
    window = estimator.truncation or STEPS
    length = math.isqrt(window) if estimator.segments == "sqrt" else min(estimator.segments, window)
    want = []
    for start in range(0, STEPS, window):
        steps = range(start, min(start + window, STEPS))
        segments = [steps[at : at + length] for at in range(0, len(steps), length)]
        want += [t for segment in segments[:-1] for t in [*segment, *segment]] + list(segments[-1])
    assert sorted(drawn.step for drawn in task.drawn) == sorted(want)


@each_estimator
@each_objective
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("replicas", [False, True])
def test_the_generator_ends_where_a_plain_loop_leaves_it(
    name: str, objective: str, given: bool, replicas: bool
) -> None:
    """Every time, also when forward mode has looked at the first steps in advance."""
    task = Replicas(Regression(), 3) if replicas else Regression()
    for seed in (3, 4):
        generator = seeded(seed) if given else None
        torch.manual_seed(seed)
        grads_of(ESTIMATORS[name](objective), task, generator)
        there = generator.get_state() if generator is not None else torch.get_rng_state()
        generator = seeded(seed) if given else None
        torch.manual_seed(seed)
        task.init(generator)
        for t in range(STEPS):
            task.batch(t, generator)
        here = generator.get_state() if generator is not None else torch.get_rng_state()
        assert torch.equal(there, here)


@each_estimator
def test_a_given_generator_leaves_torchs_own_alone(name: str) -> None:
    before = torch.get_rng_state()
    grads_of(ESTIMATORS[name]("mean"), Regression(), seeded())
    assert torch.equal(torch.get_rng_state(), before)


@each_estimator
def test_torchs_own_generator_gives_what_a_given_one_gives(name: str) -> None:
    torch.manual_seed(3)
    implicit = grads_of(ESTIMATORS[name]("mean"), Regression(), None)
    assert torch.equal(implicit, grads_of(ESTIMATORS[name]("mean"), Regression(), seeded(3)))
    assert not torch.equal(implicit, grads_of(ESTIMATORS[name]("mean"), Regression(), seeded(4)))


@each_estimator
@each_objective
def test_dropout_masks_drawn_in_the_batch_are_those_of_the_plain_loop(name: str, objective: str) -> None:
    opt, hyper = learn()
    generator = seeded()
    truncation = 5 if name == "segments in windows" else None
    params = {key: p.requires_grad_() for key, p in Dropout().init(generator).items()}
    state, values, terms = opt.init(params), hyper(), []
    for t in range(STEPS):
        if truncation and t and t % truncation == 0:
            params = {key: p.detach().requires_grad_() for key, p in params.items()}
            state = type(state)(*({key: x.detach() for key, x in field.items()} for field in state))
        loss = Dropout().loss(params, Dropout().batch(t, generator), values)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params, state = opt.step(params, dict(zip(params, grads, strict=True)), state, **values)
        terms.append(loss if objective == "inner" else Dropout().meta_loss(params, values))
    (terms[-1] if objective == "final" else torch.stack(terms).mean()).backward()
    want = torch.stack([p.grad for p in hyper.parameters() if p.grad is not None])
    got = grads_of(ESTIMATORS[name](objective), Dropout(), seeded())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)


@each_estimator
def test_two_calls_with_one_generator_go_on_in_its_sequence(name: str) -> None:
    """The second gradient is that of new parameters and batches, the same in every mode."""
    generator, reference = seeded(), seeded()
    task = Regression()
    truncation = 5 if name == "segments in windows" else None
    both = [grads_of(ESTIMATORS[name]("mean"), task, generator) for _ in range(2)]
    want = [grads_of(Unrolled(STEPS, "mean", truncation), task, reference) for _ in range(2)]
    torch.testing.assert_close(torch.stack(both), torch.stack(want), rtol=1e-9, atol=0.0)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("name", ["segments of 4", "forward"])
def test_an_error_in_the_task_comes_through_as_it_is(name: str) -> None:
    class Breaks(Regression):
        def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
            if step == 7:
                raise LookupError("no more data")
            return super().batch(step, generator)

    opt = sgd()
    hyper = Hyperparameters(opt, {"lr": 0.1})
    with pytest.raises(LookupError, match="no more data"):
        ESTIMATORS[name]("final").backward(Breaks(), opt, hyper, seeded())
    assert hyper.lr.grad is None


# Snapshots


@pytest.mark.parametrize("given", [True, False])
def test_a_snapshot_can_be_restored_more_than_once(given: bool) -> None:
    generator = seeded() if given else None
    torch.rand(3, generator=generator)
    here = Snapshot(generator)
    first = torch.randn(5, generator=generator)
    for _ in range(2):
        here.restore()
        assert torch.equal(torch.randn(5, generator=generator), first)


def test_a_snapshot_of_one_generator_does_not_touch_another() -> None:
    generator, other = seeded(1), seeded(2)
    here = Snapshot(generator)
    torch.rand(3, generator=other)
    states = other.get_state(), torch.get_rng_state()
    here.restore()
    assert torch.equal(other.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
