"""A learned optimizer is optimizer and ``hyper`` of every estimator of meta-gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from metaopt.compilation import inductor
from metaopt.learned import AdafactorMLPOptimizer, LearnedOptimizer, LSTMOptimizer, MLPOptimizer
from metaopt.metagrad import ES, PES, Estimator, Forward, Unrolled
from metaopt.tasks import RandomQuadratics, Replicas, TaskBatch, Tasks
from tests.learned.problems import DESIGNS, big_steps, loss, meta_loss, start, unroll

STEPS = 6
each_design = pytest.mark.parametrize("design", DESIGNS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    inductor._REMEMBERED.clear()
    torch._dynamo.reset()


class Problem:
    """The small problem as a task."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def init(self, generator: Generator | None) -> Any:
        return start(self.dtype)

    def batch(self, step: int, generator: Generator | None) -> Tensor:
        return torch.zeros(())

    def loss(self, params: Any, batch: Tensor, hyper: Any) -> Tensor:
        return loss(params)

    def meta_loss(self, params: Any, hyper: Any) -> Tensor:
        return meta_loss(params)


def small(design: type[LearnedOptimizer], dtype: torch.dtype = torch.float64) -> LearnedOptimizer:
    opt: LearnedOptimizer = design(2, lr=10.0 if design is LSTMOptimizer else 100.0)  # type: ignore[arg-type]
    return opt.to(dtype)


def gradient(estimator: Estimator, task: Any, opt: LearnedOptimizer, calls: int = 1) -> tuple[Tensor, Tensor]:
    """All of it as one vector, and the loss."""
    opt.zero_grad()
    generator = Generator().manual_seed(0)
    losses = [estimator.backward(task, opt, opt, generator) for _ in range(calls)]
    return torch.cat([p.grad.flatten() for p in opt.parameters()]), sum(losses)


def by_hand(opt: LearnedOptimizer) -> tuple[Tensor, Tensor]:
    """Of the mean of the meta-losses."""
    total = sum(meta_loss(unroll(opt, start(), t)[0]) for t in range(1, STEPS + 1)) / STEPS
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(opt.parameters()))]), total.detach()


EXACT: dict[str, Callable[..., Estimator]] = {
    "recorded": Unrolled,
    "segments": functools.partial(Unrolled, segments=2),
    "forward": Forward,
}


@each_design
@pytest.mark.parametrize("mode", EXACT)
def test_exact_estimators_agree_with_autograd(design: type[LearnedOptimizer], mode: str) -> None:
    opt = small(design)
    torch.testing.assert_close(gradient(EXACT[mode](STEPS, "mean"), Problem(), opt), by_hand(opt))


@each_design
def test_windows_of_several_calls_add_up_to_those_of_one(design: type[LearnedOptimizer]) -> None:
    opt = small(design)
    expected = gradient(Unrolled(STEPS, "mean", truncation=2), Problem(), opt)
    torch.testing.assert_close(gradient(Unrolled(STEPS, "mean", truncation=2, carry=True), Problem(), opt, 3), expected)
    assert not torch.allclose(expected[0], by_hand(opt)[0])


@each_design
@pytest.mark.parametrize(
    ("estimator", "calls"), [(ES(STEPS, 1e-3, 1000, "mean"), 1), (PES(STEPS, STEPS // 2, 1e-3, 1000), 2)]
)
def test_evolution_strategies_find_the_direction(
    design: type[LearnedOptimizer], estimator: Estimator, calls: int
) -> None:
    opt = small(design)
    estimate, _ = gradient(estimator, Problem(), opt, calls)
    assert torch.cosine_similarity(estimate, by_hand(opt)[0], dim=0) > 0.9


@each_design
def test_a_batch_of_tasks_gives_the_mean_of_each_alone(design: type[LearnedOptimizer]) -> None:
    opt, family = small(design, torch.float32), RandomQuadratics(3)
    tasks = TaskBatch(family, 4).draw(Generator().manual_seed(1))
    starts = tasks.init(Generator().manual_seed(2))

    class Started(RandomQuadratics):
        def task(self, config: Any) -> Any:
            task = family.task(config[0])
            task.init = lambda generator: config[1]
            return task

    alone = [Tasks(Started(3), [[x[k : k + 1] for x in tasks.config], starts[k : k + 1]]) for k in range(4)]
    for task in alone:
        task.config = [type(tasks.config)(*task.config[0]), task.config[1]]
    together = Tasks(Started(3), [tasks.config, starts])
    for estimator in (Unrolled(STEPS, "inner", truncation=3), Unrolled(STEPS, segments="sqrt")):
        each = [gradient(estimator, task, opt) for task in alone]
        expected = tuple(torch.stack(parts).mean(0) for parts in zip(*each, strict=True))
        torch.testing.assert_close(gradient(estimator, together, opt), expected, rtol=1e-4, atol=1e-5)


@each_design
@pytest.mark.parametrize("mode", EXACT)
def test_replicas_run(design: type[LearnedOptimizer], mode: str) -> None:
    opt = small(design)
    torch.testing.assert_close(gradient(EXACT[mode](STEPS, "mean"), Replicas(Problem(), 2), opt), by_hand(opt))


COMPILED: dict[str, Callable[..., Estimator]] = {
    "recorded": functools.partial(Unrolled, STEPS, "mean", truncation=3),
    "segments": functools.partial(Unrolled, STEPS, "mean", segments=2),
    "pes": functools.partial(PES, STEPS, 2, 1e-2, 3),
}


@pytest.mark.parametrize(
    ("design", "mode"),
    [
        pytest.param(MLPOptimizer, "recorded", marks=pytest.mark.long),
        pytest.param(LSTMOptimizer, "recorded", marks=pytest.mark.long),
        (AdafactorMLPOptimizer, "recorded"),
        (MLPOptimizer, "segments"),
        (MLPOptimizer, "pes"),
    ],
)
def test_compiled_estimators_agree_with_eager_ones(
    design: type[LearnedOptimizer], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.compile  # without code generation: a tenth of the time
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, **{**options, "backend": "aot_eager"}))
    opt = small(design)
    expected = gradient(COMPILED[mode](), Problem(), opt)
    torch.testing.assert_close(gradient(COMPILED[mode](compile=True), Problem(), opt), expected)


@pytest.mark.long  # ten seconds of a compiler
def test_generated_code_gives_the_eager_gradient_in_single_precision() -> None:
    opt = big_steps(MLPOptimizer, torch.float32)
    tasks, estimator = TaskBatch(RandomQuadratics(4), 3), functools.partial(Unrolled, 4, "mean")
    expected = gradient(estimator(), tasks, opt)
    actual = gradient(estimator(compile=True), tasks, opt)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected[0].abs().max().item())
