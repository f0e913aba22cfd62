"""`Classification` of any data: how batches are taken, and what is refused. Its losses are tested with the digits."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from metaopt.tasks import Classification, Split, Splits, Task


def splits(rows: int = 5) -> Splits:
    train = Split(torch.arange(2.0 * rows).reshape(rows, 2), torch.arange(rows) % 3)
    return Splits(train, train, train)


def network() -> nn.Module:
    return nn.Linear(2, 3)


def test_sequential_batches_take_every_row_in_turn() -> None:
    task = Classification(splits(), network, batch_size=3, order="sequential")
    assert isinstance(task, Task)
    assert [task.batch(step, None).images[:, 0].tolist() for step in range(3)] == [[0, 2, 4], [6, 8, 0], [2, 4, 6]]
    assert task.batch(1, None).labels.tolist() == [0, 1, 0]


def test_a_sequential_batch_may_be_larger_than_the_data() -> None:
    task = Classification(splits(), network, batch_size=7, order="sequential")
    assert task.batch(0, None).images[:, 0].tolist() == [0, 2, 4, 6, 8, 0, 2]


def test_sequential_batches_take_no_random_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    Classification(splits(), network, order="sequential").batch(0, generator)
    assert torch.equal(generator.get_state(), before)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be 'random' or 'sequential', got order='shuffled'"):
        Classification(splits(), network, order="shuffled")  # type: ignore[arg-type]


def test_a_weight_under_two_names_is_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(2, 2), nn.Linear(2, 2)
            self.out.weight = self.into.weight

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.out(self.into(x)))

    task, x = Classification(splits(), Tied), torch.ones(1, 2)
    params = {name: torch.full_like(p, 2.0) for name, p in task.init(None).items()}
    assert set(params) == {"into.weight", "into.bias", "out.bias"}
    torch.testing.assert_close(task.logits(params, x), torch.full((1, 2), 26.0))
