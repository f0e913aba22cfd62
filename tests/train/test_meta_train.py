"""`meta_train`: finds optima that are known, records what it did, and leaves the meta-optimizer to torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints

import metaopt
from metaopt import Hyperparameters, meta_train
from metaopt.functional import sgd
from metaopt.metagrad import Unrolled
from metaopt.tasks import NoisyQuadratic

F64 = torch.float64
STEPS = 10


class Quadratic(NoisyQuadratic):
    """Gradient descent from x_0 = h^(-1/2): the meta-loss is the sum of (1 - lr h)^(2 T) / 2."""

    def __init__(self) -> None:
        super().__init__(dimension=5, condition=10.0, noise=0.0, dtype=F64)

    def init(self, generator: Generator | None) -> Tensor:
        return self.curvature**-0.5

    def closed_form(self, lr: float) -> float:
        return sum((1 - lr * h) ** (2 * STEPS) for h in self.curvature.tolist()) / 2

    def slope(self, lr: float) -> float:
        return sum(-STEPS * h * (1 - lr * h) ** (2 * STEPS - 1) for h in self.curvature.tolist())


TASK, OPT = Quadratic(), sgd()
BEST = min((1 + i / 10_000 for i in range(10_000)), key=TASK.closed_form)


def learn(
    make: Callable[[Any], torch.optim.Optimizer], steps: int, start: float = 0.1, **options: Any
) -> tuple[Hyperparameters, metaopt.train.MetaTrainResult]:
    hyper = Hyperparameters(OPT, {"lr": start})
    options = {"progress": False, **options}
    return hyper, meta_train(TASK, OPT, hyper, Unrolled(STEPS), make(hyper.parameters()), steps, **options)


# What is learned


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda params: torch.optim.Adam(params, lr=0.1), 120),
        (lambda params: torch.optim.SGD(params, lr=0.3), 150),
        (lambda params: torch.optim.RAdam(params, lr=0.1, betas=(0.9, 0.99)), 150),
        (lambda params: torch.optim.Rprop(params, lr=0.1), 60),
        (lambda params: metaopt.optim.RAdam(params, lr=0.1, betas=(0.9, 0.99)), 150),
        (lambda params: metaopt.optim.Rprop(params, lr=0.1), 60),
    ],
    ids=["Adam", "SGD", "RAdam", "Rprop", "our RAdam", "our Rprop"],
)
def test_any_optimizer_of_torch_finds_the_learning_rate_of_a_grid_search(make: Any, steps: int) -> None:
    assert 1.5 < BEST < 1.9
    hyper, result = learn(make, steps)
    assert hyper.numbers()["lr"] == pytest.approx(BEST, rel=5e-3)
    assert result.losses[-1] == pytest.approx(TASK.closed_form(BEST), rel=1e-3)
    assert result.losses[-1] < 0.05 * result.losses[0]


def test_a_meta_step_is_the_meta_optimizers_step_on_the_hypergradient() -> None:
    """Plain gradient descent in the logarithm of lr: log lr <- log lr - 0.3 lr dL/dlr, step by step."""
    _, result = learn(lambda params: torch.optim.SGD(params, lr=0.3), steps=6, start=0.2)
    lr = 0.2
    for record in result.history:
        assert record["hyper"]["lr"] == pytest.approx(lr, rel=1e-11)
        lr *= math.exp(-0.3 * lr * TASK.slope(lr))


def test_a_run_continues_where_the_last_one_stopped() -> None:
    hyper = Hyperparameters(OPT, {"lr": 0.1})
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    parts = [
        meta_train(TASK, OPT, hyper, Unrolled(STEPS), meta_optimizer, steps, progress=False).losses for steps in (3, 4)
    ]
    _, whole = learn(lambda params: torch.optim.Adam(params, lr=0.1), steps=7)
    assert parts[0] + parts[1] == whole.losses


def test_the_generator_is_handed_on_and_the_default_is_torchs() -> None:
    def losses(generator: Generator | None) -> list[float]:
        hyper = Hyperparameters(OPT, {"lr": 0.1})
        meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
        task = NoisyQuadratic()
        return meta_train(
            task, OPT, hyper, Unrolled(3), meta_optimizer, steps=3, generator=generator, progress=False
        ).losses

    def seeded(seed: int) -> Generator:
        return torch.Generator().manual_seed(seed)

    before = torch.random.get_rng_state()
    first = losses(seeded(1))
    assert first == losses(seeded(1)) != losses(seeded(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(set(first)) == 3
    torch.manual_seed(1)
    assert losses(None) == first


# What is recorded


def test_the_history_holds_the_loss_gradient_and_values_before_each_step() -> None:
    hyper, result = learn(lambda params: torch.optim.Adam(params, lr=0.2), steps=8)
    assert len(result.losses) == len(result.history) == 8
    assert result.history[0]["hyper"]["lr"] == pytest.approx(0.1, rel=1e-12)
    for loss, record in zip(result.losses, result.history, strict=True):
        lr = record["hyper"]["lr"]
        assert set(record) == {"meta_loss", "grad_norm", "grad_norms", "grad_snr", "seconds", "memory_mib", "hyper"}
        assert record["grad_norms"] == {"lr": record["grad_norm"]}
        assert 10 < record["memory_mib"]["process"] < 100_000
        assert loss == record["meta_loss"] == pytest.approx(TASK.closed_form(lr), rel=1e-12)
        assert record["grad_norm"] == pytest.approx(abs(lr * TASK.slope(lr)), rel=1e-10)
        assert record["seconds"] > 0
    assert len({record["hyper"]["lr"] for record in result.history} | {hyper.numbers()["lr"]}) == 9
    json.dumps(result.history)


def test_the_gradient_norm_is_taken_over_all_parameters() -> None:
    opt = sgd(momentum=0.5)
    hyper = Hyperparameters(opt, {"lr": 0.1, "momentum": 0.5})
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=0.0)
    result = meta_train(TASK, opt, hyper, Unrolled(STEPS), meta_optimizer, steps=1, progress=False)
    assert result.history[0]["grad_norm"] == pytest.approx(
        math.hypot(*(p.grad.item() for p in hyper.parameters())), rel=1e-14
    )


def test_a_tracker_gets_each_record_once_with_its_step() -> None:
    class Tracker:
        def __init__(self) -> None:
            self.calls: list[tuple[int, dict[str, Any]]] = []

        def log(self, metrics: Any, step: int) -> None:
            self.calls.append((step, dict(metrics)))

    tracker = Tracker()
    _, result = learn(lambda params: torch.optim.Adam(params, lr=0.1), steps=5, tracker=tracker)
    assert tracker.calls == list(enumerate(result.history))


def test_what_was_tracked_before_an_interruption_is_kept() -> None:
    class Interrupts:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, metrics: Any, step: int) -> None:
            self.steps.append(step)
            if step == 2:
                raise KeyboardInterrupt

    tracker = Interrupts()
    hyper = Hyperparameters(OPT, {"lr": 0.1})
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        meta_train(TASK, OPT, hyper, Unrolled(STEPS), meta_optimizer, steps=5, tracker=tracker, progress=False)
    assert tracker.steps == [0, 1, 2]
    assert math.log(hyper.numbers()["lr"] / 0.1) == pytest.approx(0.3, rel=0.05)  # three steps of Adam were taken


# Any module, any of its parameters


def test_a_module_of_the_users_is_learned_and_has_no_numbers_in_the_record() -> None:
    class Rate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_lr = nn.Parameter(torch.tensor(math.log(0.1), dtype=F64))

        def forward(self) -> dict[str, Tensor]:
            return {"lr": self.log_lr.exp()}

    rate = Rate()
    meta_optimizer = torch.optim.Adam(rate.parameters(), lr=0.1)
    result = meta_train(TASK, OPT, rate, Unrolled(STEPS), meta_optimizer, steps=30, progress=False)
    _, ours = learn(lambda params: torch.optim.Adam(params, lr=0.1), steps=30)
    assert result.losses == pytest.approx(ours.losses, rel=1e-12)
    assert "hyper" not in result.history[0]
    assert list(result.history[0]["grad_norms"]) == ["log_lr"]


def test_a_parameter_that_the_meta_optimizer_does_not_hold_stays_and_its_gradient_does_not_pile_up() -> None:
    opt = sgd(momentum=0.5)
    hyper = Hyperparameters(opt, {"lr": 0.1, "momentum": 0.5})
    meta_optimizer = torch.optim.SGD([hyper.lr], lr=0.0)
    result = meta_train(TASK, opt, hyper, Unrolled(STEPS), meta_optimizer, steps=3, progress=False)
    assert hyper.numbers()["momentum"] == pytest.approx(0.5, rel=1e-12)
    assert len({record["grad_norm"] for record in result.history}) == 1


def test_a_gradient_from_before_does_not_count() -> None:
    hyper = Hyperparameters(OPT, {"lr": 0.1})
    hyper.lr.grad = torch.full_like(hyper.lr, 1e6)
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=0.3)
    result = meta_train(TASK, OPT, hyper, Unrolled(STEPS), meta_optimizer, steps=1, progress=False)
    assert result.history[0]["grad_norm"] == pytest.approx(abs(0.1 * TASK.slope(0.1)), rel=1e-10)


# Clipping and schedules are torch's


def test_a_step_pre_hook_clips_the_meta_gradient() -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        meta_optimizer = torch.optim.SGD(params, lr=0.5)
        meta_optimizer.register_step_pre_hook(
            lambda optimizer, args, kwargs: nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01) and None
        )
        return meta_optimizer

    hyper, result = learn(make, steps=4)
    assert min(record["grad_norm"] for record in result.history) > 0.01  # of the gradient before it was clipped
    # Each step is lr times the norm that was clipped to, in the logarithm, up to the 1e-6 that torch adds to a norm.
    assert math.log(hyper.numbers()["lr"] / 0.1) == pytest.approx(4 * 0.5 * 0.01, rel=1e-4)


def test_a_step_post_hook_runs_a_scheduler() -> None:
    made: list[torch.optim.Optimizer] = []

    def make(params: Any) -> torch.optim.Optimizer:
        meta_optimizer = torch.optim.SGD(params, lr=0.4)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(meta_optimizer, gamma=0.5)
        meta_optimizer.register_step_post_hook(lambda optimizer, args, kwargs: scheduler.step())
        made.append(meta_optimizer)
        return meta_optimizer

    hyper, result = learn(make, steps=4)
    assert made[0].param_groups[0]["lr"] == 0.4 * 0.5**4
    expected = sum(
        0.4 * 0.5**step * -record["hyper"]["lr"] * TASK.slope(record["hyper"]["lr"])
        for step, record in enumerate(result.history)
    )
    assert math.log(hyper.numbers()["lr"] / 0.1) == pytest.approx(expected, rel=1e-10)


# Refusals


def test_a_plateau_of_the_meta_loss_lowers_the_learning_rate() -> None:
    hyper = Hyperparameters(sgd(lr=0.01), ("lr",))
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=0.0)  # so that the meta-loss stays
    meta_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(()))], "lr": 1.0})
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(meta_optimizer, factor=0.1, patience=2)
    task, steps = NoisyQuadratic(noise=0.0, start=0.0), 5
    meta_train(task, sgd(), hyper, Unrolled(3), meta_optimizer, steps=steps, scheduler=scheduler, progress=False)
    assert meta_optimizer.param_groups[1]["lr"] == pytest.approx(0.1)


def test_optimizers_that_cannot_take_a_meta_step_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    hyper = Hyperparameters(sgd(lr=0.01), ("lr",))
    adam, other = (torch.optim.Adam(hyper.parameters(), lr=0.1) for _ in range(2))
    task, opt, estimator = NoisyQuadratic(), sgd(), Unrolled(3)
    with pytest.raises(ValueError, match="meta_optimizer must step without a closure, got LBFGS"):
        meta_train(task, opt, hyper, estimator, torch.optim.LBFGS(hyper.parameters()), 2, tmp_path / "a")
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    with pytest.raises(ValueError, match="scheduler must be of meta_optimizer, got StepLR of another optimizer"):
        meta_train(task, opt, hyper, estimator, adam, 2, tmp_path / "a", scheduler=scheduler)
    assert not (tmp_path / "a").exists()


def test_bad_arguments_are_refused_before_anything_is_run() -> None:
    hyper = Hyperparameters(OPT, {"lr": 0.1})
    good = torch.optim.Adam(hyper.parameters())
    other = torch.optim.Adam(Hyperparameters(OPT, {"lr": 0.1}).parameters())
    calls: list[None] = []

    class Estimator:
        def backward(self, *args: Any) -> Tensor:
            calls.append(None)
            raise AssertionError

    with pytest.raises(ValueError, match="steps must be >= 1, got steps=0"):
        meta_train(TASK, OPT, hyper, Estimator(), good, steps=0)
    with pytest.raises(ValueError, match="meta_optimizer holds none of hyper's parameters"):
        meta_train(TASK, OPT, hyper, Estimator(), other)
    assert not calls


def test_a_value_without_effect_is_named_and_nothing_has_moved(capsys: pytest.CaptureFixture[str]) -> None:
    hyper = Hyperparameters(OPT, {"lr": 0.1, "penalty": (0.1, constraints.positive)})
    before = hyper.numbers()
    with pytest.raises(ValueError, match="does not depend on the learned 'penalty'"):
        meta_train(TASK, OPT, hyper, Unrolled(STEPS), torch.optim.Adam(hyper.parameters()))
    assert hyper.numbers() == before
