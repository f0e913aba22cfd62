"""Sinusoids: the values and ranges of the MAML paper, and how the losses are made of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from metaopt.tasks import Sinusoids, Wave


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_task(family: Sinusoids) -> Any:
    return family.task(pytree.tree_map(lambda x: x[0], family.sample(1, seeded())))


def test_amplitudes_phases_and_inputs_fill_the_ranges_of_the_paper() -> None:
    waves = Sinusoids(shots=5, queries=7).sample(2000, seeded())
    assert [tuple(x.shape) for x in waves] == [(2000,), (2000,), (2000, 5, 1), (2000, 7, 1)]
    for draws, low, high in zip(waves, (0.1, 0.0, -5.0, -5.0), (5.0, math.pi, 5.0, 5.0), strict=True):
        width = high - low
        assert low <= draws.min() < low + 0.01 * width
        assert high - 0.01 * width < draws.max() <= high
        assert draws.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * width)


def test_a_wave_is_an_amplitude_times_a_shifted_sine() -> None:
    x = torch.tensor([[0.0], [1.0], [2.5]])
    task = Sinusoids().task(Wave(torch.tensor(2.0), torch.tensor(1.0), x, x + 1))
    expected = [[2 * math.sin(v - 1)] for v in (0.0, 1.0, 2.5)]
    np.testing.assert_allclose(task.batch(0, None).y, expected, rtol=1e-6)
    assert torch.equal(task.batch(0, None).x, x)


def test_every_step_sees_the_same_support_points() -> None:
    task = first_task(Sinusoids())
    for a, b in zip(task.batch(0, seeded(1)), task.batch(7, seeded(2)), strict=True):
        assert torch.equal(a, b)


def test_the_network_is_two_hidden_layers_with_relu() -> None:
    family = Sinusoids()
    params = family.initial(seeded())
    assert {name: tuple(p.shape) for name, p in params.items()} == {
        **{"w1": (1, 40), "b1": (40,), "w2": (40, 40), "b2": (40,), "w3": (40, 1), "b3": (1,)},
    }
    x = torch.linspace(-5, 5, 9)[:, None]
    w = {name: p.numpy() for name, p in params.items()}
    hidden = np.maximum(np.maximum(x.numpy() @ w["w1"] + w["b1"], 0) @ w["w2"] + w["b2"], 0)
    np.testing.assert_allclose(family.predict(params, x), hidden @ w["w3"] + w["b3"], rtol=1e-4, atol=1e-6)


def test_losses_are_mean_squared_errors_on_support_query_and_an_even_grid() -> None:
    family = Sinusoids()
    task = first_task(family)
    # A network that says 1.5 everywhere.
    params = {name: torch.zeros_like(p) for name, p in family.initial(seeded()).items()}
    params["b3"] += 1.5
    a, phase, support, query = (x.double().numpy() for x in task.config)
    for loss, x in (
        (task.loss(params, task.batch(0, None), {}), support),
        (task.meta_loss(params, {}), query),
        (task.test(params)["loss"], np.linspace(-5, 5, 101)),
    ):
        assert loss.item() == pytest.approx(((a * np.sin(x - phase) - 1.5) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 0}, "shots must be >= 1, got shots=0"),
        ({"queries": 0}, "queries must be >= 1, got queries=0"),
        ({"hidden": (40, 0)}, r"sizes must be two or more, each >= 1, got sizes=\(1, 40, 0, 1\)"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sinusoids(**arguments)
