"""An estimator that goes over an unroll in windows is saved between two of them, and another goes on from there."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

import metaopt
from metaopt import Hyperparameters
from metaopt.functional import radam, sgd
from metaopt.metagrad import ES, PES, Forward, Implicit, Online, TruncatedES, Unrolled
from metaopt.tasks import NoisyQuadratic, RandomQuadratics, Replicas, TaskBatch

TASKS: dict[str, Callable[[], Any]] = {
    "one": lambda: NoisyQuadratic(dimension=3),
    "replicas": lambda: Replicas(NoisyQuadratic(dimension=3), 2),
    "family": lambda: TaskBatch(RandomQuadratics(dimension=3), 2),
}
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "windows": lambda: Unrolled(12, "mean", truncation=4, carry=True),
    "pes": lambda: PES(12, 4, std=0.1, pairs=3),
    "staggered pes": lambda: PES(12, 4, std=0.1, pairs=3, stagger=True),
    "truncated es": lambda: TruncatedES(12, 4, std=0.1, pairs=3),
    "online": lambda: Online(5),
}


def through_a_file(state: Any) -> Any:
    """As a checkpoint does it: nothing but tensors and plain values gets through."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def calls(estimator: Any, task: Any, count: int, generator: torch.Generator, hyper: Hyperparameters) -> list[Any]:
    """Losses and gradients of calls with hyperparameters that move."""
    found = []
    opt = OPT
    for _ in range(count):
        hyper.zero_grad()
        loss = estimator.backward(task, opt, hyper, generator)
        found.append((loss.item(), [p.grad.tolist() for p in hyper.parameters()]))
        with torch.no_grad():
            for p in hyper.parameters():
                p -= 0.05 * p.grad.sign()
    return found


OPT = radam(lr=0.05)


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_another_goes_on_bit_for_bit(name: str, task_name: str, done: int) -> None:
    def fresh() -> tuple[torch.Generator, Hyperparameters]:
        return torch.Generator().manual_seed(3), Hyperparameters(OPT, {"lr": 0.05, "betas": (0.9, 0.99)})

    generator, hyper = fresh()
    whole = calls(ESTIMATORS[name](), TASKS[task_name](), done + 4, generator, hyper)

    generator, hyper = fresh()
    first = ESTIMATORS[name]()
    parts = calls(first, TASKS[task_name](), done, generator, hyper)
    saved = through_a_file([first.state_dict(), generator.get_state(), hyper.state_dict()])

    generator, hyper = fresh()
    second = ESTIMATORS[name]()
    second.load_state_dict(saved[0])
    generator.set_state(saved[1])
    hyper.load_state_dict(saved[2])
    assert second.state_dict() == saved[0]  # saved again before it is used
    assert parts + calls(second, TASKS[task_name](), 4, generator, hyper) == whole


def test_a_warm_start_is_saved_with_its_solution() -> None:
    from torch.distributions import constraints

    class Ridge:
        def init(self, generator: Any) -> dict[str, torch.Tensor]:
            return {"x": torch.zeros(3, dtype=torch.float64)}

        def batch(self, step: int, generator: Any) -> tuple[()]:
            return ()

        def loss(self, params: Any, batch: Any, hyper: Any) -> torch.Tensor:
            scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
            return (scales * (params["x"] - 1) ** 2 + hyper["penalty"] * params["x"] ** 2).sum()

        def meta_loss(self, params: Any, hyper: Any) -> torch.Tensor:
            return ((params["x"] - 0.5) ** 2).sum()

    task, opt = Ridge(), sgd(lr=0.1)

    def make() -> tuple[Implicit, Hyperparameters]:
        estimator = Implicit(5, warm_start=True, gradient_tolerance=10.0)
        return estimator, Hyperparameters(opt, {"penalty": (0.5, constraints.positive)})

    estimator, hyper = make()
    losses = [estimator.backward(task, opt, hyper).item() for _ in range(3)]
    first, hyper = make()
    start = [first.backward(task, opt, hyper).item() for _ in range(2)]
    second, hyper = make()
    second.load_state_dict(through_a_file(first.state_dict()))
    assert [*start, second.backward(task, opt, hyper).item()] == losses
    assert len(set(losses)) == 3
    assert second.report is not None


def test_what_starts_afresh_in_every_call_has_nothing_to_save() -> None:
    task, hyper = NoisyQuadratic(), Hyperparameters(OPT, ("lr",))
    for estimator in (Unrolled(3), Implicit(3)):
        assert estimator.state_dict() == {}
        if isinstance(estimator, Unrolled):
            estimator.backward(task, OPT, hyper)
            assert estimator.state_dict() == {}
    assert not any(hasattr(estimator, "state_dict") for estimator in (Forward(3), ES(3, std=0.1, pairs=2)))


def test_reset_forgets_what_was_loaded() -> None:
    task, hyper = NoisyQuadratic(), Hyperparameters(OPT, ("lr",))
    first, second = ESTIMATORS["pes"](), ESTIMATORS["pes"]()
    first.backward(task, OPT, hyper)
    second.load_state_dict(first.state_dict())
    second.reset()
    assert second.state_dict() == {}


@pytest.mark.parametrize("name", ["windows", "pes"])
def test_the_state_of_another_task_is_refused(name: str) -> None:
    hyper = Hyperparameters(OPT, ("lr",))
    first, second = ESTIMATORS[name](), ESTIMATORS[name]()
    first.backward(NoisyQuadratic(dimension=3), OPT, hyper)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"not of this task.*\[\(3,\)\], the task.s \[\(4,\)\]"):
        second.backward(NoisyQuadratic(dimension=4), OPT, hyper)


def test_another_number_of_pairs_is_refused() -> None:
    hyper = Hyperparameters(OPT, ("lr",))
    first, second = PES(12, 4, std=0.1, pairs=3), PES(12, 4, std=0.1, pairs=4)
    first.backward(NoisyQuadratic(), OPT, hyper)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="3 pairs of unrolls, not 4"):
        second.backward(NoisyQuadratic(), OPT, hyper)


def test_all_have_the_protocol_of_an_estimator() -> None:
    assert all(isinstance(make(), metaopt.metagrad.Estimator) for make in ESTIMATORS.values())
