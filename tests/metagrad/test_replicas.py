"""`Unrolled` on `Replicas`: the mean over separate runs, for every kind of optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from metaopt import Hyperparameters, PerParameter, Schedule
from metaopt.functional import REGISTRY, Optimizer, sgd
from metaopt.metagrad import Unrolled
from metaopt.tasks import Replicas
from tests.metagrad.reference import STARTS, Regression, learn_all, seeded

F64 = torch.float64
COUNT, STEPS = 3, 9
NAMES = ("in.weight", "in.bias", "out.weight")


class Recorded(Regression):
    """Hands out what was drawn before: the runs of `Replicas` in turn, or one of them alone."""

    def __init__(self, runs: range) -> None:
        super().__init__()
        generator = seeded(11)
        inits = [super(Recorded, self).init(generator) for _ in range(COUNT)]
        batches = [[super(Recorded, self).batch(t, generator) for _ in range(COUNT)] for t in range(STEPS)]
        self._inits = [inits[run] for run in runs]
        self._batches = [[row[run] for run in runs] for row in batches]

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return self._inits.pop(0)

    def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self._batches[step].pop(0)


class NormState(NamedTuple):
    count: Tensor
    norm: dict[str, Tensor]


class NormalizedDescent:
    """p <- p - lr g / (norm of g, averaged with a decay, of the whole tensor): not elementwise."""

    hyperparameters = ("lr", "decay")
    defaults: Mapping[str, Any] = {"lr": 0.1, "decay": 0.5}

    def init(self, params: dict[str, Tensor], **hyper: Any) -> NormState:
        assert all(p.dim() == len(SHAPES[name]) for name, p in params.items())
        return NormState(torch.zeros(()), {name: p.norm() for name, p in params.items()})

    def step(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], state: NormState, **hyper: Any
    ) -> tuple[dict[str, Tensor], NormState]:
        values = {**self.defaults, **hyper}
        assert set(values) == {"lr", "decay"}
        decay = values["decay"]
        norm = {name: decay * state.norm[name] + (1 - decay) * g.norm() for name, g in grads.items()}
        new = {name: p - values["lr"] * grads[name] / norm[name] for name, p in params.items()}
        return new, NormState(state.count + 1, norm)


SHAPES = {"in.weight": (4, 3), "in.bias": (4,), "out.weight": (4,)}


def normalized(**more: Any) -> tuple[Any, Hyperparameters]:
    opt = NormalizedDescent()
    learn = {"lr": (0.1, constraints.positive), "decay": (0.5, constraints.unit_interval)}
    return opt, Hyperparameters(opt, {**learn, **more})


def assert_is_the_mean_of_separate_runs(make: Callable[[], tuple[Any, Any]], estimator: Unrolled) -> None:
    opt, hyper = make()
    together = estimator.backward(Replicas(Recorded(range(COUNT)), COUNT), opt, hyper)
    opt, apart = make()
    losses = [estimator.backward(Recorded(range(run, run + 1)), opt, apart) for run in range(COUNT)]
    assert len({loss.item() for loss in losses}) == COUNT
    torch.testing.assert_close(together, torch.stack(losses).mean(), rtol=1e-13, atol=0.0)
    for (key, p), q in zip(hyper.named_parameters(), apart.parameters(), strict=True):
        assert p.grad is not None, key
        assert q.grad is not None, key
        mean = q.grad / COUNT
        assert mean.abs().max() > 0, key
        torch.testing.assert_close(p.grad, mean, rtol=0.0, atol=1e-11 * mean.abs().max().item())


each_objective = pytest.mark.parametrize(
    "estimator",
    [Unrolled(STEPS), Unrolled(STEPS, "mean", truncation=4), Unrolled(STEPS, "inner")],
    ids=lambda estimator: estimator.objective,
)


@pytest.mark.parametrize("name", REGISTRY)
@each_objective
def test_replicas_of_an_elementwise_optimizer_are_separate_runs(name: str, estimator: Unrolled) -> None:
    assert_is_the_mean_of_separate_runs(lambda: learn_all(name), estimator)


@each_objective
def test_replicas_of_an_optimizer_with_a_norm_per_tensor_are_separate_runs(estimator: Unrolled) -> None:
    assert isinstance(NormalizedDescent(), Optimizer)
    assert_is_the_mean_of_separate_runs(normalized, estimator)


@each_objective
def test_replicas_read_schedules_per_parameter_values_and_values_of_the_task_like_single_runs(
    estimator: Unrolled,
) -> None:
    penalty = (0.02, constraints.positive)
    schedule = Schedule(STEPS, 0.1)

    def registered() -> tuple[Any, Hyperparameters]:
        opt = sgd(**STARTS["sgd"])
        return opt, Hyperparameters(opt, {"lr": PerParameter(NAMES, schedule), "penalty": penalty})

    assert_is_the_mean_of_separate_runs(registered, estimator)
    assert_is_the_mean_of_separate_runs(
        lambda: normalized(lr=(schedule, constraints.positive), penalty=penalty), estimator
    )


@pytest.mark.parametrize("name", ["radam", "rprop"])
def test_one_replica_is_the_task_itself(name: str) -> None:
    opt, hyper = learn_all(name)
    loss = Unrolled(STEPS, "mean").backward(Replicas(Regression(), 1), opt, hyper, seeded())
    opt, alone = learn_all(name)
    assert Unrolled(STEPS, "mean").backward(Regression(), opt, alone, seeded()).item() == pytest.approx(
        loss.item(), rel=1e-14
    )
    for p, q in zip(hyper.parameters(), alone.parameters(), strict=True):
        assert p.grad.item() == pytest.approx(q.grad.item(), rel=1e-11)
