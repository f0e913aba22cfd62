"""`JSONL`: a line per call that survives the process, and can be taken back from a step on."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaopt.tracking import JSONL

ROOT = Path(__file__).parents[2]


def rows(path: Path) -> list[dict[str, Any]]:
    """Strictly: a literal NaN or a torn line is an error."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "record.jsonl"


# Lines


def test_a_row_is_its_fields_its_step_and_its_metrics_in_this_order(path: Path) -> None:
    JSONL(path, run="a", study="b").log({"loss": 0.5, "hyper": {"betas": (0.9, 0.99)}}, step=3)
    assert path.read_text() == '{"run": "a", "study": "b", "step": 3, "loss": 0.5, "hyper": {"betas": [0.9, 0.99]}}\n'


def test_curves_and_artifacts_have_a_kind_and_rows_have_none(path: Path) -> None:
    run = JSONL(path, run="a")
    run.log({"loss": 0.5}, step=3)
    run.curves("inner", {"inner_step": range(3), "loss": torch.tensor([3.0, 2.0, math.nan])}, step=3)
    run.artifact("final", {"lr": 0.1, "betas": (0.9, 0.99)})
    assert rows(path) == [
        {"run": "a", "step": 3, "loss": 0.5},
        {
            "run": "a",
            "step": 3,
            "kind": "curves",
            "name": "inner",
            "columns": {"inner_step": [0, 1, 2], "loss": [3.0, 2.0, "NaN"]},
        },
        {"run": "a", "kind": "artifact", "name": "final", "content": {"lr": 0.1, "betas": [0.9, 0.99]}},
    ]


def test_numbers_that_are_not_finite_are_valid_json_and_read_back_by_float(path: Path) -> None:
    values = [math.inf, -math.inf, math.nan, 1.5]
    JSONL(path).log({"plain": values, "nested": {"t": torch.tensor(math.inf), "n": np.float32("-inf")}}, step=0)
    (row,) = rows(path)
    assert [float(value) for value in row["plain"][:2]] == [math.inf, -math.inf]
    assert math.isnan(float(row["plain"][2]))
    assert row["plain"][3] == 1.5
    assert row["nested"] == {"t": "Infinity", "n": "-Infinity"}


def test_tensors_and_arrays_become_numbers(path: Path) -> None:
    loss = torch.tensor(0.5, requires_grad=True)
    JSONL(path).log({"loss": loss, "seeds": torch.arange(2), "mean": np.float32(0.25)}, step=0)
    assert rows(path) == [{"step": 0, "loss": 0.5, "seeds": [0, 1], "mean": 0.25}]


def test_several_of_one_file_add_to_it_in_turn(path: Path) -> None:
    first, second = JSONL(path, run="a"), JSONL(path, run="b")
    for step in range(2):
        first.log({}, step)
        second.log({}, step)
    assert [(row["run"], row["step"]) for row in rows(path)] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_the_time_of_a_line_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def seconds(path: Path) -> float:
        run = JSONL(path)
        run.log({"loss": 0.5}, 0)
        times = []
        for step in range(300):
            started = time.perf_counter()
            run.log({"loss": 0.5}, step)
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    (tmp_path / "long").write_text('{"step": 0, "loss": 0.5}\n' * 400_000)
    assert seconds(tmp_path / "long") < 5 * seconds(tmp_path / "short")


# Rewinding and scopes


def test_rewinding_removes_rows_and_curves_from_the_step_on_and_no_others(path: Path) -> None:
    run, other = JSONL(path, run="a"), JSONL(path, run="b")
    for step in range(4):
        run.log({"loss": step}, step)
        other.log({}, step)
        run.curves("inner", {"x": [0], "y": [step]}, step)
    run.artifact("final", {"lr": 0.1})
    run.rewind(2)
    left = rows(path)
    assert [row["step"] for row in left if row["run"] == "a" and "step" in row] == [0, 0, 1, 1]
    assert [row["step"] for row in left if row["run"] == "b"] == [0, 1, 2, 3]
    assert left[-1]["kind"] == "artifact"
    run.log({"loss": "again"}, 2)
    other.log({}, 4)  # which has opened the file that was replaced
    assert rows(path)[-2:] == [{"run": "a", "step": 2, "loss": "again"}, {"run": "b", "step": 4}]


def test_a_scope_adds_fields_and_has_its_own_steps(path: Path) -> None:
    run = JSONL(path, run="a")
    part = run.scope(optimizer="radam").scope(study="scalars")
    for step in range(3):
        run.log({"whole": 1}, step)
        part.log({"part": 1}, step)
    assert rows(path)[1] == {"run": "a", "optimizer": "radam", "study": "scalars", "step": 0, "part": 1}
    part.rewind(1)
    assert [(row["step"], "part" in row) for row in rows(path)] == [(0, False), (0, True), (1, False), (2, False)]
    run.rewind(0)
    assert [("part" in row) for row in rows(path)] == [True]


def test_a_metric_with_the_name_of_a_field_elsewhere_is_no_field(path: Path) -> None:
    JSONL(path).log({"run": "a"}, step=5)
    JSONL(path, run="a").rewind(0)
    assert rows(path) == [{"step": 5, "run": "a"}]


def test_rewinding_what_is_not_there_changes_nothing(path: Path) -> None:
    run = JSONL(path)
    run.rewind(0)
    assert not path.exists()
    run.log({}, 0)
    run.rewind(1)
    assert rows(path) == [{"step": 0}]


def test_a_rewind_that_fails_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = JSONL(path)
    for step in range(3):
        run.log({}, step)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot rewind .*record.jsonl: No space left"):
            run.rewind(1)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    run.rewind(1)
    assert rows(path) == [{"step": 0}]


def test_a_link_stays_one_and_the_permissions_stay(path: Path) -> None:
    run = JSONL(path)
    run.log({}, 0)
    path.chmod(0o640)
    link = path.with_name("link.jsonl")
    link.symlink_to(path)
    JSONL(link).rewind(0)
    assert link.is_symlink()
    assert path.read_text() == ""
    assert path.stat().st_mode & 0o777 == 0o640


# Torn lines


@pytest.mark.parametrize("torn", ['{"step": 2, "loss": 0.', '{"step"', "{" + "x" * 200_000], ids=["row", "key", "long"])
@pytest.mark.parametrize("whole", ["", '{"step": 0}\n{"step": 1}\n'], ids=["alone", "after others"])
def test_the_next_line_takes_the_place_of_a_torn_one(path: Path, whole: str, torn: str) -> None:
    run = JSONL(path)
    path.write_text(whole + torn)
    run.log({"loss": 0.5}, 2)
    assert path.read_text() == whole + '{"step": 2, "loss": 0.5}\n'


def test_a_complete_line_without_its_end_is_kept(path: Path) -> None:
    run = JSONL(path)
    path.write_text('{"step": 0}\n{"step": 1}')
    run.log({}, 2)
    assert [row["step"] for row in rows(path)] == [0, 1, 2]


def test_rewinding_removes_a_torn_line_and_keeps_what_others_wrote(path: Path) -> None:
    run = JSONL(path)
    path.write_text('not ours\n{"step": 0}\n[1]\n{"step": 1}\n{"step": 2, "lo')
    run.rewind(1)
    assert path.read_text() == 'not ours\n{"step": 0}\n[1]\n'


def test_a_killed_process_leaves_every_line_it_has_logged(path: Path) -> None:
    program = (
        "import sys; from metaopt.tracking import JSONL\n"
        "run = JSONL(sys.argv[1])\n"
        "for step in range(10**9): run.log({'loss': 0.5}, step); print(step, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for _ in range(100):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        confirmed = [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    JSONL(path).log({}, -1)  # repairs the end, if that was hit
    steps = [row["step"] for row in rows(path)][:-1]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= max(confirmed, default=99)


# Refusals


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    with pytest.raises(OSError, match=r"cannot write to /dev/full: No space left on device") as caught:
        JSONL("/dev/full").log({}, 0)
    assert caught.value.errno == errno.ENOSPC


def test_a_line_that_was_cut_by_a_full_disk_is_not_there_later(path: Path) -> None:
    """A limit on the size of files stands for the end of the disk: the write goes half through, then fails."""
    program = (
        "import resource, sys; from metaopt.tracking import JSONL\n"
        "run = JSONL(sys.argv[1]); run.log({}, 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))\n"
        "try: run.log({'loss': 0.5}, 1)\n"
        "except OSError as error: print(error)\n"
        "print(len(run.path.read_bytes()))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "run.log({'loss': 0.5}, 1)"
    )
    pytest.importorskip("resource", reason="limits are Unix's")
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    error, size = done.stdout.splitlines()
    assert f"cannot write to {path}: File too large" in error
    assert int(size) == 20
    assert rows(path) == [{"step": 0}, {"step": 1, "loss": 0.5}]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(path: Path) -> None:
    run = JSONL(path)
    with pytest.raises(TypeError, match="Object of type object"):
        run.log({"loss": 0.5, "model": object()}, 0)
    with pytest.raises(TypeError, match="Object of type object"):
        run.log({"loss": math.nan, "model": object()}, 0)
    assert not path.exists()


def test_names_that_the_line_needs_are_refused(path: Path) -> None:
    run = JSONL(path, run="a")
    with pytest.raises(ValueError, match="metrics must have no 'step', which every line has, got step=7"):
        run.log({"step": 7}, 0)
    with pytest.raises(ValueError, match="metrics must have no 'kind'"):
        run.log({"kind": "curves"}, 0)
    with pytest.raises(ValueError, match="metrics must have no 'run'"):
        run.log({"run": "b"}, 0)
    with pytest.raises(ValueError, match="fields must have no 'kind', which every line has, got kind='b'"):
        run.scope(kind="b")
    assert not path.exists()


@pytest.mark.parametrize("step", [None, "3", True, 3.0, np.bool_(True), torch.tensor(True), torch.tensor([1, 2])])
def test_a_step_that_is_no_integer_is_refused(path: Path, step: Any) -> None:
    run = JSONL(path)
    for call in (
        lambda: run.log({}, step),
        lambda: run.curves("a", {"x": [0], "y": [1]}, step),
        lambda: run.rewind(step),
    ):
        with pytest.raises(TypeError, match=re.escape(f"step must be an integer, got step={step!r}")):
            call()
    assert not path.exists()


def test_integers_of_numpy_and_torch_are_steps(path: Path) -> None:
    run = JSONL(path)
    for step in (0, np.int64(1), torch.tensor(2)):
        run.log({}, step)
    assert rows(path) == [{"step": 0}, {"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [0, 1], "y": [0]}, r"columns must have the same length, got lengths {'x': 2, 'y': 1}"),
        ({"x": [0, 1]}, r"columns must be an x-axis and one curve or more, got columns \['x'\]"),
        ({"x": [], "y": []}, r"columns must have one row or more, got lengths {'x': 0, 'y': 0}"),
    ],
)
def test_columns_that_are_no_curves_are_refused(path: Path, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JSONL(path).curves("inner", columns, 0)
    assert not path.exists()
