"""The command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from metaopt import cli, info, learned

REPOSITORY = Path(__file__).parents[1]


def call(*words: str) -> tuple[int, str]:
    """A command in this process: exit code, and all that it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(str(ended.value.code or 0)), " ".join(printed.getvalue().split())


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_help_names_the_commands_and_imports_nothing_heavy():
    printed = python(
        "import sys; from metaopt import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print(sorted({'torch', 'numpy', 'optuna', 'wandb', 'matplotlib', 'sqlalchemy'} & set(sys.modules)))"
    )
    for command in ("sweep", "info", "list"):
        assert f"• {command}" in printed
    assert printed.endswith("code 0\n[]\n")


def test_the_package_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "metaopt", "sweep", "--help"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"• {action}" in done.stdout for action in ("run", "resume", "status", "show"))


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("swep", "run"), "Available subcommands: sweep, info, list"),
        (("sweep", "strat", "a.yaml"), "Available subcommands: run, resume, status, show"),
        (("sweep", "run", "a.yaml", "--worker", "3"), "Perhaps you meant: --workers INT"),
        (("sweep", "run", "a.yaml", "--workers", "two"), "Error parsing --workers"),
        (("sweep", "run", "a.yaml", "--engine", "locl"), "invalid choice 'locl'"),
    ],
)
def test_a_wrong_word_is_answered_with_what_was_meant(words, meant):
    code, printed = call(*words)
    assert code == 2
    assert meant in printed.replace("│ ", "")


def test_info_tells_versions_and_why_a_path_is_closed(monkeypatch):
    monkeypatch.setattr("metaopt.kernels.support._installed", lambda module: False)
    monkeypatch.setattr("metaopt.info.shutil.which", lambda name: None)
    monkeypatch.setenv("COLUMNS", "200")
    code, printed = call("info")
    assert code == 0
    import numpy
    import torch

    for version in (torch.__version__, numpy.__version__, sys.version.split()[0]):
        assert version in printed
    assert 'numba is not installed: pip install "metaopt[fused]"' in printed
    assert "no C++ compiler was found" in printed


def test_list_tells_learned_optimizers_and_experiments_without_running_them(monkeypatch, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/one.py").write_text('"""What it shows.\n\nMore."""\nraise SystemExit("it was run")\n')
    (tmp_path / "experiments/__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    code, printed = call("list")
    assert code == 0
    assert info.experiments(tmp_path) == {"one": "What it shows."}
    assert "What it shows." in printed
    for name in learned.available():
        assert name in printed


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("tyro", 'metaopt: the command line needs tyro: pip install "metaopt[sweeps]"\n'),
        ("optuna", 'metaopt: sweeps need Optuna: pip install "metaopt[sweeps]"\n'),
        ("yaml", "metaopt: sweep files need PyYAML: pip install 'metaopt[sweeps]'\n"),
    ],
)
def test_a_missing_extra_is_said_in_one_line(tmp_path, missing, said):
    file = tmp_path / "sweep.yaml"
    file.write_text("{program: a.py, method: grid, parameters: {a: {value: 1}}}")
    printed = python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from metaopt import cli; cli.main(['sweep', 'status', {str(file)!r}])"
    )
    assert printed == said
