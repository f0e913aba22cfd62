"""A run that was stopped, killed or extended ends where the uninterrupted one ends, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaopt import Hyperparameters, Schedule, meta_train
from metaopt.functional import radam
from metaopt.metagrad import ES, PES, Forward, Online, TruncatedES, Unrolled
from metaopt.tasks import NoisyQuadratic, RandomQuadratics, Replicas, TaskBatch
from metaopt.tracking import JSONL
from metaopt.train import CheckpointError, MetaTrainResult, resume
from metaopt.train.checkpoint import Checkpoints

OPT = radam(lr=0.05)


class Careless(NoisyQuadratic):
    """Draws from every generator there is."""

    def batch(self, step: int, generator: Any) -> Any:
        noise = np.random.rand() + random.random() + torch.rand(()).item()  # noqa: NPY002
        return super().batch(step, generator) * noise


ESTIMATORS: dict[str, Callable[[], Any]] = {
    "unrolled": lambda: Unrolled(6),
    "windows": lambda: Unrolled(6, "mean", truncation=2, carry=True),
    "forward": lambda: Forward(6),
    "es": lambda: ES(6, std=0.1, pairs=2),
    "pes": lambda: PES(6, 2, std=0.1, pairs=2, stagger=False),
    "truncated es": lambda: TruncatedES(6, 2, std=0.1, pairs=2),
    "online": lambda: Online(6),
}


@pytest.fixture(autouse=True)
def checkpoint_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_PATIENCE", 0)


class Interrupted(Exception):
    pass


class Interrupts:
    """A tracker that ends the run in the middle of a meta-step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def log(self, metrics: Any, step: int) -> None:
        if step == self.at:
            raise Interrupted


def train(
    folder: Path | None,
    *,
    steps: int = 8,
    name: str = "unrolled",
    task: Any = None,
    tracker: Any = None,
    generator: torch.Generator | None = None,
) -> tuple[Hyperparameters, MetaTrainResult]:
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(1)
    learn = {"lr": 0.05, "betas": (0.9, 0.99)} if name != "unrolled" else {"lr": Schedule(6, 0.05), "eps": 1e-4}
    hyper = Hyperparameters(OPT, learn)
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, 20)
    result = meta_train(
        task or Careless(dimension=3),
        OPT,
        hyper,
        ESTIMATORS[name](),
        meta_optimizer,
        steps,
        folder,
        tracker,
        generator,
        scheduler=scheduler,
        progress=False,
    )
    return hyper, result


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def timeless(result: MetaTrainResult) -> list[Any]:
    return [{**record, "seconds": 0, "memory_mib": 0} for record in result.history]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("at", [0, 3, 4])
def test_every_estimator_goes_on_bit_for_bit(name: str, at: int, tmp_path: Path) -> None:
    whole, expected = train(None, name=name)
    with pytest.raises(Interrupted):
        train(tmp_path, name=name, tracker=Interrupts(at))
    torch.rand(17)
    resumed, result = train(tmp_path, name=name)
    assert same(resumed, whole)
    assert result.losses == expected.losses
    assert timeless(result) == timeless(expected)
    assert result.best is not None
    assert expected.best is not None
    assert result.best.step == expected.best.step
    assert all(torch.equal(result.best.hyper[key], value) for key, value in expected.best.hyper.items())


@pytest.mark.parametrize("make", [lambda: Replicas(NoisyQuadratic(), 2), lambda: TaskBatch(RandomQuadratics(3), 2)])
@pytest.mark.parametrize("name", ["windows", "pes"])
def test_a_generator_of_the_users_and_several_tasks_go_on(make: Any, name: str, tmp_path: Path) -> None:
    whole, _ = train(None, name=name, task=make(), generator=torch.Generator().manual_seed(4))
    with pytest.raises(Interrupted):
        train(tmp_path, name=name, task=make(), generator=torch.Generator().manual_seed(4), tracker=Interrupts(4))
    resumed, _ = train(tmp_path, name=name, task=make(), generator=torch.Generator().manual_seed(5))
    assert same(resumed, whole)


def test_a_finished_run_returns_its_result_at_once(tmp_path: Path) -> None:
    first, result = train(tmp_path)
    again, found = train(tmp_path, task=object(), tracker=Interrupts(0))  # neither is used
    assert same(again, first)
    assert found.losses == result.losses
    assert found.history == result.history


def test_a_finished_run_is_extended(tmp_path: Path) -> None:
    train(tmp_path, steps=5)
    longer, result = train(tmp_path, steps=8)
    whole, expected = train(None, steps=8)
    assert same(longer, whole)
    assert result.losses == expected.losses


def test_fewer_steps_than_are_behind_are_refused(tmp_path: Path) -> None:
    train(tmp_path, steps=5)
    with pytest.raises(CheckpointError, match="has 5 meta-steps behind it, more than steps=3"):
        train(tmp_path, steps=3)


def test_another_run_is_refused_by_name_and_nothing_has_changed(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a run with another hyper: .*betas"):
        train(tmp_path, name="windows")
    hyper = Hyperparameters(OPT, {"lr": Schedule(6, 0.05), "eps": 1e-4})
    before = [p.clone() for p in hyper.parameters()]
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"another estimator: Unrolled\(steps=6.*not Unrolled\(steps=7"):
        meta_train(NoisyQuadratic(), OPT, hyper, Unrolled(7), meta_optimizer, 8, tmp_path, progress=False)
    sgd = torch.optim.SGD(hyper.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="another meta_optimizer: Adam, not SGD"):
        meta_train(NoisyQuadratic(), OPT, hyper, Unrolled(6), sgd, 8, tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, hyper.parameters(), strict=True))


def test_a_meta_optimizer_with_other_groups_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    train(tmp_path)
    hyper = Hyperparameters(OPT, {"lr": Schedule(6, 0.05), "eps": 1e-4})
    before = [p.detach().clone() for p in hyper.parameters()]
    meta_optimizer = torch.optim.Adam([{"params": [p]} for p in hyper.parameters()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, 20)
    with pytest.raises(CheckpointError, match=r"another meta_optimizer: Adam, not Adam with groups of \[1, 1\]"):
        meta_train(Careless(), OPT, hyper, Unrolled(6), meta_optimizer, 9, tmp_path, scheduler=scheduler)
    assert all(torch.equal(p, q) for p, q in zip(hyper.parameters(), before, strict=True))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"a": 1})
    with pytest.raises(CheckpointError, match="holds something else than a meta-training run"):
        train(tmp_path)


@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Rprop, torch.optim.ASGD])
def test_meta_optimizers_with_states_of_many_kinds_go_on(make: Any, tmp_path: Path) -> None:
    def run(folder: Path | None, tracker: Any = None) -> list[Any]:
        hyper = Hyperparameters(OPT, {"lr": 0.05, "betas": (0.9, 0.99)})
        meta_optimizer = make(hyper.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        task, estimator = NoisyQuadratic(), Unrolled(6)
        meta_train(task, OPT, hyper, estimator, meta_optimizer, 13, folder, tracker, generator, progress=False)
        return [p.item() for p in hyper.parameters()]

    with pytest.raises(Interrupted):
        run(tmp_path, Interrupts(7))
    assert run(tmp_path) == run(None)


def test_the_record_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    class Dies(JSONL):
        def log(self, metrics: Any, step: int) -> None:
            super().log(metrics, step)
            if step == 5:
                raise Interrupted

    import json

    record = tmp_path / "record.jsonl"
    with pytest.raises(Interrupted):
        train(tmp_path / "checkpoint", tracker=Dies(record))
    train(tmp_path / "checkpoint", tracker=JSONL(record))
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["step"] for row in rows if "meta_loss" in row] == list(range(8))


def test_a_disk_that_fills_up_in_mid_run_is_a_warning_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaopt.train import checkpoint

    written = []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        hyper, _ = train(tmp_path)
    first, last = (str(warning.message) for warning in caught)  # and not one for every meta-step
    assert first.endswith("cannot be written: No space left on device; the run goes on, and tries again")
    assert last.endswith("step-000000008.checkpoint cannot be written: No space left on device")
    whole, _ = train(None)
    assert same(hyper, whole)
    assert len(written) == 9


def test_a_disk_that_is_full_at_the_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaopt.train import checkpoint

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        train(tmp_path)


SCRIPT = """
import sys, torch, metaopt
from metaopt.metagrad import PES
from metaopt.tasks import NoisyQuadratic
torch.set_num_threads(1)
opt = metaopt.functional.radam()
hyper = metaopt.Hyperparameters(opt, {"lr": 0.05, "betas": (0.9, 0.99)})
meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.01)
metaopt.meta_train(
    NoisyQuadratic(), opt, hyper, PES(20, 5, std=0.1, pairs=4), meta_optimizer, int(sys.argv[2]), sys.argv[1],
    metaopt.tracking.JSONL(sys.argv[1] + ".jsonl"), torch.Generator().manual_seed(0), progress=False,
)
print("finished", [p.item() for p in hyper.parameters()])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_meta_step_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    record = Path(f"{folder}.jsonl")
    while not record.exists() or record.read_text().count("\n") < 20:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert out == ""
    assert f"{number.name}: stopping after this meta-step" in err
    assert "of 100000; start it again to go on" in err
    assert "Traceback" not in err
    done = int(err.split("after meta-step ")[1].split(" of")[0])
    assert [path.name for path in folder.glob(f"*{done:09d}*")] == [f"step-{done:09d}.checkpoint"]
    import json

    steps = [json.loads(line)["step"] for line in record.read_text().splitlines()]
    assert max(steps) == done - 1


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    code = (
        "import signal, os, time\nfrom metaopt.train.interruption import Interruption\n"
        "with Interruption():\n    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(20)\nprint('not reached')"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert time.perf_counter() - started < 15


def test_the_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_two_runs_of_one_folder_are_refused(tmp_path: Path) -> None:
    class Second:
        def log(self, metrics: Any, step: int) -> None:
            with pytest.raises(CheckpointError, match="is in use by another run"):
                train(tmp_path)

    train(tmp_path, steps=2, tracker=Second())


def forked(folder: Path, steps: int) -> int:
    """The run in a process of its own, which begins with everything loaded."""
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train(folder, steps=steps, name="pes", tracker=JSONL(folder.with_suffix(".jsonl")))
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_random_moments_it_ends_at_the_same_hyperparameters(tmp_path: Path, long: bool) -> None:
    wanted, steps = (200, 150) if long else (8, 40)
    whole, expected = train(None, steps=steps, name="pes")
    moments = random.Random(5)
    kills = runs = 0
    while kills < wanted:
        folder = tmp_path / f"run {runs}"
        runs += 1
        while True:
            process = forked(folder, steps)
            time.sleep(moments.uniform(0.0, 0.3))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if not os.WIFSIGNALED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                break
            kills += 1
        found, result = train(folder, steps=steps, name="pes")
        assert same(found, whole)
        assert result.losses == expected.losses
        lines = folder.with_suffix(".jsonl").read_text().splitlines()
        rows = [line for line in lines if '"meta_loss"' in line]
        assert len(rows) == steps
    print(f"{kills} kills in {runs} runs")
