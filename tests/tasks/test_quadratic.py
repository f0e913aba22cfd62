"""The noisy quadratic: its draws have the moments it states, and training on it follows the closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.functional import sgd
from metaopt.tasks import NoisyQuadratic, Replicas, Task

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def descend(task: Any, params: Tensor, lr: float, steps: int, generator: torch.Generator) -> Tensor:
    opt = sgd(lr=lr)
    state = opt.init(params)
    for step in range(steps):
        grads = torch.func.grad(task.loss)(params, task.batch(step, generator), {})
        params, state = opt.step(params, grads, state)
    return params


def test_curvatures_are_spaced_evenly_in_their_logarithm() -> None:
    task = NoisyQuadratic(dimension=5, condition=1e4, dtype=F64)
    assert task.curvature.tolist() == pytest.approx([1.0, 0.1, 0.01, 1e-3, 1e-4], rel=1e-14)
    assert NoisyQuadratic(dimension=1).curvature.tolist() == [1.0]
    assert NoisyQuadratic(condition=1.0, dimension=3).curvature.tolist() == [1.0] * 3


def test_without_noise_gradient_descent_multiplies_each_coordinate_by_a_power() -> None:
    """x_T = (1 - lr h)^T x_0; the meta-loss is the sum of h x^2 / 2."""
    task = NoisyQuadratic(dimension=6, condition=50.0, noise=0.0, dtype=F64)
    start = task.init(seeded())
    end = descend(task, start, lr=0.7, steps=20, generator=seeded())
    expected = (1 - 0.7 * task.curvature) ** 20 * start
    torch.testing.assert_close(end, expected, rtol=1e-12, atol=0.0)
    assert task.meta_loss(end, {}).item() == pytest.approx(
        sum(h * x**2 / 2 for h, x in zip(task.curvature.tolist(), expected.tolist(), strict=True)), rel=1e-13
    )
    assert task.loss(end, torch.zeros(6), {}) == task.meta_loss(end, {}) == task.test(end)["loss"]


def test_with_noise_the_expected_loss_follows_its_recursion() -> None:
    """E x^2 <- (1 - lr h)^2 E x^2 + lr^2 noise^2 h, and E x_0^2 = start^2 / h."""
    task = NoisyQuadratic(dimension=4, condition=20.0, noise=0.8, start=1.5, dtype=F64)
    runs, lr, steps = 4000, 0.6, 15
    replicas = Replicas(task, runs)
    generator = seeded()
    params = replicas.init(generator)
    second = 1.5**2 / task.curvature
    for step in range(steps):
        grads = torch.vmap(torch.func.grad(task.loss), in_dims=(0, 0, None))(
            params, replicas.batch(step, generator), {}
        )
        params = params - lr * grads
        second = (1 - lr * task.curvature) ** 2 * second + lr**2 * 0.8**2 * task.curvature
    measured = params.square().mean(0)
    # x is normal with mean 0: x^2 has a standard deviation of sqrt(2) times its mean.
    assert bool(((measured / second - 1).abs() < 4 * (2 / runs) ** 0.5).all()), measured / second


def test_its_draws_have_the_moments_it_states() -> None:
    """Start: N(0, start^2 / h). Gradient: h x plus noise of covariance noise^2 diag(h)."""
    task = NoisyQuadratic(dimension=3, condition=10.0, noise=0.3, start=2.0, dtype=F64)
    generator, draws = seeded(), 4000
    h = task.curvature
    starts = torch.stack([task.init(generator) for _ in range(draws)])
    x = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    gradient = torch.func.grad(task.loss)
    noise = torch.stack([gradient(x, task.batch(t, generator), {}) - h * x for t in range(draws)])
    for sample, variance in ((starts, 4.0 / h), (noise, 0.09 * h)):
        scale = variance.sqrt()
        assert bool(((sample.mean(0) / scale).abs() < 4 / draws**0.5).all())
        correlations = (sample / scale).T @ (sample / scale) / draws
        torch.testing.assert_close(correlations, torch.eye(3, dtype=F64), rtol=0.0, atol=4 * (2 / draws) ** 0.5)


def test_every_coordinate_weighs_alike_at_the_start() -> None:
    """The expected meta-loss is dimension start^2 / 2, whatever the condition."""
    for condition in (1.0, 1e4):
        task = NoisyQuadratic(dimension=50, condition=condition, start=3.0, dtype=F64)
        generator = seeded()
        mean = sum(task.meta_loss(task.init(generator), {}).item() for _ in range(100)) / 100
        assert mean == pytest.approx(50 * 9 / 2, rel=4 * (2 / 5000) ** 0.5)


def test_it_is_reproducible_from_the_generator_and_leaves_the_global_random_numbers_alone() -> None:
    task = NoisyQuadratic()
    before = torch.random.get_rng_state()
    draws = [(task.init(g).tolist(), task.batch(0, g).tolist()) for g in (seeded(1), seeded(1), seeded(2))]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[2][0]
    assert draws[0][1] != draws[2][1]
    torch.manual_seed(1)
    assert task.init(None).tolist() == draws[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_it_is_a_task_in_the_precision_asked_for(dtype: torch.dtype) -> None:
    task = NoisyQuadratic(dtype=dtype)
    assert isinstance(task, Task)
    params, batch = task.init(seeded()), task.batch(0, seeded())
    assert {x.dtype for x in (params, batch, task.loss(params, batch, {}), task.meta_loss(params, {}))} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "dimension must be >= 1, got dimension=0"),
        ({"condition": 0.5}, "condition must be >= 1, got condition=0.5"),
        ({"noise": -0.1}, "noise and start must be >= 0, got noise=-0.1"),
        ({"start": -1.0}, "noise and start must be >= 0, got noise=0.1 and start=-1.0"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyQuadratic(**arguments)
