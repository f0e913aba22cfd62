"""One trial: a folder of its own, and the program running in a process of its own.

The folder is ``FOLDER/trials/NUMBER``. What the program finds in its environment:

- ``WANDB_DIR``, and what else wandb needs to log there; offline unless WANDB_MODE says otherwise
- ``WANDB_SWEEP_PARAM_PATH``: as under wandb's own agent, ``wandb.init()`` alone puts the parameters into wandb.config
- ``METAOPT_CHECKPOINT``: a folder that outlives the process. A trial that was cut off finds its own again
- ``METAOPT_RECORD``: a file for lines of JSON, for programs that do not log to wandb
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import yaml

from metaopt.sweeps import process
from metaopt.sweeps.command import expand, nested
from metaopt.sweeps.definition import Sweep
from metaopt.sweeps.metric import RECORD, Metric
from metaopt.sweeps.storage import Timing
from metaopt.sweeps.study import worst

_POLL = 1.0  # seconds between two looks at what the program has logged
_OF_ANOTHER_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID")
_TAIL = 20  # lines of output that are kept of a program that failed


class Look(Protocol):
    """Looks at a running trial, and raises to end it."""

    def __call__(self, metric: Metric | None, *, ended: bool) -> None: ...


class Failed(Exception):
    """By its own fault."""


class Stopped(Exception):
    """By us; the trial is to go on later."""


class Pruned(Exception):
    """By us; the trial is over."""


def run_trial(
    sweep: Sweep,
    config: Mapping[str, Any],
    folder: Path,
    study: str,
    timing: Timing,
    look: Look,
) -> float:
    """Run the program of a trial to its end.

    Args:
        sweep: its command and metric.
        config: the parameters.
        folder: of the trial.
        study: the identity of the study that the folder belongs to.
        timing: for stopping the program.
        look: is called about once a second and after the program's end.

    Returns:
        The metric, or the worst value if that is not a finite number; 0 for a sweep without a metric.

    Raises:
        Failed: the program could not be started, ended with an error, or has not logged the metric.
        Pruned, Stopped: ``look`` raised it.
    """
    result = folder / "result.json"
    if result.exists():  # its worker died after the program's end, before the database knew
        found = json.loads(result.read_text(encoding="utf-8"))
        if found["study"] == study:
            return float(found["value"])
    folder.mkdir(parents=True, exist_ok=True)
    running = folder / "process.json"
    if running.exists():
        process.kill(json.loads(running.read_text(encoding="utf-8")))
    _write(folder / "config.yaml", _wandb_config(nested(config, sweep)))
    metric = Metric(folder, sweep.metric.name) if sweep.metric is not None else None
    output = folder / "output.log"
    try:
        child = process.start(
            expand(sweep, config, sys.executable, folder / "config.json"), _environment(sweep, folder), output
        )
    except OSError as error:
        raise Failed(f"the program cannot be started: {error.strerror}: {error.filename}") from None
    try:
        _write(running, json.dumps(process.mark(child.pid)))
        while _runs(child):
            look(metric, ended=False)
        _check(child, output)
        value = 0.0
        if metric is not None:
            value = _checked(metric.final(), sweep)
            with closing(Metric(folder, metric.name)) as whole:
                look(whole, ended=True)
        _write(result, json.dumps({"study": study, "value": value}))
    finally:
        process.stop(child, timing.stop)
        running.unlink(missing_ok=True)
        if metric is not None:
            metric.close()
    return value


def _runs(child: subprocess.Popen[bytes]) -> bool:
    """Wait a moment; whether the program still runs."""
    end = time.monotonic() + _POLL
    while time.monotonic() < end and child.poll() is None:
        time.sleep(0.05)
    return child.poll() is None


def _check(child: subprocess.Popen[bytes], output: Path) -> None:
    code = child.returncode
    if code == 0:
        return
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise Failed("\n".join([f"the program {ended}", *_last_words(output)]))


def _last_words(output: Path) -> list[str]:
    """The last lines of a program, without colours, and without those that wandb adds when all is over."""
    with output.open("rb") as file:
        file.seek(max(0, output.stat().st_size - 16_384))
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read().decode(errors="replace"))
    lines = [line for line in text.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith("wandb:")]
    return (own or lines)[-_TAIL:]


def _checked(value: float | None, sweep: Sweep) -> float:
    if value is None:
        assert sweep.metric is not None
        raise Failed(
            f"the program ended without having logged {sweep.metric.name!r}: run.log of wandb (not in mode disabled), "
            f"or a line of JSON in the file that METAOPT_RECORD names"
        )
    return value if math.isfinite(value) else worst(sweep)


def _environment(sweep: Sweep, folder: Path) -> dict[str, str]:
    folder = folder.resolve()
    own = {
        "WANDB_DIR": str(folder),
        "WANDB_SWEEP_PARAM_PATH": str(folder / "config.yaml"),
        "WANDB_RUN_GROUP": str(sweep.name),
        "METAOPT_CHECKPOINT": str(folder / "checkpoint"),
        "METAOPT_RECORD": str(folder / RECORD),
    }
    unless_set = {
        "WANDB_MODE": "offline",
        "WANDB_JOB_TYPE": "trial",
        "WANDB_NAME": f"{sweep.name}-{folder.name}",
        "WANDB_DATA_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder.parent.parent / "cache"),
        # wandb writes every 15 s otherwise, which a killed program would lose. Unknown to other versions, and ignored.
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if sweep.project is not None:
        unless_set["WANDB_PROJECT"] = sweep.project
    if sweep.entity is not None:
        unless_set["WANDB_ENTITY"] = sweep.entity
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_RUN}
    return {**unless_set, **inherited, **own}


def _wandb_config(config: Mapping[str, Any]) -> str:
    """What wandb's agent writes."""
    named = {name: {"value": value} for name, value in config.items()}
    return "wandb_version: 1\n\n" + (yaml.safe_dump(named, sort_keys=False) if named else "")


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
