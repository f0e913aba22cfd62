"""Many processes that share a meta-training run: one of them alone would learn the same."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metaopt import Hyperparameters
from metaopt.metagrad import Ranks, Unrolled
from metaopt.tasks import Replicas
from metaopt.train import CheckpointError, Checkpoints, NonFiniteError, Stopped, resume
from tests.metagrad.reference import Regression, seeded
from tests.train.ranks import OPT, TASKS, implicit_gradient, together, train

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="processes over gloo")
COUNTS = (2, 4)
# An estimator with pairs can share those of a single task.
CASES = [
    (estimator, task)
    for estimator, tasks in {
        "whole": ("replicas", "tasks", "family"),
        "segments": ("family",),
        "windows": ("replicas",),
        "carried": ("replicas", "family"),
        "forward": ("tasks",),
        "online": ("family",),
        "es": ("replicas", "family", "one"),
        "pes": ("replicas", "one", "family"),
        "truncated es": ("one", "family"),
    }.items()
    for task in tasks
]
# Four processes take four times as long here: one task for each estimator.
OF = {2: CASES, 4: list(dict(CASES).items())}
STATEFUL = [case for case in CASES if case[0] in ("carried", "online", "pes", "truncated es") and case[1] != "one"]
STEPS = 4


class Rows:
    """A tracker."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log(self, metrics: Any, step: int) -> None:
        self.rows.append(step)


def raised(kind: type[BaseException], do: Any) -> str:
    try:
        do()
    except kind as error:
        return str(error)
    return f"no {kind.__name__}"


def gradient(estimator: Any, task: Any) -> tuple[float, list[list[float]]]:
    hyper = Hyperparameters(OPT, {"lr": 0.05, "betas": (0.9, 0.99)})
    for p in hyper.parameters():
        p.grad = torch.ones_like(p)  # gradients are added to what is there
    loss = Ranks().backward(estimator, task, OPT, hyper, seeded(2)).item()
    return loss, [p.grad.tolist() for p in hyper.parameters() if p.grad is not None]


class Spoilt(Regression):
    """Now and then a run trains on a NaN."""

    def batch(self, step: int, generator: Any) -> Any:
        x, y = super().batch(step, generator)
        return x, torch.where(torch.rand((), generator=generator) < 0.02, math.nan, y)


TASKS["spoilt"] = lambda: Replicas(Spoilt(), 5)


class Stubborn(Regression):
    """Draws as many numbers as its process has a number."""

    def init(self, generator: Any) -> Any:
        torch.rand(Ranks().rank, generator=generator)
        return super().init(generator)


def trained(cases: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in cases:
        tracker = Rows()
        learned, result = train(*case, steps=STEPS, tracker=tracker)
        found[str(case)] = (learned, result.losses, [record["grad_norm"] for record in result.history])
        found["tracked"] = [*found.get("tracked", []), *tracker.rows]
    return found


def all_together(folder: Path) -> dict[str, Any]:
    """What a process sees."""
    resume._PATIENCE = 0
    ranks = Ranks()
    found = trained(OF[ranks.count])
    found["implicit"] = implicit_gradient()
    found["gradient"] = gradient(Unrolled(6), Replicas(Regression(), 5))
    for case in (case for case in OF[ranks.count] if case in STATEFUL):
        train(*case, steps=3, folder=folder / str(case))
    train("whole", "replicas", progress=True, steps=2)

    few = Replicas(Regression(), ranks.count - 1)
    found["single"] = raised(TypeError, lambda: gradient(Unrolled(6), Regression()))
    found["few"] = raised(ValueError, lambda: gradient(Unrolled(6), few))
    if ranks.count == 2:
        found.update(two_together(folder, ranks))
    return found


def two_together(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What needs no more than two processes to be seen."""
    found: dict[str, Any] = {}

    def apart() -> None:
        hyper = Hyperparameters(OPT, {"lr": 0.05 + 0.01 * ranks.rank})
        ranks.backward(Unrolled(3), Replicas(Regression(), 2), OPT, hyper, seeded(2))

    found["apart"] = raised(RuntimeError, apart)
    found["stubborn"] = raised(RuntimeError, lambda: gradient(Unrolled(3), Replicas(Stubborn(), 2)))

    def signalled(step: int) -> None:
        if (ranks.rank, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    found["skipped"] = train("whole", "spoilt", steps=8, on_nonfinite="skip")
    found["not finite"] = raised(NonFiniteError, lambda: train("whole", "spoilt", steps=8))
    with Checkpoints(folder / "taken") if ranks.first else nullcontext():
        found["taken"] = raised(CheckpointError, lambda: train("whole", "family", folder=folder / "taken"))

    found["stopped"] = raised(
        Stopped, lambda: train("carried", "family", folder=folder / "stopped", hook=signalled, steps=50)
    )
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return trained(CASES)


@pytest.fixture(scope="module")
def shared(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each process found, by their number; the last items are what they printed, and their folder."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # pytest's own processes find it once for all
    folder, kept = base / "ranks", base / "ranks.pickle"
    with (base / "ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            folder.mkdir()
            found = {}
            for count in COUNTS:
                own = folder / str(count)
                found[count] = (*together(count, own, lambda own=own: all_together(own)), own)  # type: ignore[misc]
            kept.write_bytes(pickle.dumps(found))
    return pickle.loads(kept.read_bytes())


def close(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-12, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize(("case", "count"), [(case, count) for count in COUNTS for case in OF[count]], ids=str)
def test_many_processes_learn_what_one_learns(case: Any, count: int, shared: Any, alone: Any) -> None:
    learned, losses, norms = alone[str(case)]
    for rank in range(count):
        found = shared[count][rank][str(case)]
        assert close(found[0], learned)
        assert close(found[1], losses)
        assert close(found[2], norms)
        assert all(torch.equal(a, b) for a, b in zip(found[0], shared[count][0][str(case)][0], strict=True))


@pytest.mark.parametrize("count", COUNTS)
def test_implicit_gradients_agree_to_the_tolerance_of_their_solver(count: int, shared: Any) -> None:
    expected = implicit_gradient()
    for rank in range(count):
        assert torch.allclose(torch.stack(shared[count][rank]["implicit"]), torch.stack(expected), rtol=1e-8)


@pytest.mark.parametrize("count", COUNTS)
def test_a_shared_gradient_is_added_to_what_is_there(count: int, shared: Any) -> None:
    loss, grads = gradient(Unrolled(6), Replicas(Regression(), 5))
    for rank in range(count):
        assert close([shared[count][rank]["gradient"][0]], [loss])
        assert close(shared[count][rank]["gradient"][1], grads)


@pytest.mark.parametrize("count", COUNTS)
def test_only_the_first_tracks_and_prints(count: int, shared: Any) -> None:
    *found, printed, _ = shared[count]
    assert found[0]["tracked"] == [step for _ in OF[count] for step in range(STEPS)]
    assert all(found[rank]["tracked"] == [] for rank in range(1, count))
    assert "meta-step 2/2" in printed[0]
    assert all(printed[rank] == "" for rank in range(1, count))


@pytest.mark.parametrize("count", COUNTS)
def test_another_number_of_processes_goes_on_from_a_checkpoint(count: int, shared: Any, alone: Any) -> None:
    for case in (case for case in OF[count] if case in STATEFUL):
        learned, result = train(*case, steps=STEPS, folder=shared[count][-1] / str(case))
        assert close(learned, alone[str(case)][0])
        assert close(result.losses, alone[str(case)][1])


@pytest.mark.parametrize("count", COUNTS)
def test_what_cannot_be_shared_is_refused_with_both_numbers(count: int, shared: Any) -> None:
    for rank in range(count):
        found = shared[count][rank]
        assert re.match(f"{count} processes share the runs of a task, and task=Regression is a single one: wrap it in "
                        "metaopt.tasks.Replicas", found["single"])  # fmt: skip
        assert found["few"] == (
            f"every process needs a run or a pair of its own, got count={count - 1} runs for {count} processes"
        )


def test_processes_that_drift_apart_are_told(shared: Any) -> None:
    for rank in range(2):
        assert "hyper's parameters differ between the processes" in shared[2][rank]["apart"]
        assert "the random generators differ between the processes" in shared[2][rank]["stubborn"]


def test_a_gradient_that_is_not_finite_is_skipped_or_raised_by_all_alike(shared: Any) -> None:
    learned, result = train("whole", "spoilt", steps=8, on_nonfinite="skip")
    assert 0 < result.skipped < 8
    message = raised(NonFiniteError, lambda: train("whole", "spoilt", steps=8))
    assert "of run " in message
    for rank in range(2):
        found = shared[2][rank]
        assert close(found["skipped"][0], learned)
        assert [record.get("skipped") for record in found["skipped"][1].history] == [
            record.get("skipped") for record in result.history
        ]
        assert found["not finite"] == message


def test_a_folder_in_use_is_an_error_for_all(shared: Any) -> None:
    for rank in range(2):
        assert "is in use by another run" in shared[2][rank]["taken"]


def test_a_signal_to_one_stops_all_after_the_same_step(shared: Any) -> None:
    folder = shared[2][-1] / "stopped"
    assert [shared[2][rank]["stopped"] for rank in range(2)] == ["143", "143"]
    assert sorted(path.name for path in folder.glob("*.checkpoint"))[-1] == "step-000000003.checkpoint"


def test_an_experiment_that_has_nothing_to_share_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.mnist1d_lr import STUDY

    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["mnist1d_lr"])
    with pytest.raises(SystemExit, match="mnist1d_lr has nothing that 2 processes could share: start it without"):
        STUDY.command_line()


def torchrun(folder: Path, steps: int, restarts: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(restarts), "-m", "tests.train.ranks", str(folder), str(steps)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(folder: Path) -> list[int]:
    record = Path(f"{folder}.jsonl")
    lines = record.read_text().splitlines(keepends=True) if record.exists() else []
    return [json.loads(line)["step"] for line in lines if '"meta_loss"' in line and line.endswith("\n")]


def test_after_a_kill_torchrun_restarts_and_the_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """Killed once; restarts are to spare, for gloo itself aborts now and then when a process ends."""
    process = torchrun(tmp_path / "run", 12, restarts=3)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert re.fullmatch("the first of 2 has finished, restart [123]", out.splitlines()[-1])
    assert rows(tmp_path / "run") == list(range(12))
    learned, result = train("pes", "family", steps=12, folder=tmp_path / "run")  # there is nothing left to do
    expected, whole = train("pes", "family", steps=12)
    assert close(learned, expected)
    assert close(result.losses, whole.losses)


def test_torchrun_told_to_stop_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    process = torchrun(tmp_path / "run", 100_000, restarts=0)
    try:
        while len(rows(tmp_path / "run")) < 5 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "finished" not in out
    stopped = re.findall(r"stopped after meta-step (\d+) of 100000; start it again to go on", err)
    assert len(stopped) == 1
    done = int(stopped[0])
    learned, result = train("pes", "family", steps=done + 2, folder=tmp_path / "run")
    expected, whole = train("pes", "family", steps=done + 2)
    assert len(result.losses) == done + 2
    assert close(learned, expected)
    assert close(result.losses, whole.losses)
