"""What an unroll holds at most, in bytes of live tensors, by its horizon; and that nothing is left afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt import Hyperparameters, memory, suggest
from metaopt.functional import REGISTRY, radam, sgd
from metaopt.metagrad import Estimator, Forward, Unrolled
from tests.metagrad.reference import Regression, learn_all, seeded

SGD = sgd()


class Live(TorchDispatchMode):
    """Counts the storages that operations make while they live, those that only autograd holds among them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)


class Bowl:
    """The cheapest task that there is, for horizons that are long."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def init(self, generator: Generator | None) -> Tensor:
        return torch.ones(self.dimension)

    def batch(self, step: int, generator: Generator | None) -> tuple[()]:
        return ()

    def loss(self, params: Tensor, batch: Any, hyper: Mapping[str, Any]) -> Tensor:
        return params.dot(params)

    def meta_loss(self, params: Tensor, hyper: Mapping[str, Any]) -> Tensor:
        return params.dot(params)


class Network:
    """64-128-128-10 in batches of 128 random images."""

    shapes: ClassVar[dict[str, tuple[int, ...]]] = {
        "0.weight": (128, 64), "0.bias": (128,), "1.weight": (128, 128), "1.bias": (128,), "2.weight": (10, 128),
        "2.bias": (10,),
    }  # fmt: skip

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}

    def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return torch.randn(128, 64, generator=generator), torch.randint(10, (128,), generator=generator)

    def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
        x, y = batch
        for layer in "01":
            x = nn.functional.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"]).tanh()
        return nn.functional.cross_entropy(nn.functional.linear(x, params["2.weight"], params["2.bias"]), y)

    def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
        return self.loss(params, self.batch(0, seeded()), hyper)


def peak(estimator: Estimator, task: Any, opt: Any = SGD) -> int:
    hyper = Hyperparameters(opt, {"lr": 0.1})
    return memory.peak(lambda: estimator.backward(task, opt, hyper, seeded()))


def test_the_count_sees_what_autograd_alone_holds() -> None:
    x = torch.ones(1000, requires_grad=True)
    with Live() as live:
        y = x
        for _ in range(10):
            y = y.sin() * 1.5
        assert live.now >= 10 * 4000
        del y
        assert live.now == 0


def test_the_peak_of_a_call_is_that_of_the_storages_alive() -> None:
    def call() -> None:
        Unrolled(20).backward(Bowl(10_000), SGD, Hyperparameters(SGD, {"lr": 0.1}), seeded())

    with Live() as live:
        call()
    assert memory.peak(call) == pytest.approx(live.peak, rel=0.1)


def test_a_recorded_unroll_grows_with_the_horizon() -> None:
    assert peak(Unrolled(400), Bowl(1000)) / peak(Unrolled(100), Bowl(1000)) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("root", [5, pytest.param(10, marks=pytest.mark.long)])
def test_segments_of_a_root_grow_with_the_root_of_the_horizon(root: int) -> None:
    """From 100 to 10,000 steps ten times at most, and not 100."""
    short, long = (peak(Unrolled(steps, segments="sqrt"), Bowl(4000)) for steps in (100, 100 * root**2))
    assert root / 2 < long / short < root


def test_segments_of_ten_thousand_steps_of_a_network_take_less_than_300_megabytes() -> None:
    """By the line through 100 and 225 steps over the root of the horizon, on which 400 are."""
    at = {steps: peak(Unrolled(steps, segments="sqrt"), Network(), radam()) for steps in (100, 225, 400)}
    slope = (at[225] - at[100]) / 5
    assert at[400] == pytest.approx(at[225] + 5 * slope, rel=0.02)
    assert at[400] + 80 * slope < 300e6


@pytest.mark.long
def test_compiled_forward_mode_takes_less_than_two_megabytes_for_a_small_network() -> None:
    """Parameters, state and their tangents are .6 of them: the step writes over those before it."""
    estimator, task, opt = Forward(5, compile=True), Network(), radam()
    peak(estimator, task, opt)  # compiles
    assert peak(estimator, task, opt) < 2e6


def test_what_a_suggestion_says_of_segments_is_what_they_take() -> None:
    opt, estimator = radam(), Unrolled(100, segments="sqrt")
    modes = suggest(Network(), opt, Hyperparameters(opt, {"lr": 0.1}), 100, memory=1e12, compile=False).modes
    (said,) = (mode.bytes for mode in modes if repr(mode.estimator) == repr(estimator))
    assert said == pytest.approx(peak(estimator, Network(), opt), rel=0.15)


@pytest.mark.parametrize(
    ("name", "steps", "numbers"),
    [("sgd", 1000, 7), ("radam", 500, 28), pytest.param("sgd", 10_000, 7, marks=pytest.mark.long)],
)
def test_forward_mode_grows_by_a_few_numbers_a_step(name: str, steps: int, numbers: int) -> None:
    """What the optimizer computes for all steps before the first, in doubles: its coefficients, their derivatives, and
    what lies between them and the learning rate. One vector of parameters kept at each step would be 500 of them.
    """
    short, long = (peak(Forward(count), Bowl(1000), REGISTRY[name]()) for count in (100, steps))
    assert long - short <= numbers * 8 * (steps - 100)


@pytest.mark.parametrize(
    "estimator", [Unrolled(20, "mean"), Unrolled(20, "mean", 7, segments=3), Unrolled(20, segments="sqrt"), Forward(20)]
)
@pytest.mark.parametrize("name", ["radam", "rprop"])
def test_nothing_is_left_but_the_gradients(estimator: Estimator, name: str) -> None:
    task = Regression()
    opt, hyper = learn_all(name)
    estimator.backward(task, opt, hyper, seeded())  # what is made once and for all
    gc.collect()
    with Live() as live:
        loss = estimator.backward(task, opt, hyper, seeded(1))
        del loss
        hyper.zero_grad()
        gc.collect()
        assert live.peak > 0
        assert live.now <= task.x.nbytes + task.y.nbytes  # operations return views of the task's own
