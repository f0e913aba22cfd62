"""What a user sees of a run: a bar in a terminal, lines in a log file, nothing where none is wanted."""

from __future__ import annotations

import functools
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
from torch.distributions import constraints

from metaopt import Hyperparameters, PerParameter, Schedule, meta_train
from metaopt.functional import radam
from metaopt.metagrad import Unrolled
from metaopt.tasks import NoisyQuadratic
from metaopt.train.progress import Progress, brief

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def train(steps: int, learn: Any = None, **options: Any) -> Any:
    opt = radam()
    hyper = Hyperparameters(opt, learn or {"lr": 0.05, "betas": (0.9, 0.99)})
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    return meta_train(NoisyQuadratic(), opt, hyper, Unrolled(6), meta_optimizer, steps, **options)


def console(monkeypatch: pytest.MonkeyPatch, **options: Any) -> io.StringIO:
    """Make every rich console one of this kind, writing here."""
    file = io.StringIO()
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rich.console, "Console", functools.partial(rich.console.Console, file=file, **options))
    return file


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


# A log file


@pytest.mark.usefixtures("log")
def test_a_log_has_lines_with_the_step_the_meta_loss_and_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    result = train(30)
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    steps = [1, *range(3, 31, 3)]
    assert len(lines) == len(steps)
    for line, step in zip(lines, steps, strict=True):
        record = result.history[step - 1]
        beta1, beta2 = record["hyper"]["betas"]
        assert line == (
            f"meta-step {step}/30  meta-loss {record['meta_loss']:.4g}  "
            f"lr {record['hyper']['lr']:.3g}  betas ({beta1:.3g}, {beta2:.3g})"
        )


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 100, 1003])
@pytest.mark.usefixtures("log")
def test_a_log_is_short_however_long_the_run_and_has_its_first_and_last_step(
    steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(steps) as progress:
        for _ in range(steps):
            progress.update(1.0, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"meta-step 1/{steps} ")
    assert lines[-1].startswith(f"meta-step {steps}/{steps} ")
    assert min(steps, 10) <= len(lines) <= 20


def test_a_log_written_by_a_process_is_plain_text_that_is_there_at_once(tmp_path: Path) -> None:
    """In a file, in the user's encoding, up to the step at which the process was killed."""
    program = (
        "import os, metaopt.train.progress as p\n"
        "bar = p.Progress(20).__enter__()\n"
        "for step in range(5): bar.update(0.5, {'lr': 0.25, 'betas': (0.9, 0.99)})\n"
        "os._exit(9)\n"
    )
    file = tmp_path / "log"
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONPATH": str(Path(__file__).parents[2])}
    with file.open("wb") as out:
        done = subprocess.run([sys.executable, "-c", program], stdout=out, stderr=out, env=environment, check=False)
    assert done.returncode == 9
    text = file.read_bytes()
    assert text.decode("ascii").splitlines() == [
        f"meta-step {step}/20  meta-loss 0.5  lr 0.25  betas (0.9, 0.99)" for step in (1, 2, 4)
    ]
    assert set(text) & set(range(32)) == {ord("\n")}


# A terminal


def test_a_terminal_shows_a_bar_with_the_meta_loss_and_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(monkeypatch, force_terminal=True, width=120)
    record = train(12).history[-1]
    assert "\x1b[" in file.getvalue()
    last = ESCAPES.sub("", file.getvalue()).splitlines()[-1]
    assert "12/12" in last
    assert "━" in last
    beta1, beta2 = record["hyper"]["betas"]
    assert f"meta-loss {record['meta_loss']:.4g}" in last
    assert f"lr {record['hyper']['lr']:.3g}  betas ({beta1:.3g}, {beta2:.3g})" in last


def test_a_narrow_terminal_shows_the_step_and_all_values_too(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(monkeypatch, force_terminal=True, width=80)
    learn = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    values = train(12, learn).history[-1]["hyper"]
    last = ESCAPES.sub("", file.getvalue()).rsplit("\r", 1)[-1]
    assert max(map(len, last.splitlines())) <= 80
    words = last.split()
    assert "12/12" in words
    assert "…" not in last
    for name in ("lr", "eps", "weight_decay"):
        assert words[words.index(name) + 1] == f"{values[name]:.3g}"


def test_the_cursor_comes_back_when_a_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(monkeypatch, force_terminal=True, width=120)
    with pytest.raises(ValueError, match="penalty"):
        train(3, {"lr": 0.05, "penalty": (0.1, constraints.positive)})
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert hide in file.getvalue()
    assert file.getvalue().rindex(show) > file.getvalue().rindex(hide)


def test_a_name_is_shown_as_it_is_also_where_rich_would_read_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(monkeypatch, force_terminal=True, width=120)
    with Progress(1) as progress:
        progress.update(0.5, {"weight[/old]": 0.25, "weight[bold]": 0.5})
    assert "weight[/old] 0.25  weight[bold] 0.5" in ESCAPES.sub("", file.getvalue())


def test_a_run_may_print_while_the_bar_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(monkeypatch, force_terminal=True, width=120)

    class Prints:
        def log(self, metrics: Any, step: int) -> None:
            print(f"saved {step}")

    before = sys.stdout
    train(3, tracker=Prints())
    assert sys.stdout is before
    text = ESCAPES.sub("", file.getvalue())
    assert [line for line in re.split(r"[\r\n]+", text) if line.startswith("saved")] == [
        "saved 0",
        "saved 1",
        "saved 2",
    ]


# A notebook


def test_a_notebook_without_widgets_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    console(monkeypatch, force_jupyter=True)
    train(3)
    assert len(capsys.readouterr().out.splitlines()) == 3


# Nothing


@pytest.mark.parametrize("kind", [{}, {"force_terminal": True}, {"force_jupyter": True}])
def test_without_progress_nothing_is_shown(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = console(monkeypatch, **kind)
    train(3, progress=False)
    captured = capfd.readouterr()
    assert captured.out == captured.err == file.getvalue() == ""


# Values in few characters


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000123456, "0.000123"),
        ((0.9, 0.999), "(0.9, 0.999)"),
        ([0.3, 0.1, 0.2], "0.1..0.3"),
        ([0.25], "0.25"),
        ({"a": 0.1, "b": 0.2}, "0.1..0.2"),
        ({"a": [0.1, 0.05], "b": [0.2, 0.01]}, "0.01..0.2"),
        (([0.8, 0.9], 0.99), "(0.8..0.9, 0.99)"),
        ([[1.0, 2.0], [3.0, 4.0]], "1..4"),
    ],
)
def test_a_value_is_shown_by_three_digits_or_its_range(value: Any, text: str) -> None:
    assert brief(value) == text


@pytest.mark.usefixtures("log")
def test_every_form_of_a_value_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    train(
        2,
        {
            "lr": PerParameter([""], Schedule(6, 0.1)),
            "betas": (Schedule(2, [0.8, 0.9]), 0.99),
            "eps": torch.full((10,), 1e-8),
        },
    )
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("lr 0.1..0.1  betas (0.8..0.9, 0.99)  eps 1e-08..1e-08")
