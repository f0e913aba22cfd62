"""Estimators that go on where the last call ended: `Unrolled` with ``carry`` and `Online`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt import Hyperparameters
from metaopt.functional import REGISTRY, radam, rprop, sgd
from metaopt.metagrad import Online, Unrolled
from metaopt.tasks import NoisyQuadratic, RandomQuadratics, Replicas, TaskBatch
from tests.metagrad.reference import UPDATES, Regression, learn_all, seeded

TASK = Regression()


def grads(hyper: Hyperparameters) -> list[Tensor]:
    return [p.grad for p in hyper.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("objective", ["mean", "inner", "final"])
@pytest.mark.parametrize("segments", [None, 2])
def test_the_windows_of_an_unroll_add_up_to_the_truncated_gradient(name: str, objective: Any, segments: Any) -> None:
    steps, truncation = 11, 4  # the last window is shorter
    opt, hyper = learn_all(name)
    whole = learn_all(name)[1]
    if objective == "final" and name == "rprop":  # whose lr only the first window reads
        opt, hyper = rprop(), Hyperparameters(rprop(), ("etas",))
        whole = Hyperparameters(opt, ("etas",))
    expected = Unrolled(steps, objective, truncation=truncation).backward(TASK, opt, whole, seeded())
    estimator = Unrolled(steps, objective, truncation=truncation, segments=segments, carry=True)
    generator = seeded()
    parts = [estimator.backward(TASK, opt, hyper, generator) for _ in range(estimator.windows)]
    torch.testing.assert_close(torch.stack(parts).sum(), expected.double(), rtol=1e-13, atol=0.0)
    for got, wanted in zip(grads(hyper), grads(whole), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-15)


def test_compiled_windows_give_the_same() -> None:
    opt, hyper = learn_all("radam")
    compiled = learn_all("radam")[1]
    for module, compile in ((hyper, False), (compiled, True)):
        estimator, generator = Unrolled(10, "mean", truncation=5, carry=True, compile=compile), seeded()
        for _ in range(3):
            estimator.backward(TASK, opt, module, generator)
    for a, b in zip(grads(hyper), grads(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_a_window_uses_the_hyperparameters_of_its_own_call() -> None:
    """The inner loss at the start of the second window is that of parameters trained with the first values."""
    task, opt = NoisyQuadratic(dimension=1, noise=0.0), sgd()
    hyper = Hyperparameters(opt, learn={"lr": 0.1})
    estimator = Unrolled(2, "inner", truncation=1, carry=True)
    first = estimator.backward(task, opt, hyper, seeded())
    hyper.lr.data.fill_(0.0)  # exp(0) = 1
    second = estimator.backward(task, opt, hyper, seeded())
    assert second.item() == pytest.approx(first.item() * 0.9**2, rel=1e-5)


def test_what_only_the_start_reads_has_a_zero_gradient_later() -> None:
    opt = rprop()
    hyper = Hyperparameters(opt, ("lr", "etas"))
    estimator, generator = Unrolled(6, "mean", truncation=3, carry=True), seeded()
    estimator.backward(TASK, opt, hyper, generator)
    assert hyper.lr.grad is not None
    assert hyper.lr.grad != 0
    hyper.zero_grad()
    estimator.backward(TASK, opt, hyper, generator)
    assert hyper.lr.grad == 0


def test_a_value_that_nothing_reads_is_named_and_nothing_moves() -> None:
    from torch.distributions import constraints

    opt = radam(lr=0.05)
    hyper = Hyperparameters(opt, {"lr": 0.05, "unread": (1.0, constraints.positive)})
    for estimator in (Unrolled(4, "mean", truncation=2, carry=True), Online(4)):
        with pytest.raises(ValueError, match="does not depend on the learned 'unread'"):
            estimator.backward(TASK, opt, hyper, seeded())
        assert not grads(hyper)


def test_carry_needs_a_truncation() -> None:
    with pytest.raises(ValueError, match="carry=True needs a truncation"):
        Unrolled(10, carry=True)


def test_a_family_draws_new_tasks_for_every_unroll_and_keeps_them_within_it() -> None:
    opt = sgd(lr=0.01)
    hyper = Hyperparameters(opt, ("lr",))
    tasks, generator = TaskBatch(RandomQuadratics(3), 5), seeded()
    estimator = Unrolled(4, "mean", truncation=2, carry=True)
    losses = [estimator.backward(tasks, opt, hyper, generator).item() for _ in range(6)]
    starts, ends = losses[::2], losses[1::2]
    assert all(end < start for start, end in zip(starts, ends, strict=True))
    assert len(set(starts)) == 3


# Online hypergradient descent


@pytest.mark.parametrize("name", ["sgd", "adam", "radam"])
def test_online_is_the_derivative_of_the_next_loss_by_the_last_step(name: str) -> None:
    steps = 9
    opt, hyper = learn_all(name)
    estimator, generator = Online(steps), seeded()
    by_hand = seeded()
    params = {key: p.requires_grad_() for key, p in TASK.init(by_hand).items()}
    states: dict[str, dict[str, Any]] = {key: {} for key in params}
    batch = TASK.batch(0, by_hand)
    for step in range(steps - 1):
        hyper.zero_grad()
        got = estimator.backward(TASK, opt, hyper, generator)
        values = {**opt.defaults, **hyper()}
        slopes = torch.autograd.grad(TASK.loss(params, batch, values), list(params.values()))
        moved = {
            key: UPDATES[name](p, g, states[key], step + 1, values)
            for (key, p), g in zip(params.items(), slopes, strict=True)
        }
        batch = TASK.batch(step + 1, by_hand)
        loss = TASK.loss(moved, batch, values)
        expected = torch.autograd.grad(loss, list(hyper.parameters()), allow_unused=True)
        torch.testing.assert_close(got, loss.detach(), rtol=1e-12, atol=0.0)
        for p, slope in zip(hyper.parameters(), expected, strict=True):
            wanted = torch.zeros_like(p) if slope is None else slope
            torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-14)
        params = {key: p.detach().requires_grad_() for key, p in moved.items()}
        states = {key: {k: x.detach() for k, x in state.items()} for key, state in states.items()}
        for key, p in params.items():
            torch.testing.assert_close(estimator.params[key], p.detach(), rtol=1e-12, atol=1e-14)


def test_online_begins_again_after_its_steps() -> None:
    opt = sgd(lr=0.1)
    hyper, task = Hyperparameters(opt, ("lr",)), NoisyQuadratic(noise=0.0)
    estimator = Online(5)
    losses = [estimator.backward(task, opt, hyper, seeded()).item() for _ in range(10)]
    assert losses[:5] == losses[5:]
    assert losses[4] < losses[0]
    assert estimator.backward(Replicas(task, 2), opt, hyper, seeded()).item() != losses[0]
