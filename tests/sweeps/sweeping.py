"""Sweeps as a user runs them: a file, a program, and the command line in a process of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
from sqlalchemy.pool import NullPool

from metaopt import cli

REPOSITORY = Path(__file__).parents[2]

# Five steps, each of them written to the checkpoint, then the metric. The trial with --number=7 waits in the middle of
# its first life until it is killed.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

config = json.loads(sys.argv[1])
folder = Path(os.environ["METAOPT_CHECKPOINT"])
folder.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit((folder / "told").write_text("SIGTERM") and 1))
with (folder / "lives").open("a") as lives:
    lives.write(f"{json.dumps(config)}\\n")
steps = folder / "steps"
begin = len(steps.read_text().split()) if steps.exists() else 0
for step in range(begin, 5):
    if config["number"] == 7 and step == 3 and begin == 0:
        Path("reached").write_text(f"{os.getpid()}")
        time.sleep(60)
    with steps.open("a") as file:
        file.write(f"{step}\\n")
    time.sleep(0.02)
loss = (config["number"] - 4) ** 2
"""
RECORD = """
with open(os.environ["METAOPT_RECORD"], "a") as file:
    file.write(json.dumps({"step": 4, "validation/loss": loss}) + "\\n")
"""
# A third of the trials, as wandb takes its time to start
WANDB = f"""
if config["number"] % 3 == 1:
    import wandb

    run = wandb.init()
    assert dict(run.config) == config, run.config
    run.log({{"validation/loss": loss + 100}})
    run.log({{"validation/loss": loss}})
else:
    {RECORD.strip().replace(chr(10), chr(10) + 4 * " ")}
"""
GRID = """
program: program.py
method: grid
metric: {name: validation/loss, goal: minimize}
parameters:
  number: {values: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}
command: ["${interpreter}", "${program}", "${args_json}"]
"""


class Sweeping:
    """A folder with a sweep file and its program.

    Args:
        folder: an empty one.
        file: text of ``sweep.yaml``.
        program: text of ``program.py``.
    """

    def __init__(self, folder: Path, file: str = GRID, program: str = PROGRAM + RECORD) -> None:
        self.folder = folder
        (folder / "sweep.yaml").write_text(file)
        (folder / "program.py").write_text(program)

    def file(self, change: Callable[[str], str]) -> None:
        """Change the sweep file."""
        path = self.folder / "sweep.yaml"
        path.write_text(change(path.read_text()))

    def start(self, *words: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
        """``metaopt sweep WORDS``, after some lines of Python that change its world."""
        start = f"{before}\nfrom metaopt.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", start, "sweep", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "WANDB_MODE": "offline", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, before: str = "", **environment: str) -> tuple[int, str, str]:
        """The same to its end: exit code, output, errors."""
        started = self.start(*words, before=before, **environment)
        output, errors = started.communicate(timeout=60)
        return started.returncode, output, errors

    def call(self, *words: str) -> tuple[int, str, str]:
        """The same in this process, for what starts no workers."""
        output, errors = io.StringIO(), io.StringIO()
        with (
            chdir(self.folder),
            redirect_stdout(output),
            redirect_stderr(errors),
            patch.dict(os.environ, COLUMNS="100"),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main(["sweep", *words])
        return int(str(ended.value)), output.getvalue(), errors.getvalue()

    def reached(self) -> int:
        """Wait for the trial that is to be killed; the process of its program."""
        return int(wait_for(lambda: (self.folder / "reached").exists() and (self.folder / "reached").read_text()))

    def study(self, storage: str | None = None) -> optuna.Study:
        """What the database holds."""
        url = storage or f"sqlite:///{self.folder}/runs/sweeps/sweep/sweep.db"
        database = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})
        return optuna.load_study(study_name="sweep", storage=database)

    def trials(self) -> Path:
        """The trials' folders."""
        return self.folder / "runs/sweeps/sweep/trials"

    def lives(self) -> Counter[int]:
        """How often the program was started for each number."""
        lines = [line for path in self.trials().glob("*/checkpoint/lives") for line in path.read_text().splitlines()]
        return Counter(json.loads(line)["number"] for line in lines)

    def check_complete(self, storage: str | None = None) -> None:
        """Every point ran once, all steps of it; the one that was killed went on where it had been."""
        study = self.study(storage)
        done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        assert Counter(trial.user_attrs["config"]["number"] for trial in done) == Counter(range(12))
        assert all(trial.value == (trial.user_attrs["config"]["number"] - 4) ** 2 for trial in done)
        assert self.lives() == Counter({**dict.fromkeys(range(12), 1), 7: 2})
        for steps in self.trials().glob("*/checkpoint/steps"):
            assert steps.read_text().split() == ["0", "1", "2", "3", "4"]


def wait_for(found: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first value that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it has not happened")


def parent(pid: int) -> int:
    """The process that started another."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill_group(leader: subprocess.Popen[str]) -> None:
    """End a command and its workers as a power cut does."""
    os.killpg(leader.pid, signal.SIGKILL)
    leader.communicate()
