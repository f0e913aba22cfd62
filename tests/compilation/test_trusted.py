"""Calls that go around the compiler: the function's results, for each form of arguments from its second call on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.compilation import Trusted, cache, compiled, inductor
from tests.metagrad.reference import seeded


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    cache._CACHE.clear()
    inductor._warn_once.cache_clear()
    torch._dynamo.reset()


class Counted:
    """Counts the calls that reach the compiled function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def trusted(function: Callable[..., Any]) -> tuple[Trusted, Counted]:
    counted = Counted(compiled((function,), function))
    return Trusted(counted), counted


def draw(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = seeded()
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def test_results_stand_where_the_function_puts_them() -> None:
    constant = torch.arange(3.0, dtype=torch.float64)

    def function(pair: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Any:
        x, y = pair
        return (x + constant, (y, None)), x * batch["w"], batch["w"]

    call, counted = trusted(function)
    for seed in range(4):
        x, y, w = (tensor + seed for tensor in draw((3,), (2,), (3,)))
        (a, (same, nothing)), b, also_same = call((x, y), {"w": w})
        torch.testing.assert_close(a, x + constant, rtol=0, atol=0)
        torch.testing.assert_close(b, x * w, rtol=0, atol=0)
        assert same is y
        assert also_same is w
        assert nothing is None
    assert counted.calls == 1


def test_each_form_is_seen_through_once() -> None:
    call, counted = trusted(lambda x, y: x @ y + y.sum())
    (square, row, wide, one) = draw((3, 3), (3,), (3, 5), (3, 1))
    forms: list[tuple[Tensor, Tensor]] = [
        (square, row),
        (square, wide),
        (square, one),
        (square.t(), row),
        (square.float(), row.float()),
        (square, square),  # the same tensor twice
        (square, square.clone()),
    ]
    for _ in range(3):
        for x, y in forms:
            torch.testing.assert_close(call(x, y), x @ y + y.sum())
    assert counted.calls == len(forms)


def test_gradients_flow_where_they_are_recorded() -> None:
    call, counted = trusted(lambda x, y: (x * y).sin())
    for _ in range(3):
        x, y = (tensor.requires_grad_() for tensor in draw((4,), (4,)))
        (slope,) = torch.autograd.grad(call(x, y).sum(), x)
        torch.testing.assert_close(slope, (x * y).cos() * y)
        with torch.no_grad():
            assert not call(x, y).requires_grad
    assert counted.calls == 2


def test_a_constant_among_the_arguments_is_part_of_their_form() -> None:
    call, counted = trusted(lambda x, factor: x * factor)
    (x,) = draw((3,))
    for factor in (2, 3, 2, 3):
        torch.testing.assert_close(call(x, factor), x * factor, rtol=0, atol=0)
    assert counted.calls == 2


def test_what_cannot_be_wired_is_called_as_it_is() -> None:
    def function(x: Tensor) -> Any:
        return {"double": 2 * x}

    call, counted = trusted(function)
    (x,) = draw((3,))
    for _ in range(3):
        torch.testing.assert_close(call(x)["double"], 2 * x, rtol=0, atol=0)
    assert counted.calls == 3


def test_arguments_that_are_written_to_are_written_to_every_time() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        x.copy_(total)
        return total.sum()

    call, counted = trusted(function)
    x, y = draw((3,), (3,))
    want = x.clone()
    for _ in range(3):
        want = want + y
        torch.testing.assert_close(call(x, y), want.sum())
        torch.testing.assert_close(x, want)
    assert counted.calls == 1


def test_without_a_compiler_the_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what runs in its place is not taken for the whole of it."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    call, counted = trusted(lambda x: 2 * x)
    (x,) = draw((3,))
    for _ in range(3):
        torch.testing.assert_close(call(x), 2 * x, rtol=0, atol=0)
    assert counted.calls == 3
