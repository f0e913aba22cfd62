"""`ES`, `PES` and `TruncatedES`: the unrolls of their particles, and estimates whose expectation is a closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from metaopt import Hyperparameters, Schedule
from metaopt.functional import REGISTRY, sgd
from metaopt.metagrad import ES, PES, Estimator, TruncatedES, Unrolled, measure
from metaopt.metagrad.pairs import Pairs
from metaopt.tasks import NoisyQuadratic, RandomQuadratics, Replicas, TaskBatch
from tests.metagrad.reference import UPDATES, Regression, learn_all, seeded, unroll

F64 = torch.float64


class Replayed:
    """A task that hands out given draws."""

    def __init__(self, task: Any, start: Any, batches: list[Any]) -> None:
        self.task, self.start, self.batches = task, start, batches

    def init(self, generator: Generator | None) -> Any:
        return self.start

    def batch(self, step: int, generator: Generator | None) -> Any:
        return self.batches[step]

    def loss(self, params: Any, batch: Any, hyper: Mapping[str, Any]) -> Tensor:
        return self.task.loss(params, batch, hyper)

    def meta_loss(self, params: Any, hyper: Mapping[str, Any]) -> Tensor:
        return self.task.meta_loss(params, hyper)


class Recorded(Regression):
    """Keeps what it has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[Any] = []
        self.batches: list[Any] = []

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        self.starts.append(super().init(generator))
        return self.starts[-1]

    def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        self.batches.append(super().batch(step, generator))
        return self.batches[-1]


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("objective", ["final", "mean", "inner"])
def test_every_particle_is_the_unroll_of_its_own_hyperparameters(name: str, objective: Any) -> None:
    steps, count, task = 8, 3, Recorded()
    lr = "step_sizes" if name == "rprop" else "lr"
    start = (0.001, Schedule(steps, torch.linspace(0.03, 0.08, steps))) if name == "rprop" else Schedule(steps, 0.05)
    opt, hyper = learn_all(name) if name == "rprop" else learn_all(name, **{lr: start})
    pairs = Pairs(task, opt, hyper, 0.05, count, steps, objective, compile=False)
    with torch.no_grad():
        pairs.renew(seeded())
        noise = pairs.perturbation.draw(seeded(1))
        losses = pairs.run(noise, steps, seeded(2))
    parameters = list(hyper.parameters())
    origin = [p.detach().clone() for p in parameters]
    for sign, offset in ((1, 0), (-1, count)):
        for index in range(count):
            for p, middle, e in zip(parameters, origin, noise, strict=True):
                p.data = middle + sign * e[index]
            replayed = Replayed(task, task.starts[index], task.batches[index::count])
            expected = unroll(UPDATES[name], replayed, {**opt.defaults, **hyper()}, steps, objective)
            torch.testing.assert_close(losses[offset + index], expected.detach(), rtol=1e-11, atol=0.0)


class Accumulates:
    """An "optimizer" whose state grows: ``s <- s + theta``."""

    hyperparameters = ("theta",)
    defaults: Mapping[str, Any] = {"theta": 0.0}
    differentiates_gradients = False

    def init(self, params: Tensor, **hyper: Any) -> tuple[()]:
        return ()

    def step(self, params: Tensor, grads: Any, state: Any, **hyper: Any) -> tuple[Tensor, Any]:
        return params + hyper["theta"], state


class Wave:
    """``cos(s)`` after the steps: its smoothed value is known, and it is not a polynomial."""

    def init(self, generator: Generator | None) -> Tensor:
        return torch.zeros(1, dtype=F64)

    def batch(self, step: int, generator: Generator | None) -> tuple[()]:
        return ()

    def loss(self, params: Tensor, batch: tuple[()], hyper: Mapping[str, Any]) -> Tensor:
        return self.meta_loss(params, hyper)

    def meta_loss(self, params: Tensor, hyper: Mapping[str, Any]) -> Tensor:
        return torch.cos(params).sum()


class Theta(nn.Module):
    def __init__(self, start: float = 0.3) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=F64))

    def forward(self) -> dict[str, Tensor]:
        return {"theta": self.theta}


STEPS, STD, START = 4, 0.2, 0.3


def smoothed_slope(noise_per_step: list[float]) -> float:
    """``d/dtheta E[mean_t cos(sum_k<=t (theta + e_k))]``, given the standard deviation of each sum of noises."""
    terms = [-t * math.sin(t * START) * math.exp(-0.5 * s**2) for t, s in enumerate(noise_per_step, 1)]
    return sum(terms) / len(terms)


def z_score(estimator: Estimator, expected: float, samples: int = 60) -> float:
    record = measure(estimator, Wave(), Accumulates(), Theta(START), samples, seeded())
    return float((record.mean - expected) / record.standard_error)


# One noise for the whole unroll: after t steps it has added up to t e.
FULL = smoothed_slope([t * STD for t in range(1, STEPS + 1)])
# One noise per window of two steps: 1 e_1, 2 e_1, 2 e_1 + e_2, 2 e_1 + 2 e_2.
WINDOWED = smoothed_slope([STD * x for x in (1.0, 2.0, math.sqrt(5.0), math.sqrt(8.0))])


def test_es_is_unbiased_for_the_smoothed_objective() -> None:
    # Four standard errors: a right estimator fails for 6 seeds in 100,000.
    assert abs(z_score(ES(STEPS, STD, 200, "mean"), FULL)) < 4.0


@pytest.mark.parametrize("truncation", [2, 4])
def test_pes_is_unbiased_over_the_windows_of_an_unroll(truncation: int) -> None:
    expected = WINDOWED if truncation == 2 else FULL
    assert abs(z_score(PES(STEPS, truncation, STD, 200), expected)) < 4.0


def test_pes_with_a_last_window_that_is_shorter() -> None:
    # Windows of 3 and 1 steps: e_1, 2 e_1, 3 e_1, 3 e_1 + e_2.
    expected = smoothed_slope([STD * x for x in (1.0, 2.0, 3.0, math.sqrt(10.0))])
    assert abs(z_score(PES(STEPS, 3, STD, 200), expected)) < 4.0


def test_pes_with_the_objective_at_the_end() -> None:
    slope = -STEPS * math.sin(STEPS * START) * math.exp(-0.5 * 8 * STD**2)
    assert abs(z_score(PES(STEPS, 2, STD, 200, "final"), slope)) < 4.0


def test_truncated_es_is_biased_and_the_test_would_see_it() -> None:
    assert abs(z_score(TruncatedES(STEPS, 2, STD, 200), WINDOWED)) > 20.0


def test_truncated_es_over_the_whole_horizon_is_es() -> None:
    assert abs(z_score(TruncatedES(STEPS, STEPS, STD, 200), FULL)) < 4.0


def test_a_staggered_pes_has_the_same_expectation_once_all_are_on_their_way() -> None:
    estimator, hyper = PES(STEPS, 2, STD, 200, stagger=True), Theta(START)
    task, opt, generator = Wave(), Accumulates(), seeded()
    estimator.backward(task, opt, hyper, generator)  # half of the pairs have an unroll of one window
    gradients = []
    for _ in range(60):
        hyper.zero_grad()
        for _ in range(2):
            estimator.backward(task, opt, hyper, generator)
        assert hyper.theta.grad is not None
        gradients.append(hyper.theta.grad.item())
    all_of_them = torch.tensor(gradients, dtype=F64)
    error = all_of_them.std() / math.sqrt(len(gradients))
    assert abs(all_of_them.mean() - WINDOWED) / error < 4.0


def test_antithetic_pairs_reduce_the_variance() -> None:
    start = 0.1  # where the loss is far from 0: what the two of a pair have in common cancels
    record = measure(ES(STEPS, STD, 50, "final"), Wave(), Accumulates(), Theta(start), 200, seeded())
    # The same number of evaluations, with independent noise: e L(theta + e) / std^2.
    e = STD * torch.randn(200, 100, generator=seeded(1), dtype=F64)
    plain = (e * torch.cos(STEPS * (start + e)) / STD**2).mean(1)
    assert record.variance.item() < 0.5 * plain.var().item()


@pytest.mark.parametrize(
    "make", [lambda: ES(6, 0.1, 4, "mean"), lambda: PES(6, 2, 0.1, 4), lambda: TruncatedES(6, 2, 0.1, 4)]
)
def test_replicas_and_families_are_perturbed_as_a_whole(make: Any) -> None:
    opt = sgd(lr=0.01)
    for task in (Replicas(NoisyQuadratic(), 3), TaskBatch(RandomQuadratics(4), 3)):
        hyper, estimator = Hyperparameters(opt, learn=("lr",)), make()
        losses = [estimator.backward(task, opt, hyper, seeded()) for _ in range(5)]
        assert all(loss.isfinite() and loss.shape == () and not loss.requires_grad for loss in losses)
        assert hyper.lr.grad is not None
        assert hyper.lr.grad.isfinite()


def test_compiled_particles_give_the_same_estimate() -> None:
    grads = []
    for compile in (False, True):
        opt, hyper = learn_all("radam")
        estimator = PES(6, 3, 0.05, 3, compile=compile)
        for _ in range(3):
            estimator.backward(Regression(), opt, hyper, seeded())
        grads.append(torch.stack([p.grad for p in hyper.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-10)


def test_a_loss_without_a_derivative_can_be_learned() -> None:
    class Rounded(Wave):
        def meta_loss(self, params: Tensor, hyper: Mapping[str, Any]) -> Tensor:
            return (params > 1.0).to(F64).sum()

    hyper = Theta(START)
    loss = ES(STEPS, STD, 300).backward(Rounded(), Accumulates(), hyper, seeded())
    assert 0 < loss < 1
    assert hyper.theta.grad is not None
    assert hyper.theta.grad > 0.5
    with pytest.raises(ValueError, match="does not depend on the learned 'theta'"):
        Unrolled(STEPS).backward(Rounded(), Accumulates(), Theta(START), seeded())


def test_grads_accumulate_and_other_parameters_are_left_alone() -> None:
    hyper, twice = Theta(START), Theta(START)
    ES(STEPS, STD, 5).backward(Wave(), Accumulates(), hyper, seeded())
    for _ in range(2):
        ES(STEPS, STD, 5).backward(Wave(), Accumulates(), twice, seeded())
    assert hyper.theta.grad is not None
    torch.testing.assert_close(twice.theta.grad, 2 * hyper.theta.grad)
    assert twice.theta.item() == START


def test_another_task_begins_a_new_unroll_and_reset_does_too() -> None:
    def first() -> float:
        hyper = Theta(START)
        return PES(STEPS, 2, STD, 5).backward(Wave(), Accumulates(), hyper, seeded()).item()

    estimator, hyper, opt, task = PES(STEPS, 2, STD, 5), Theta(START), Accumulates(), Wave()
    assert estimator.backward(task, opt, hyper, seeded()).item() == first()
    assert estimator.backward(task, opt, hyper, seeded()).item() != first()
    assert estimator.backward(task, opt, hyper, seeded()).item() == first()  # the horizon is over
    assert estimator.backward(Wave(), opt, hyper, seeded()).item() == first()
    estimator.reset()
    assert estimator.backward(task, opt, hyper, seeded()).item() == first()


class Parts(nn.Module):
    """Theta as the sum of two parameters, of unlike shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor(0.1, dtype=F64))
        self.two = nn.Parameter(torch.tensor([0.05, 0.15], dtype=F64))

    def forward(self) -> dict[str, Tensor]:
        return {"theta": self.one + self.two.sum()}


def test_pes_over_one_window_is_es_in_every_unroll() -> None:
    grads = []
    for estimator in (ES(STEPS, STD, 5, "mean"), PES(STEPS, STEPS, STD, 5)):
        hyper, task, opt, generator = Parts(), Wave(), Accumulates(), seeded()
        for _ in range(3):
            hyper.zero_grad()
            estimator.backward(task, opt, hyper, generator)
            grads.append([p.grad for p in hyper.parameters()])
    for es, pes in zip(grads[:3], grads[3:], strict=True):
        torch.testing.assert_close(pes, es, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    "make", [lambda: PES(6, 2, STD, 3), lambda: PES(6, 2, STD, 3, stagger=True), lambda: TruncatedES(6, 2, STD, 3)]
)
@pytest.mark.parametrize("calls", [0, 1, 3, 4])
@pytest.mark.parametrize("draw", [0, 4])
def test_a_window_that_is_interrupted_lets_the_next_call_begin_anew(make: Any, calls: int, draw: int) -> None:
    class Interrupted(Wave):
        left = 10**9

        def batch(self, step: int, generator: Generator | None) -> tuple[()]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return ()

    task, opt, hyper, estimator, fresh = Interrupted(), Accumulates(), Parts(), make(), make()
    for _ in range(calls):
        estimator.backward(task, opt, hyper, seeded())
    hyper.zero_grad()
    task.left = draw
    with pytest.raises(KeyboardInterrupt):
        estimator.backward(task, opt, hyper, seeded())
    assert all(p.grad is None for p in hyper.parameters())
    task.left = 10**9
    grads: list[list[Tensor]] = []
    for each in (estimator, fresh):
        hyper.zero_grad()
        for seed in range(4):
            each.backward(task, opt, hyper, seeded(seed))
        grads.append([p.grad for p in hyper.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], rtol=0.0, atol=0.0)


def test_a_meta_loss_that_does_not_count_may_be_nan() -> None:
    class Late(Wave):
        def meta_loss(self, params: Tensor, hyper: Mapping[str, Any]) -> Tensor:
            return torch.log(params - 0.9).sum()  # after 2 steps NaN, after 4 not

    estimator, hyper, task, opt = PES(STEPS, 2, 0.001, 2, "final", stagger=True), Theta(START), Late(), Accumulates()
    losses = [estimator.backward(task, opt, hyper, seeded()) for _ in range(2)]
    assert losses[0] == 0.0
    assert losses[1].item() == pytest.approx(0.5 * math.log(0.3), abs=0.1)  # the other pair is in its first window
    assert hyper.theta.grad is not None
    assert hyper.theta.grad.isfinite()


def test_a_number_among_the_values_may_change_between_windows() -> None:
    class Decayed(nn.Module):
        weight_decay = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.lr = nn.Parameter(torch.tensor(0.1, dtype=F64))

        def forward(self) -> dict[str, Any]:
            return {"lr": self.lr, "weight_decay": self.weight_decay}

    task, opt = Regression(), sgd()
    losses = []
    for weight_decay in (0.0, 2.0):
        hyper, estimator, generator = Decayed(), PES(4, 2, 1e-6, 1), seeded()
        estimator.backward(task, opt, hyper, generator)
        hyper.weight_decay = weight_decay
        losses.append(estimator.backward(task, opt, hyper, generator).item())
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_module_that_hides_its_parameter_in_a_function_of_the_step_is_refused() -> None:
    class Hidden(Theta):
        def forward(self) -> dict[str, Any]:
            return {"lr": lambda step: self.theta * 0.9**step}

    with pytest.raises(ValueError, match="none of its values is a tensor"):
        ES(STEPS, STD, 2).backward(Regression(), sgd(), Hidden())


@pytest.mark.parametrize(("batch", "kind"), [(None, "NoneType"), (3, "int")])
def test_a_batch_that_is_no_tree_of_tensors_is_named(batch: Any, kind: str) -> None:
    class Odd(Wave):
        def batch(self, step: int, generator: Generator | None) -> Any:
            return batch

    with pytest.raises(TypeError, match=f"must be pytrees of tensors .*, got leaves: {kind}"):
        ES(STEPS, STD, 2).backward(Odd(), Accumulates(), Theta())


def test_reprs_name_what_differs() -> None:
    assert "stagger" not in repr(PES(4, 2, 0.1, 1))
    assert repr(PES(4, 2, 0.1, 1, stagger=True)).endswith("objective='mean', stagger=True)")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ES(2.5, 0.1, 1), "steps must be a whole number, got steps=2.5"),  # type: ignore[arg-type]
        (lambda: ES(True, 0.1, 1), "steps must be a whole number, got steps=True"),
        (lambda: ES(1, "0.1", 1), "std must be a number, got std='0.1'"),  # type: ignore[arg-type]
        (lambda: ES(1, 0.1, 2.5), "pairs must be a whole number, got pairs=2.5"),  # type: ignore[arg-type]
        (lambda: PES(4, None, 0.1, 1), "truncation must be a whole number, got truncation=None"),  # type: ignore[arg-type]
        (lambda: ES(0, 0.1, 1), "steps must be >= 1, got steps=0"),
        (lambda: ES(1, 0.0, 1), "std must be > 0 and finite, got std=0.0"),
        (lambda: ES(1, 0.1, 0), "pairs must be >= 1, got pairs=0"),
        (lambda: ES(1, 0.1, 1, "end"), "got objective='end'"),  # type: ignore[arg-type]
        (lambda: PES(4, 5, 0.1, 1), r"truncation must be in 1..steps \(4\), got truncation=5"),
        (lambda: PES(4, 3, 0.1, 1, stagger=True), "divides steps=4, got truncation=3"),
        (lambda: TruncatedES(4, 0, 0.1, 1), "got truncation=0"),
    ],
)
def test_bad_arguments_are_named(make: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def test_a_module_with_nothing_to_learn_is_refused() -> None:
    hyper = Theta()
    hyper.theta.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to learn"):
        ES(STEPS, STD, 2).backward(Wave(), Accumulates(), hyper)
