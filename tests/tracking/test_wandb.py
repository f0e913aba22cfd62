"""`WandB`, against wandb itself: what is logged comes back from its files by its own tool, whatever happens."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from metaopt.tracking import JSONL, WandB, start
from tests.tracking.stored import Stored, environment

pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
pytestmark = pytest.mark.xdist_group("wandb")  # one worker, where groups are kept together: the runs are shared


def python(program: str, *arguments: object, home: Path | str, **variables: str) -> list[Any]:
    """What a program prints, each line as JSON."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
        env=environment(home, **variables),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


# One program, logged in all ways, with a terminal before it


class Told:
    """What has become of `tracked.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "out", folder / "home"
        self.folder.mkdir()
        self.home.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            self.code, self.printed = self._run(environment(self.home, WANDB_BASE_URL=url, TERM="xterm"))
            server.settimeout(0)
            try:
                server.accept()[0].close()
                self.called = True
            except BlockingIOError:
                self.called = False
        self.report = json.loads((self.folder / "report.json").read_text())
        self.run, self.inner = Stored(self.report["run"]), Stored(self.report["inner"])

    def _run(self, variables: Mapping[str, str]) -> tuple[int, str]:
        """In a terminal, at which nobody types."""
        ours, theirs = pty.openpty()
        command = [sys.executable, str(Path(__file__).with_name("tracked.py")), str(self.folder)]
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=dict(variables), cwd=self.home
        ) as process:
            try:
                code = process.wait(60)
            finally:
                process.kill()
                os.close(theirs)
        printed = b""
        try:
            while part := os.read(ours, 4096):
                printed += part
        except OSError:  # the end, on Linux
            pass
        os.close(ours)
        return code, printed.decode()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("told"))


def test_without_a_key_it_is_offline_asks_nothing_and_calls_nobody(told: Told) -> None:
    assert told.report["mode"] == "offline"
    assert (told.code, told.printed) == (0, "")
    assert not told.called


def test_nothing_is_written_but_beside_the_run(told: Told) -> None:
    assert list(told.home.iterdir()) == []
    assert {path.name for path in told.folder.iterdir()} == {"record.jsonl", "report.json", "wandb"}
    assert Path(told.report["run"]).parent == told.folder / "wandb"


def test_rows_come_back_flat_with_their_meta_step(told: Told) -> None:
    losses = [row for row in told.run.rows if "meta_loss" in row]
    assert losses == [
        {
            "meta_step": step,
            "meta_loss": pytest.approx(1 / (step + 1), rel=1e-15),
            "note": "text",
            "hyper/lr/0.weight": pytest.approx(0.1 * step, rel=1e-15),
            "hyper/lr/0.bias": 0.5,
            "hyper/betas[0]": 0.9,
            "hyper/betas[1]": 0.99,
            "hyper/step_sizes[0]": 1e-6,
        }
        for step in range(5)
    ]


def test_numbers_that_are_not_finite_survive(told: Told) -> None:
    (row,) = (row for row in told.run.rows if "nan" in row)
    assert row == {"meta_step": 5, "nan": "NaN", "up": "Infinity", "down": "-Infinity"}


def test_the_axis_of_all_charts_is_the_meta_step_or_what_was_asked_for(told: Told) -> None:
    for run, axis in ((told.run, "meta_step"), (told.inner, "inner_step")):
        named, all_others = run.of("metric")
        assert named["name"] == axis
        assert (all_others["glob_name"], all_others["step_metric"]) == ("*", axis)
    assert told.inner.rows == [{"inner_step": 12, "loss": 0.5}]


def test_curves_become_a_table_and_a_plot_of_it(told: Told) -> None:
    text = json.dumps(told.run.table("inner"))
    assert json.loads(text, parse_constant=str) == {
        "columns": ["inner_step", "train/loss", "validation/loss"],
        "data": [[0, 3.0, 3.5], [1, 2.0, "NaN"], [2, 1.5, 2.5]],
    }
    plotted = json.loads(json.dumps(told.run.table("inner_plot_table")), parse_constant=str)["data"]
    for name, values in (("train/loss", [3.0, 2.0, 1.5]), ("validation/loss", [3.5, "NaN", 2.5])):
        assert [[x, y] for x, key, y in plotted if key == name] == [[x, y] for x, y in enumerate(values)]
    (row,) = (row for row in told.run.rows if "inner.path" in row)
    assert row["meta_step"] == 4
    assert row["inner.nrows"] == 3
    plots = [update for config in told.run.of("config") for update in config["update"] if "inner_plot" in update]
    assert plots == ["_wandb.visualize.inner_plot"]


def test_curves_beyond_what_a_table_holds_are_thinned_and_none_is_lost(told: Told) -> None:
    points = told.run.table("long_plot_table")["data"]
    assert len(points) == 9_000
    for key in ("a", "b"):
        assert [[x, y] for x, name, y in points if name == key] == [[x, x] for x in range(0, 9_000, 2)]


def test_an_artifact_is_a_file_of_json(told: Told) -> None:
    assert told.run.artifact("final") == {"final.json": {"lr": 0.1, "worst": "Infinity"}}


def test_a_scope_goes_before_every_name(told: Told) -> None:
    losses = [row for row in told.run.rows if "radam/learned, scalars/meta_loss" in row]
    assert losses == [{"meta_step": 7, "radam/learned, scalars/meta_loss": loss} for loss in (0.125, 0.0625)]
    assert told.run.table("radam/learned, scalars/schedule")["data"] == [[0, 0.1], [1, 0.2]]
    assert told.run.artifact("radam-learned-scalars-final") == {"final.json": {"lr": 0.2}}


def test_the_config_is_plain(told: Told) -> None:
    summary = told.run.summary()
    assert summary["config"] == {
        "out": "runs",
        "size": "small",
        "inner": {"steps": 60, "betas": [0.9, 0.99]},
        "clip": None,
    }
    assert (summary["name"], summary["project"], summary["tags"]) == ("first", "metaopt", ["quick"])
    assert (summary["state"], summary["summary"]["after"]) == ("finished", 1.0)
    (run,) = told.run.of("run")
    assert (run["run_group"], run["job_type"]) == ("group", "job")


def test_the_record_beside_it_has_everything_once(told: Told) -> None:
    lines = [json.loads(line) for line in (told.folder / "record.jsonl").read_text().splitlines()]
    part = [line for line in lines if "optimizer" in line]
    assert [line.get("kind", "row") for line in part] == ["artifact", "row"]
    assert part[1]["meta_loss"] == 0.0625
    whole = [line for line in lines if "optimizer" not in line]
    assert [line["step"] for line in whole if "kind" not in line] == [0, 1, 2, 3, 4, 5, 8]
    assert len(whole[7]["columns"]["a"]) == 9_000


# Killed

ENDLESS = """
import sys, time
from metaopt.tracking import start
run = start(sys.argv[1], {}, name="endless")
for step in range(10**9):
    run.log({"time": time.time()}, step)
    time.sleep(0.04)
"""


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(below for child in children for below in descendants(child))]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
def test_a_kill_loses_no_line_of_the_record_and_less_than_a_second_in_wandb(tmp_path: Path) -> None:
    """Also of wandb's own process, with a home folder that cannot be made."""
    record = tmp_path / "record.jsonl"
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment("/dev/null"),
    ) as process:
        deadline = time.monotonic() + 60
        while not record.exists() or record.read_bytes().count(b"\n") < 50:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for pid in reversed(descendants(process.pid)):  # wandb's first: it has no time to write what it holds
            os.kill(pid, signal.SIGKILL)
        assert process.stdout is not None
        assert process.stdout.read() == b""
    JSONL(record).log({}, -1)
    lines = [json.loads(line) for line in record.read_text().splitlines()][:-1]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    kept = Stored(folder).rows
    assert [row["meta_step"] for row in kept] == list(range(len(kept)))
    assert len(kept) > 20
    assert lines[-1]["time"] - kept[-1]["time"] < 1.0


# Who starts the program decides

SWEPT = """
import json, sys
from metaopt.tracking import start
try:
    with start(sys.argv[1], {"lr": 0.1, "steps": 60}, name="ours", group="ours", job_type="ours") as run:
        run.log({"loss": 0.5}, 0)
        raise KeyError
except KeyError:
    pass
"""


def test_the_environment_of_a_sweep_goes_before_the_arguments(tmp_path: Path) -> None:
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text("wandb_version: 1\nlr:\n  value: 0.5\n")
    python(
        SWEPT,
        tmp_path / "ours",
        home=tmp_path,
        WANDB_DIR=str(tmp_path / "theirs"),
        WANDB_SWEEP_PARAM_PATH=str(parameters),
        WANDB_RUN_GROUP="group",
        WANDB_NAME="name",
        WANDB_JOB_TYPE="job",
        WANDB_PROJECT="project",
        WANDB_RUN_ID="trial7",
    )
    (folder,) = (tmp_path / "theirs" / "wandb").glob("offline-run-*-trial7")
    stored = Stored(folder)
    (run,) = stored.of("run")
    assert [run[name] for name in ("run_group", "display_name", "job_type", "project")] == [
        "group",
        "name",
        "job",
        "project",
    ]
    summary = stored.summary()
    assert summary["config"] == {"lr": 0.5, "steps": 60}
    assert summary["exit_code"] == 1  # the block failed
    assert stored.rows == [{"meta_step": 0, "loss": 0.5}]
    assert json.loads((tmp_path / "ours" / "record.jsonl").read_text()) == {"step": 0, "loss": 0.5}


# What cannot be started

REFUSED = """
import errno, json, os, sys, warnings
import wandb
from metaopt.tracking import WandB

def attempt(**options):
    try:
        run = WandB({}, **{"dir": sys.argv[1], **options})
        print(json.dumps([run.mode, None if run._run is None else str(run._run)]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))

modes = []
def init(**options):
    modes.append(options["settings"].mode)
    if modes[-1] == failing:
        raise failure
    class Run:
        dir = "run/files"
        def define_metric(self, *args, **kwargs): pass
        def __str__(self): return "api_key" if options["settings"].api_key else "no key"
    return Run()

attempt(mode="online")
attempt(mode="offline", dir="/dev/null/runs")
wandb.init = init
failing, failure = "offline", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
attempt()
failing, failure = "online", wandb.errors.CommError("no route to host")
warnings.simplefilter("ignore", RuntimeWarning)
for entry in ("default", "machine api.wandb.ai"):
    attempt()
    with open(os.path.expanduser("~/.netrc"), "w") as file:
        file.write(entry + " login user password " + "a" * 40)
attempt()
attempt(mode="online")
failure = wandb.errors.AuthenticationError("bad key")
attempt()
failing = None
attempt()
os.environ["WANDB_MODE"] = "dryrun"
attempt()
os.environ["WANDB_MODE"] = "disabled"
attempt()
attempt(mode="online")

class Older:
    model_fields = {}
    def __init__(self, **values):
        self.__dict__.update(values)

wandb.Settings = Older
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    WandB({}, mode="offline", dir=sys.argv[1])
print(json.dumps([str(warning.message) for warning in caught]))
"""


def test_what_cannot_be_started_is_one_clear_error(tmp_path: Path) -> None:
    results = iter(python(REFUSED, tmp_path, home=tmp_path))
    could_not = f"wandb could not start a run in {tmp_path}: "
    without = " (WANDB_MODE=disabled does without wandb)"
    no_key = "there is no API key: run `wandb login`, set WANDB_API_KEY or choose mode='offline'"
    assert next(results) == ["RuntimeError", could_not + no_key + without]
    kind, text = next(results)
    assert kind == "RuntimeError"
    assert "wandb could not start a run in /dev/null/runs: [Errno 20] Not a directory" in text
    assert next(results) == ["RuntimeError", f"{could_not}[Errno 28] No space left on device{without}"]
    # without a key; with one for no host, or any
    assert next(results) == next(results) == ["offline", "no key"]
    # with a key in ~/.netrc, and a server that does not answer, refuses it, answers
    assert next(results) == ["offline", "no key"]
    assert next(results) == ["RuntimeError", f"{could_not}no route to host{without}"]
    assert next(results) == ["RuntimeError", f"{could_not}bad key{without}"]
    assert next(results) == ["online", "api_key"]
    # WANDB_MODE, and an argument against it
    assert next(results) == ["offline", "no key"]
    assert next(results) == ["disabled", None]
    assert next(results) == ["online", "api_key"]
    # a version of wandb that cannot be told to write soon
    (warning,) = next(results)
    assert "has no setting x_transaction_log_flush_interval: if the process is killed, its file lacks some" in warning
    assert next(results, None) is None


@pytest.mark.parametrize("mode", ["of", ""])
def test_an_unknown_mode_is_refused(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"mode must be 'online', 'offline' or 'disabled', got mode='{mode}'"):
        WandB(mode=mode, dir=tmp_path)
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ValueError, match="WANDB_MODE must be 'online', 'offline' or 'disabled', got WANDB_MODE='of'"):
        WandB(dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="config must be a dataclass or a mapping, got config=3"):
        WandB(3, mode="offline", dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# Without wandb


@pytest.fixture(params=["not installed", "a folder of its name"])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """./wandb, where wandb writes, can be imported where wandb itself is missing."""
    module = None if request.param == "not installed" else ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for variable in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    return


@pytest.mark.usefixtures("missing")
def test_where_wandb_is_missing_a_run_is_the_record_and_wandb_an_error_that_names_the_extra(tmp_path: Path) -> None:
    assert isinstance(start(tmp_path, {}, name="first"), JSONL)
    with pytest.raises(ImportError, match=r'wandb is not installed: pip install "metaopt\[wandb\]"'):
        start(tmp_path, {}, name="first", wandb="offline")
    with pytest.raises(ImportError, match=r'pip install "metaopt\[wandb\]"'):
        WandB(dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_off_or_disabled_imports_no_wandb_and_writes_nothing(tmp_path: Path) -> None:
    program = """
import json, sys
from metaopt.tracking import JSONL, WandB, start
from tests.tracking.stored import ROOT, Stored, environment
runs = [start(sys.argv[1], {}, name="first"), start(sys.argv[1], {}, name="first", wandb="off")]
disabled = WandB({}, dir=sys.argv[1])
with disabled.scope(a="b") as part:
    part.log({"loss": 0.5}, 0)
    part.curves("inner", {"x": [0], "y": [1]}, 0)
    part.artifact("final", {})
    part.rewind(0)
print(json.dumps([type(run) is JSONL for run in runs]))
print(json.dumps(sorted({"wandb", "torch"} & set(sys.modules))))
"""
    assert python(program, tmp_path, home=tmp_path, WANDB_MODE="disabled") == [[True, True], []]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wandb must be 'auto', 'off', 'offline' or 'online', got wandb='on'"):
        start(tmp_path / "run", {}, name="first", wandb="on")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
