"""What a tracked run tells: figures, curves, schedules, signal-to-noise; and that looking changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt import Hyperparameters, PerParameter, Schedule, meta_train
from metaopt.functional import radam, sgd
from metaopt.metagrad import PES, Unrolled
from metaopt.tasks import Digits, NoisyQuadratic, RandomQuadratics, Replicas, TaskBatch
from metaopt.tracking import JSONL
from metaopt.train.report import report, schedules
from metaopt.train.signal import SignalToNoise
from metaopt.unroll import InnerStep

OPT = radam(lr=0.05)


def tracked(path: Path, task: Any, learn: Any, steps: int = 12, estimator: Any = None, tracked: bool = True) -> Any:
    hyper = Hyperparameters(OPT, learn)
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    result = meta_train(
        task,
        OPT,
        hyper,
        estimator or Unrolled(10),
        meta_optimizer,
        steps,
        tracker=JSONL(path) if tracked else None,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    return hyper, result, [json.loads(line) for line in path.read_text().splitlines()] if tracked else []


def test_a_tracked_run_learns_what_an_untracked_one_learns(tmp_path: Path) -> None:
    for estimator in (Unrolled(10), PES(10, 5, std=0.1, pairs=2)):
        one, _, _ = tracked(tmp_path / "a", NoisyQuadratic(), ("lr", "betas"), estimator=estimator)
        estimator.reset()
        other, _, _ = tracked(tmp_path / "b", NoisyQuadratic(), ("lr", "betas"), estimator=estimator, tracked=False)
        assert one.numbers() == other.numbers()


def test_everything_is_in_the_record(tmp_path: Path) -> None:
    learn = {"lr": PerParameter(["1.weight", "1.bias"], Schedule(10, 0.05)), "eps": 1e-4}
    task = Digits(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), batch_size=16)
    hyper, result, lines = tracked(tmp_path / "record.jsonl", Replicas(task, 2), learn)
    rows = [line for line in lines if "kind" not in line]
    assert [row["step"] for row in rows] == list(range(12))
    names = {"lr", "eps"}
    for row in rows:
        assert set(row["grad_norms"]) == names
        assert row["grad_norm"] == pytest.approx(math.hypot(*row["grad_norms"].values()), rel=1e-6)
        assert set(row["grad_snr"]) == (names if row["step"] else set())
        assert row["memory_mib"]["process"] > 10
        assert row["seconds"] > 0
    looked = [row for row in rows if "test" in row]
    assert [row["step"] for row in looked] == list(range(12))  # every step of so short a run
    assert all(set(row["test"]) == {"loss", "accuracy"} for row in looked)
    assert all(row["train"]["loss"] > 0 and row["validation"]["loss"] > 0 for row in looked)
    assert looked[-1]["test"]["accuracy"] > looked[0]["test"]["accuracy"] > 0.1
    curves = {line["name"] for line in lines if line.get("kind") == "curves"}
    assert curves == {"train", "validation", "schedule"}
    schedule = [line for line in lines if line.get("name") == "schedule"][-1]
    assert set(schedule["columns"]) == {"inner_step", "lr/1.weight", "lr/1.bias"}
    (artifact,) = [line for line in lines if line.get("kind") == "artifact"]
    assert artifact["name"] == "hyperparameters"
    assert artifact["content"] == json.loads(json.dumps(hyper.numbers()))
    assert result.history == [{k: v for k, v in row.items() if k != "step"} for row in rows]


def test_a_run_of_many_steps_is_looked_at_ten_times_and_at_its_end(tmp_path: Path) -> None:
    _, _, lines = tracked(tmp_path / "record.jsonl", NoisyQuadratic(), ("lr",), steps=100)
    looked = [line["step"] for line in lines if "validation" in line]
    assert looked == [*range(0, 100, 10), 99]


def test_a_report_is_the_training_that_these_hyperparameters_give() -> None:
    task, values = NoisyQuadratic(), {"lr": torch.tensor(0.1)}
    seen = report(task, OPT, values, 7, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    inner = InnerStep(task, OPT)
    carry = inner.init(values, generator)
    losses, meta_losses = [], [float(task.meta_loss(carry.params, values))]
    for t in range(7):
        carry, loss = inner(carry, task.batch(t, generator), values, t)
        losses.append(float(loss))
        meta_losses.append(float(task.meta_loss(carry.params, values).detach()))
    assert seen.train == losses
    assert list(seen.validation.items()) == list(enumerate(meta_losses))
    assert seen.test == {name: float(figure) for name, figure in task.test(carry.params).items()}
    assert seen.figures["validation"]["loss"] == meta_losses[-1]


def test_of_several_tasks_the_figures_are_means() -> None:
    seen = report(TaskBatch(RandomQuadratics(3), 4), OPT, {}, 5, torch.Generator().manual_seed(0))
    assert set(seen.test) == {"loss"}
    assert seen.test["loss"] == pytest.approx(seen.figures["validation"]["loss"], rel=1e-5)


def test_a_long_unroll_is_judged_at_some_points() -> None:
    seen = report(NoisyQuadratic(), sgd(lr=0.01), {}, 1000, None)
    assert len(seen.train) == 1000
    assert len(seen.validation) == 26
    assert list(seen.validation)[-1] == 1000


def test_schedules_are_found_in_pairs_and_mappings() -> None:
    numbers = {"lr": {"a": [0.1, 0.2], "b": [0.3, 0.4]}, "betas": ([0.9, 0.8], 0.99), "eps": 1e-8}
    assert dict(schedules(numbers)) == {"lr/a": [0.1, 0.2], "lr/b": [0.3, 0.4], "betas[0]": [0.9, 0.8]}


def test_signal_to_noise_is_the_ratio_of_mean_and_deviation() -> None:
    """Of a normal gradient with mean m and covariance s^2 I in n dimensions: |m| / (s sqrt(n))."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, 4.0, 0.0, 0.0])
    ratios = []
    snr = SignalToNoise(decay=0.99)
    for _ in range(2000):
        noise = torch.randn(4, generator=generator)
        ratios.append(snr.update({"w": mean + 2.0 * noise, "constant": torch.ones(2)}))
    assert sum(r["w"] for r in ratios[500:]) / 1500 == pytest.approx(5 / (2 * 2), rel=0.02)
    assert ratios[0] == {}
    assert all("constant" not in r or r["constant"] > 1e6 for r in ratios)  # no noise, but rounding
