"""Trackers that are made whole, and several of them as one."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from metaopt.tracking import JSONL, Nothing, Run, Several, WandB, complete, start


class Log:
    """Has no more than what `metaopt.meta_train` demands."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[tuple[dict[str, Any], int]] = []
        self.error = error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if self.error is not None and len(self.calls) == 1:
            raise self.error
        self.calls.append((dict(metrics), step))


def use(run: Run) -> None:
    """Everything that a run can do."""
    with run:
        part = run.scope(optimizer="radam")
        part.log({"loss": 0.5}, 0)
        part.curves("inner", {"x": [0], "y": [1]}, 0)
        part.artifact("final", {"lr": 0.1})
        part.rewind(0)
        run.log({"loss": 0.25}, 1)


def test_a_tracker_that_only_logs_can_be_used_as_a_run() -> None:
    tracker = Log()
    use(complete(tracker))
    assert tracker.calls == [({"optimizer": "radam", "loss": 0.5}, 0), ({"loss": 0.25}, 1)]


def test_none_is_a_run_that_forgets() -> None:
    run = complete(None)
    assert isinstance(run, Nothing)
    use(run)


def test_a_run_is_complete(tmp_path: Path) -> None:
    run = JSONL(tmp_path / "record.jsonl")
    assert complete(run) is run
    part = run.scope(a="b")
    assert complete(part) is part


def test_a_tracker_without_log_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tracker must have log\(metrics, step\), got tracker=3"):
        complete(3)  # type: ignore[arg-type]


def test_all_get_everything(tmp_path: Path) -> None:
    paths, tracker = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], Log()
    use(Several(JSONL(paths[0]), tracker, JSONL(paths[1])))
    texts = [path.read_text() for path in paths]
    assert texts[0] == texts[1]
    assert [json.loads(line).get("kind", "row") for line in texts[0].splitlines()] == ["artifact", "row"]
    assert tracker.calls == [({"optimizer": "radam", "loss": 0.5}, 0), ({"loss": 0.25}, 1)]


def test_one_beside_the_record_that_fails_is_left_out_with_one_warning(tmp_path: Path) -> None:
    path, broken, sound = tmp_path / "record.jsonl", Log(ConnectionError("gone")), Log()
    run = Several(JSONL(path), broken, sound)
    part = run.scope(study="a")
    part.log({}, 0)
    with pytest.warns(RuntimeWarning, match="failed and is left out from now on: ConnectionError: gone") as caught:
        part.log({}, 1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    run.log({}, 2)  # the whole knows what happened to its part
    part.log({}, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert [step for _, step in sound.calls] == [0, 1, 2, 3]
    assert [step for _, step in broken.calls] == [0]


def test_an_interruption_is_not_taken_for_a_failure(tmp_path: Path) -> None:
    run = Several(JSONL(tmp_path / "record.jsonl"), Log(KeyboardInterrupt()))
    run.log({}, 0)
    with pytest.raises(KeyboardInterrupt):
        run.log({}, 1)


def test_a_record_that_cannot_be_written_is_an_error_after_the_others_have_got_theirs() -> None:
    other = Log()
    run = Several(Log(OSError(errno.ENOSPC, "disk full")), other)
    run.log({}, 0)
    with pytest.raises(OSError, match="disk full"):
        run.log({}, 1)
    assert [step for _, step in other.calls] == [0, 1]


def test_an_argument_that_the_record_refuses_reaches_no_other(tmp_path: Path) -> None:
    other = Log()
    run = Several(JSONL(tmp_path / "record.jsonl"), other)
    with pytest.raises(TypeError, match="Object of type object"):
        run.log({"model": object()}, 0)
    run.log({}, 1)
    assert other.calls == [({}, 1)]


def test_curves_without_a_row_are_refused_and_leave_wandb_in_the_run(tmp_path: Path) -> None:
    beside = WandB(mode="disabled")  # which checks columns as one that is not
    run = Several(JSONL(tmp_path / "record.jsonl"), beside)
    for each in (run, beside):
        with pytest.raises(ValueError, match=r"columns must have one row or more, got lengths {'x': 0, 'y': 0}"):
            each.curves("inner", {"x": [], "y": []}, 0)
    assert not run._failed


@pytest.mark.parametrize("wandb", ["auto", "off"])
def test_a_run_is_not_started_with_a_config_that_is_none_or_in_a_file(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(TypeError, match=r"config must be a dataclass or a mapping, got config=\[1\]"):
        start(tmp_path / "run", [1], name="first", wandb=wandb)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"cannot make the folder .*file for record.jsonl: File exists"):
        start(tmp_path / "file", {}, name="first", wandb=wandb)


def test_a_block_that_fails_finishes_the_run_as_failed() -> None:
    class Ends(Nothing):
        def __init__(self) -> None:
            self.ends: list[bool] = []

        def finish(self, failed: bool = False) -> None:
            self.ends.append(failed)

    ends = Ends()
    with Several(Nothing(), ends):
        pass
    with pytest.raises(KeyError), Several(Nothing(), ends):
        raise KeyError
    assert ends.ends == [False, True]
