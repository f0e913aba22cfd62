"""What an unroll holds at most, in bytes of live tensors, by its horizon; and that nothing is left afterwards."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt import Hyperparameters
from metaopt.functional import sgd
from metaopt.metagrad import Estimator, Forward, Unrolled
from metaopt.tasks import NoisyQuadratic
from tests.metagrad.reference import Regression, learn_all, seeded


class Live(TorchDispatchMode):
    """Counts the storages that operations make while they live, those that only autograd holds among them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
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


def peak(estimator: Estimator, dimension: int) -> int:
    task, opt = NoisyQuadratic(dimension), sgd()
    hyper = Hyperparameters(opt, {"lr": 0.1})
    with Live() as live:
        estimator.backward(task, opt, hyper, seeded())
    return live.peak


def test_the_count_sees_what_autograd_alone_holds() -> None:
    x = torch.ones(1000, requires_grad=True)
    with Live() as live:
        y = x
        for _ in range(10):
            y = y.sin() * 1.5
        assert live.now >= 10 * 4000
        del y
        assert live.now == 0


def test_a_recorded_unroll_grows_with_the_horizon() -> None:
    assert peak(Unrolled(400), 1000) / peak(Unrolled(100), 1000) == pytest.approx(4.0, rel=0.1)


def test_segments_of_a_root_grow_with_the_root_of_the_horizon() -> None:
    """From 100 to 2,500 steps five times, and not 25."""
    assert peak(Unrolled(2500, segments="sqrt"), 4000) / peak(Unrolled(100, segments="sqrt"), 4000) < 6.0


def test_forward_mode_does_not_grow_with_the_horizon() -> None:
    """But for the learning rate of each step, 8 bytes and as much again for its derivative."""
    assert peak(Forward(1000), 20_000) < 1.05 * peak(Forward(100), 20_000)


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
