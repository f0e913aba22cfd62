"""MNIST-1D: the published data, number for number, and the task made of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from metaopt.functional import sgd
from metaopt.tasks import MNIST1D, Task, load_mnist1d, mlp1d
from metaopt.tasks.mnist1d import MNIST1DData, generate_mnist1d


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_the_data_set_that_the_published_package_makes() -> None:
    published = pytest.importorskip("mnist1d.data").make_dataset()
    signals, labels = generate_mnist1d()
    # The same operations on the same random numbers: equal to the last bit, or to rounding under another scipy.
    np.testing.assert_allclose(signals[:4000], published["x"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(signals[4000:], published["x_test"], rtol=0, atol=1e-12)
    assert np.array_equal(labels[:4000], published["y"])
    assert np.array_equal(labels[4000:], published["y_test"])
    train, test = load_mnist1d()
    assert np.array_equal(train.images.numpy(), published["x"].astype(np.float32))
    assert np.array_equal(test.images.numpy(), published["x_test"].astype(np.float32))


def test_its_first_and_last_numbers_are_the_published_ones() -> None:
    """As mnist1d 0.0.2.post1 makes them, for where it is not installed."""
    train, test = load_mnist1d()
    assert train.images[0, :3].tolist() == pytest.approx(
        [-0.33200566736939013, -0.4719103656557236, -0.778697076293495], rel=1e-6
    )
    assert test.images[-1, :3].tolist() == pytest.approx(
        [-0.5193287078205188, -0.6987227646777667, -1.2810376906623184], rel=1e-6
    )
    assert train.labels[:20].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1, 6, 9, 4, 3, 4, 5, 1, 9, 0, 3]
    assert train.labels.bincount().tolist() == [398, 396, 411, 394, 394, 402, 401, 404, 402, 398]


def test_it_is_centred_and_balanced_and_split_in_four_to_one() -> None:
    train, test = load_mnist1d()
    assert (train.images.shape, test.images.shape) == ((4000, 40), (1000, 40))
    assert train.images.dtype == test.images.dtype == torch.float32
    assert train.labels.dtype == torch.int64
    images, labels = torch.cat([train.images, test.images]).double(), torch.cat([train.labels, test.labels])
    assert images.mean().item() == pytest.approx(0, abs=1e-7)
    assert images.std(correction=0).item() == pytest.approx(1, rel=1e-7)
    assert labels.bincount().tolist() == [500] * 10


def test_it_is_made_once_and_without_touching_the_global_random_numbers() -> None:
    assert load_mnist1d() is load_mnist1d()
    load_mnist1d.cache_clear()
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    first = load_mnist1d()
    assert isinstance(first, MNIST1DData)
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_sequential_batches_take_the_rows_in_order_and_begin_anew() -> None:
    task = MNIST1D(batch_size=1500, order="sequential", validation=0)
    rows = load_mnist1d().train
    assert torch.equal(task.batch(1, None).images, rows.images[1500:3000])
    wrapped = task.batch(2, seeded())
    assert torch.equal(wrapped.images, torch.cat([rows.images[3000:], rows.images[:500]]))
    assert torch.equal(wrapped.labels, torch.cat([rows.labels[3000:], rows.labels[:500]]))


def test_the_last_rows_are_held_out_and_with_none_the_training_rows_judge() -> None:
    rows = load_mnist1d().train
    task = MNIST1D(validation=1200)
    assert torch.equal(task.data.train.images, rows.images[:2800])
    assert torch.equal(task.data.validation.images, rows.images[2800:])
    everything = MNIST1D(validation=0)
    params = everything.init(seeded())
    assert everything.meta_loss(params, {}) == everything.loss(params, rows, {})
    assert len(MNIST1D().data.train.labels) == 3000


def test_the_network_has_the_size_it_states() -> None:
    assert sum(p.numel() for p in mlp1d().parameters()) == 2560
    assert "2,560 weights" in (mlp1d.__doc__ or "")


def test_it_is_a_task_that_sgd_learns() -> None:
    task, opt, generator = MNIST1D(), sgd(lr=0.5), seeded()
    assert isinstance(task, Task)
    params = task.init(generator)
    start, state = task.meta_loss(params, {}), opt.init(params)
    for step in range(400):
        grads = torch.func.grad(task.loss)(params, task.batch(step, generator), {})
        params, state = opt.step(params, grads, state)
    assert task.meta_loss(params, {}) < 0.75 * start
    assert task.test(params)["accuracy"] > 0.4  # of a hundred, ten by chance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got batch_size=0"),
        ({"order": "sorted"}, "order must be 'random' or 'sequential', got order='sorted'"),
        ({"validation": 4000}, "validation must be in 0..3999, got validation=4000"),
        ({"validation": -1}, "validation must be in 0..3999, got validation=-1"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    make: Callable[..., MNIST1D] = MNIST1D
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)
