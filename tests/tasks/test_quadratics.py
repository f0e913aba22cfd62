"""Random quadratics: their minimum, their gradient and the moments of their draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metaopt.tasks import Quadratic, RandomQuadratics


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_minimum_is_zero_where_the_linear_system_is_solved() -> None:
    family = RandomQuadratics(dimension=6)
    matrix, target = (part[0].double() for part in family.sample(1, seeded()))
    task = family.task(Quadratic(matrix, target))
    solution = torch.linalg.solve(matrix, target)
    assert task.meta_loss(solution, {}).item() < 1e-20
    assert torch.func.grad(task.meta_loss)(solution, {}).abs().max() < 1e-10


def test_loss_and_gradient_are_those_of_the_formula() -> None:
    matrix, target = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([1.0, 1.0])
    task = RandomQuadratics(dimension=2).task(Quadratic(matrix, target))
    x = torch.tensor([1.0, 1.0])  # W x - y = (2, -2)
    batch = task.batch(0, None)
    assert task.loss(x, batch, {}).item() == task.meta_loss(x, {}).item() == task.test(x)["loss"].item() == 8.0
    assert torch.func.grad(task.loss)(x, batch, {}).tolist() == [4.0, 12.0]  # 2 W^T (2, -2)


def test_entries_and_starting_points_are_normal() -> None:
    family = RandomQuadratics(dimension=10, start=3.0)
    configs = family.sample(300, seeded())
    starts = torch.vmap(lambda c: family.task(c).init(None), randomness="different")(configs)
    for draws, deviation in ((configs.matrix, 1.0), (configs.target, 1.0), (starts, 3.0)):
        scaled = draws.flatten() / deviation
        assert abs(scaled.mean().item()) < 4 / scaled.numel() ** 0.5
        assert scaled.square().mean().item() == pytest.approx(1.0, abs=4 * (2 / scaled.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "dimension must be >= 1, got dimension=0"),
        ({"start": -1.0}, "start must be >= 0, got start=-1.0"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomQuadratics(**arguments)
