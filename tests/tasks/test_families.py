"""What every family of tasks keeps to: its tasks differ, vmap over configurations, compile and learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from metaopt.tasks import FewShot, Glyphs, MNIST1DSubsets, RandomQuadratics, Sinusoids, Task
from metaopt.tasks.network import Conv, Dense

COUNT = 4


def few_shot() -> FewShot:
    bank = torch.randn(12, 8, 5, generator=seeded()) + 2 * torch.randn(12, 1, 5, generator=seeded(1))
    return FewShot(bank, Dense(5, 8, 3), ways=3, shots=4, queries=4, batch_size=6, permute=True)


# Each with a learning rate at which 20 steps of SGD do it good.
FAMILIES: dict[str, tuple[Callable[[], Any], float]] = {
    "quadratics": (RandomQuadratics, 0.005),
    "sinusoids": (Sinusoids, 0.02),
    "few-shot": (few_shot, 0.2),
    "mnist1d": (lambda: MNIST1DSubsets(ways=3, shots=10, queries=10, batch_size=16), 0.3),
    "glyphs": (lambda: Glyphs(ways=3, shots=2, queries=2, size=14, channels=(4, 8)), 0.2),
}
every_family = pytest.mark.parametrize(("make", "lr"), FAMILIES.values(), ids=FAMILIES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(tree: Any, i: int) -> Any:
    return pytree.tree_map(lambda x: x[i], tree)


def over(function: Callable[..., Any], *trees: Any) -> Any:
    return torch.vmap(function, randomness="different")(*trees)


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


@every_family
def test_configurations_have_a_leading_dimension_and_come_from_the_generator(
    make: Callable[[], Any], lr: float
) -> None:
    family = make()
    before = torch.random.get_rng_state()
    first, same, other = (family.sample(COUNT, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {leaf.shape[0] for leaf in pytree.tree_leaves(first)} == {COUNT}
    assert equal(first, same)
    assert not equal(first, other)
    assert not equal(one(first, 0), one(first, 1))
    torch.manual_seed(1)
    assert equal(family.sample(COUNT, None), first)


@every_family
def test_the_task_of_a_configuration_is_a_task(make: Callable[[], Any], lr: float) -> None:
    family = make()
    task = family.task(one(family.sample(COUNT, seeded()), 2))
    assert isinstance(task, Task)
    params = task.init(seeded())
    assert equal(params, task.init(seeded()))
    assert not equal(params, task.init(seeded(1)))
    assert equal(task.batch(3, seeded()), task.batch(3, seeded()))
    for loss in (task.loss(params, task.batch(0, seeded()), {}), task.meta_loss(params, {})):
        assert loss.shape == ()
        assert loss.isfinite()
    result = task.test(params)
    assert "loss" in result
    assert all(value.shape == () and not value.requires_grad for value in result.values())


@every_family
def test_vmapped_methods_agree_with_a_loop_over_configurations(make: Callable[[], Any], lr: float) -> None:
    family, generator = make(), seeded()
    configs = family.sample(COUNT, generator)
    params = over(lambda c: family.task(c).init(generator), configs)
    batch = over(lambda c: family.task(c).batch(0, generator), configs)
    together = {
        "loss": over(lambda c, p, b: family.task(c).loss(p, b, {}), configs, params, batch),
        "gradient": over(lambda c, p, b: torch.func.grad(family.task(c).loss)(p, b, {}), configs, params, batch),
        "meta_loss": over(lambda c, p: family.task(c).meta_loss(p, {}), configs, params),
        "test": over(lambda c, p: family.task(c).test(p), configs, params),
    }
    for i in range(COUNT):
        task, p, b = family.task(one(configs, i)), one(params, i), one(batch, i)
        apart = {
            "loss": task.loss(p, b, {}),
            "gradient": torch.func.grad(task.loss)(p, b, {}),
            "meta_loss": task.meta_loss(p, {}),
            "test": task.test(p),
        }
        torch.testing.assert_close(one(together, i), apart, rtol=1e-4, atol=1e-5)


@every_family
def test_vmapped_draws_differ_between_tasks(make: Callable[[], Any], lr: float) -> None:
    family, generator = make(), seeded()
    # One configuration, several times: what differs is drawn.
    config = one(family.sample(1, generator), 0)
    configs = pytree.tree_map(lambda x: x.expand(COUNT, *x.shape), config)
    params = over(lambda c: family.task(c).init(generator), configs)
    assert not equal(one(params, 0), one(params, 1))
    draw = family.task(config).init(generator)
    assert pytree.tree_map(lambda x: (COUNT, *x.shape), draw) == pytree.tree_map(lambda x: tuple(x.shape), params)
    if getattr(family, "batch_size", None) is not None:
        batch = over(lambda c: family.task(c).batch(0, generator), configs)
        assert not equal(one(batch, 0), one(batch, 1))


@every_family
def test_gradient_descent_lowers_the_loss_of_every_task(make: Callable[[], Any], lr: float) -> None:
    family, generator = make(), seeded()
    configs = family.sample(COUNT, generator)
    params = over(lambda c: family.task(c).init(generator), configs)

    def step(config: Any, params: Any) -> Any:
        task = family.task(config)
        grads = torch.func.grad(task.loss)(params, task.batch(0, generator), {})
        return pytree.tree_map(lambda p, g: p - lr * g, params, grads)

    def losses() -> Any:
        many = seeded(1)
        return sum(
            over(lambda c, p: family.task(c).loss(p, family.task(c).batch(0, many), {}), configs, params)
            for _ in range(20)
        )

    start = losses()
    for _ in range(20):
        params = over(step, configs, params)
    assert bool((losses() < 0.9 * start).all())


@every_family
def test_the_loss_compiles_in_one_graph(make: Callable[[], Any], lr: float) -> None:
    family = make()
    configs = family.sample(COUNT, seeded())
    params = over(lambda c: family.task(c).init(None), configs)
    batch = over(lambda c: family.task(c).batch(0, None), configs)

    def losses(configs: Any, params: Any, batch: Any) -> Any:
        each = torch.vmap(lambda c, p, b: family.task(c).loss(p, b, {}) + family.task(c).meta_loss(p, {}))
        return each(configs, params, batch)

    compiled = torch.compile(losses, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(configs, params, batch), losses(configs, params, batch))


@pytest.mark.parametrize("network", [Dense(9, 6, 2), Conv(1, 3, side=4, outputs=2)])
def test_a_network_starts_as_torchs_layers_do(network: Any) -> None:
    """Uniform between -1 / sqrt(fan in) and 1 / sqrt(fan in)."""
    weights = torch.vmap(lambda _: network.init(None)["w1"], randomness="different")(torch.zeros(400))
    assert weights.abs().max() < 1 / 3
    assert weights.abs().max() > 0.99 / 3
    assert weights.std().item() == pytest.approx(1 / 3 / 3**0.5, rel=0.05)
