"""Memory, graphs and open files of a run of many meta-steps do not grow."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt import Hyperparameters, meta_train
from metaopt.functional import radam
from metaopt.memory import resident
from metaopt.metagrad import ES, PES, Forward, Online, Unrolled
from metaopt.tasks import Digits, NoisyQuadratic
from metaopt.tracking import JSONL, Several

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "unrolled": lambda: Unrolled(3),
    "windows": lambda: Unrolled(6, "mean", truncation=3, carry=True),
    "segments": lambda: Unrolled(4, segments="sqrt"),
    "forward": lambda: Forward(3),
    "es": lambda: ES(3, std=0.1, pairs=2),
    "pes": lambda: PES(6, 3, std=0.1, pairs=2),
    "online": lambda: Online(4),
}


class Watch:
    """Counts what is alive at some meta-steps."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at = at
        self.tensors: list[int] = []
        self.bytes: list[int] = []
        self.graphs: list[int] = []
        self.files: list[int] = []
        self.resident: list[int] = []

    def log(self, metrics: Any, step: int) -> None:
        if step not in self.at:
            return
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
        alive = [
            tensor for tensor in tensors if not tensor._has_symbolic_sizes_strides
        ]  # no compiler's, of other tests
        self.tensors.append(len(alive))
        self.bytes.append(sum(tensor.nbytes for tensor in alive))
        self.graphs.append(sum(tensor.grad_fn is not None for tensor in alive))
        self.files.append(len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0)
        self.resident.append(resident())


def run(folder: Path, task: Any, estimator: Any, steps: int, at: tuple[int, ...]) -> Watch:
    opt, watch = radam(lr=0.05), Watch(at)
    hyper = Hyperparameters(opt, ("lr", "betas"))
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=1e-3)
    meta_train(
        task,
        opt,
        hyper,
        estimator,
        meta_optimizer,
        steps,
        folder / "checkpoint",
        Several(JSONL(folder / "record.jsonl"), watch),
        torch.Generator().manual_seed(0),
        progress=False,
    )
    return watch


LATER = ("segments", "forward", "es")
EACH = [pytest.param(name, marks=[pytest.mark.long] * (name in LATER)) for name in ESTIMATORS]


@pytest.mark.parametrize("name", EACH)
def test_nothing_is_kept_from_step_to_step(name: str, tmp_path: Path) -> None:
    """At the end of a whole number of unrolls, so that each is at the same point of its own."""
    watch = run(tmp_path, NoisyQuadratic(), ESTIMATORS[name](), 60, (23, 35, 59))
    for counts in (watch.tensors, watch.bytes, watch.graphs, watch.files):
        assert len(set(counts)) == 1, vars(watch)


@pytest.mark.long
def test_two_thousand_meta_steps_on_digits_stay_in_their_memory(tmp_path: Path) -> None:
    at = (205, 505, 1005, 1505, 1995)
    watch = run(tmp_path, Digits(batch_size=64), Unrolled(20), 2000, at)
    for counts in (watch.tensors, watch.bytes, watch.graphs, watch.files):
        assert len(set(counts)) == 1, vars(watch)
    print({step: f"{size / 2**20:.1f} MiB" for step, size in zip(at, watch.resident, strict=True)}, watch.bytes[0])
    # The history, of 2 kB or so a step, is all that grows.
    assert watch.resident[-1] - watch.resident[0] < 24 * 2**20
