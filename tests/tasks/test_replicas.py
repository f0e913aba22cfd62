"""`Replicas`: several runs of a task side by side."""

from __future__ import annotations

import pytest
import torch

from metaopt.tasks import Digits, NoisyQuadratic, Replicas, Task

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_runs_have_initialisations_and_batches_of_their_own_in_the_order_of_the_generator() -> None:
    task = NoisyQuadratic(dtype=F64)
    replicas = Replicas(task, 3)
    assert isinstance(replicas, Task)
    together, apart = seeded(), seeded()
    params = replicas.init(together)
    assert params.tolist() == [task.init(apart).tolist() for _ in range(3)]
    assert replicas.batch(0, together).tolist() == [task.batch(0, apart).tolist() for _ in range(3)]
    assert len({tuple(row) for row in params.tolist()}) == 3


def test_parameters_and_batches_of_any_structure_are_stacked() -> None:
    task = Digits(batch_size=5)
    replicas = Replicas(task, 2)
    params, batch = replicas.init(seeded()), replicas.batch(0, seeded())
    assert {name: p.shape[0] for name, p in params.items()} == dict.fromkeys(task.init(None), 2)
    assert type(batch) is type(task.batch(0, None))
    assert batch.images.shape == (2, 5, 1, 8, 8)
    assert batch.labels.shape == (2, 5)


def test_its_losses_are_means_over_the_runs() -> None:
    task = Digits(batch_size=20)
    replicas = Replicas(task, 3)
    params, batch = replicas.init(seeded()), replicas.batch(0, seeded())
    runs = [{name: p[i] for name, p in params.items()} for i in range(3)]
    losses = [task.loss(run, type(batch)(*(x[i] for x in batch)), {}).item() for i, run in enumerate(runs)]
    assert replicas.loss(params, batch, {}).item() == pytest.approx(sum(losses) / 3, rel=1e-6)
    meta_losses = [task.meta_loss(run, {}).item() for run in runs]
    assert replicas.meta_loss(params, {}).item() == pytest.approx(sum(meta_losses) / 3, rel=1e-6)
    assert len(set(meta_losses)) == 3


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be >= 1, got count=0"):
        Replicas(NoisyQuadratic(), 0)
