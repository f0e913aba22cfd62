"""Calls that go around the compiler: the function's results, for each form of arguments from its third call on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.compilation import Trusted, compiled, inductor
from metaopt.compilation.trusted import observed
from tests.metagrad.reference import seeded


@pytest.fixture(autouse=True, params=["traced", pytest.param("generated", marks=pytest.mark.long)])
def _fresh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With and without code generation, which takes seconds."""
    if request.param == "traced":
        trace = torch._dynamo.lookup_backend("aot_eager")
        monkeypatch.setattr(inductor, "_recomputing", lambda graph, inputs: observed(trace(graph, inputs)))
    yield
    inductor._REMEMBERED.clear()
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
    assert counted.calls == 2


def test_each_form_is_seen_through_twice() -> None:
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
    assert counted.calls == 2 * len(forms)


def test_gradients_flow_where_they_are_recorded() -> None:
    call, counted = trusted(lambda x, y: (x * y).sin())
    for _ in range(4):
        x, y = (tensor.requires_grad_() for tensor in draw((4,), (4,)))
        (slope,) = torch.autograd.grad(call(x, y).sum(), x)
        torch.testing.assert_close(slope, (x * y).cos() * y)
        with torch.no_grad():
            assert not call(x, y).requires_grad
    assert counted.calls == 4


def test_a_constant_among_the_arguments_is_part_of_their_form() -> None:
    call, counted = trusted(lambda x, kind: 10 * x if kind is True else 100 * x if isinstance(kind, float) else x)
    (x,) = draw((3,))
    for _ in range(3):
        for kind, factor in ((1, 1), (True, 10), (1.0, 100)):
            torch.testing.assert_close(call(x, kind), factor * x, rtol=0, atol=0)
    assert counted.calls == 6


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
    for _ in range(4):
        want = want + y
        torch.testing.assert_close(call(x, y), want.sum())
        torch.testing.assert_close(x, want)
    assert counted.calls == 2


def test_what_is_read_besides_the_arguments_and_changes_is_read_every_time() -> None:
    class Holder:
        factor = torch.ones(3, dtype=torch.float64)

    holder = Holder()
    call, counted = trusted(lambda x: x * holder.factor)
    (x,) = draw((3,))
    for step in range(1, 5):
        holder.factor = torch.full((3,), float(step), dtype=torch.float64)
        torch.testing.assert_close(call(x), step * x, rtol=0, atol=0)
    assert counted.calls == 4


def test_an_argument_that_cannot_be_taken_apart_is_left_to_the_compiler() -> None:
    class Batch:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    call, counted = trusted(lambda batch: 2 * batch.x)
    for x in draw((3,), (3,), (3,), (3,)):
        torch.testing.assert_close(call(Batch(x)), 2 * x, rtol=0, atol=0)
    assert counted.calls == 4
    assert not call._seen
    assert not call._forms


def test_threads_do_not_see_each_others_calls() -> None:
    call, counted = trusted(lambda x: 2 * x)
    inside, seen = threading.Event(), threading.Event()
    (x,) = draw((3,))
    call(x)

    def waiting(given: Tensor) -> Tensor:
        inside.set()
        seen.wait(10)
        return counted(given)

    other = Trusted(waiting)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other, x)
        inside.wait(10)
        torch.testing.assert_close(call(x), 2 * x)
        seen.set()
        torch.testing.assert_close(future.result(), 2 * x)
    torch.testing.assert_close(call(x), 2 * x)
    assert counted.calls == 3


def test_without_a_compiler_the_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what runs in its place is not taken for the whole of it."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    call, counted = trusted(lambda x: 2 * x)
    (x,) = draw((3,))
    for _ in range(3):
        torch.testing.assert_close(call(x), 2 * x, rtol=0, atol=0)
    assert counted.calls == 3
