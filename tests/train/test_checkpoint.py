"""The files of a run: written whole or not at all, locked, and refused if anything is wrong with them."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.train import CheckpointError, Checkpoints
from metaopt.train.checkpoint import encode

STATE = {"lr": torch.tensor([0.1, 0.2]), "step": 3, "names": ["a", "b"], "nothing": None}


def file_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.checkpoint"


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "deep" / "down") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, STATE)
        found = checkpoints.latest()
    assert found is not None
    step, state = found
    assert step == 3
    assert torch.equal(state.pop("lr"), STATE["lr"])
    assert state == {"step": 3, "names": ["a", "b"], "nothing": None}


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(12):
            checkpoints.save(step, {"step": step})
        assert checkpoints.latest() == (11, {"step": 11})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lock",
        "step-000000010.checkpoint",
        "step-000000011.checkpoint",
    ]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    """With a right head and a right checksum, in a torch file and as a bare pickle."""
    import hashlib

    target = tmp_path / "executed"
    body = io.BytesIO()
    torch.save({"hyper": Malicious(target)}, body)
    for content in (body.getvalue(), pickle.dumps(Malicious(target), protocol=2)):
        digest = hashlib.sha256(content).hexdigest().encode()
        file_of(tmp_path, 5).write_bytes(b"metaopt checkpoint 1 %s\n" % digest + content)
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="is refused: "):
            checkpoints.latest()
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))  # it would have worked
    assert target.exists()


def test_what_is_no_plain_value_is_not_written(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="tensors and plain values alone"):
            checkpoints.save(0, {"path": Path("x")})
        assert checkpoints.latest() is None


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "torn": content[:middle],
        "torn in its head": content[:10],
        "empty": b"",
        "a bit is wrong": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "foreign": b"PK\x03\x04" + content,
        "newer": content.replace(b"checkpoint 1 ", b"checkpoint 2 ", 1),
    }


REASONS = {
    "torn": "is torn",
    "torn in its head": "is not a checkpoint of metaopt",
    "empty": "is not a checkpoint of metaopt",
    "a bit is wrong": "is torn",
    "foreign": "is not a checkpoint of metaopt",
    "newer": "has version 2: a newer metaopt wrote it",
}


@pytest.mark.parametrize("damage", REASONS)
def test_a_bad_file_is_passed_over_for_the_good_one_before_it(damage: str, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"step": step})
    last = file_of(tmp_path, 2)
    bad = damaged(last.read_bytes())[damage]
    last.write_bytes(bad)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=f"{REASONS[damage]}.*going on from step 1"):
            assert checkpoints.latest() == (1, {"step": 1})
        checkpoints.save(2, {"step": "again"})
        assert checkpoints.latest() == (2, {"step": "again"})
    assert last.with_suffix(".refused").read_bytes() == bad  # nothing is thrown away


@pytest.mark.parametrize("damage", REASONS)
def test_without_a_good_one_nothing_is_begun_anew(damage: str, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"step": 2})
        last = file_of(tmp_path, 2)
        last.write_bytes(damaged(last.read_bytes())[damage])
        with pytest.raises(CheckpointError, match=f"{REASONS[damage]}.*no good one before it") as raised:
            checkpoints.latest()
    assert "\n" not in str(raised.value)


def test_a_folder_is_one_runs_alone_and_free_after_it(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path),
        pytest.raises(CheckpointError, match="is in use by another run"),
        Checkpoints(tmp_path),
    ):
        pass
    with Checkpoints(tmp_path):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom metaopt.train import Checkpoints\n"
        "with Checkpoints(sys.argv[1]) as checkpoints:\n"
        "    checkpoints.save(1, {'a': 1})\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(CheckpointError, match="is in use"), Checkpoints(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == (1, {"a": 1})


def test_a_worker_that_was_forked_in_a_run_does_not_keep_its_folder(tmp_path: Path) -> None:
    (started, starts), (over, ends) = os.pipe(), os.pipe()
    with Checkpoints(tmp_path):
        worker = os.fork()
        if worker == 0:
            os.write(starts, b".")
            os.close(ends)
            os.read(over, 1)  # until the test is over
            os._exit(0)
        os.read(started, 1)
        with pytest.raises(CheckpointError, match="is in use"), Checkpoints(tmp_path):
            pass
    try:
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest() is None
    finally:
        os.close(ends)
        os.waitpid(worker, 0)
        for end in (started, starts, over):
            os.close(end)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        return real(Path("/dev/full") if path.suffix == ".partial" else path, *args, **kwargs)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"step": 1})
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", full)
            with pytest.raises(CheckpointError, match=r"step-000000002\.checkpoint cannot be written: No space left"):
                checkpoints.save(2, {"step": 2})
        assert checkpoints.latest() == (1, {"step": 1})
        checkpoints.save(2, {"step": 2})
        assert checkpoints.latest() == (2, {"step": 2})


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="file/a cannot be used: Not a directory"),
        Checkpoints(tmp_path / "file/a"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be used: Permission denied"), Checkpoints(tmp_path):
        pass


WRITES = """
import sys, torch
from metaopt.train import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    found = checkpoints.latest()
    step = found[0] if found else 0
    assert found is None or torch.equal(found[1]["x"], torch.full((20_000,), float(step))), "another state"
    print(step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"x": torch.full((20_000,), float(step))})
"""


def test_a_kill_in_the_middle_of_writing_leaves_a_good_one(tmp_path: Path) -> None:
    """The process does nothing else; its start, which takes seconds, is shared by forks."""
    before = 0
    for kill in range(40):
        process = os.fork()
        if process == 0:
            os.close(1)
            os.open(os.devnull, os.O_WRONLY)
            sys.argv = ["", str(tmp_path)]
            try:
                exec(WRITES, {})
            finally:
                os._exit(1)
        time.sleep(0.02 + 0.0007 * kill)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "it found another state, or an error"
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.latest()
        if found is not None:
            assert found[0] >= before
            assert torch.equal(found[1]["x"], torch.full((20_000,), float(found[0])))
            before = found[0]
    assert before > 0
    assert not list(tmp_path.glob("*.refused"))


def test_the_encoding_is_that_of_its_version() -> None:
    assert encode({}).startswith(b"metaopt checkpoint 1 ")
