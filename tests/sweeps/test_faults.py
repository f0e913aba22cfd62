"""What a user or a machine does wrong is said in one line, and costs nothing that was recorded."""

from __future__ import annotations

import sqlite3
from collections import Counter

import pytest

from tests.sweeps.sweeping import PROGRAM, RECORD, Sweeping

KINDS = """
program: program.py
method: grid
metric: {name: loss}
parameters: {kind: {values: [raises, diverges, fine, killed, silent]}}
"""
BY_KIND = """
import json, os, sys

def log(loss):
    with open(os.environ["METAOPT_RECORD"], "a") as file:
        file.write(json.dumps({"loss": loss}) + "\\n")

match sys.argv[1]:
    case "--kind=raises":
        import atexit  # wandb says good-bye after the traceback, in colours
        atexit.register(print, "\\n\\x1b[1;34mwandb\\x1b[0m: Find logs at: \\x1b[1;35mhere\\x1b[0m\\n", file=sys.stderr)
        print("a word before")
        raise RuntimeError("no such [luck]")
    case "--kind=diverges":
        log(1.0)
        log(float("nan"))
    case "--kind=overflows":
        log(float("-inf"))
    case "--kind=fine":
        log(2.0)
        log(0.5)
    case "--kind=killed":
        os.kill(os.getpid(), 9)
"""
# Each trial needs some pages in the database, which gets no more of them once two programs have run.
LONG = f"""
program: program.py
method: random
run_cap: 4
metric: {{name: validation/loss}}
parameters: {{number: {{min: 0, max: 3}}, text: {{value: {"x" * 9000}}}}}
command: ["${{interpreter}}", "${{program}}", "${{args_json}}"]
"""
FULL = """
import sqlalchemy
from pathlib import Path
@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def limit(connection, record):
    if len(list(Path().glob("runs/sweeps/sweep/trials/*/result.json"))) >= 2:
        connection.execute("PRAGMA max_page_count = 1")
"""


AWAY = """
from pathlib import Path
import optuna
present = optuna.storages.RDBStorage.get_trial
def get_trial(storage, number):
    if Path("away").exists():
        raise optuna.exceptions.StorageInternalError("no route to host")
    return present(storage, number)
optuna.storages.RDBStorage.get_trial = get_trial
"""


@pytest.fixture
def sweeping(tmp_path):
    return Sweeping(tmp_path)


def one_line(errors: str) -> str:
    """The only line of the errors."""
    (line,) = errors.splitlines()
    return line


def test_a_program_that_fails_is_recorded_with_its_last_words_and_the_others_run(tmp_path):
    sweeping = Sweeping(tmp_path, KINDS, BY_KIND)
    code, output, errors = sweeping.run("run", "sweep.yaml", "--workers", "2")
    assert (code, errors) == (0, "")
    assert output.splitlines()[-1] == (
        "2 complete, 3 failed; best loss 0.5 (trial 2); "
        "what failed stays so: metaopt sweep resume --retry-failed runs it once more"
    )
    raised, diverged, fine, killed, silent = sweeping.study().trials
    assert raised.user_attrs["error"].splitlines()[0] == "the program ended with exit code 1"
    assert raised.user_attrs["error"].splitlines()[1] == "a word before"
    assert raised.user_attrs["error"].splitlines()[-1] == "RuntimeError: no such [luck]"
    assert "RuntimeError" in (sweeping.trials() / "0/output.log").read_text()
    assert (diverged.value, fine.value) == (float("inf"), 0.5)
    assert killed.user_attrs["error"] == "the program was killed by SIGKILL"
    assert "without having logged 'loss'" in silent.user_attrs["error"]

    code, output, errors = sweeping.call("status", "sweep.yaml")
    assert (code, errors) == (0, "")
    assert "best loss 0.5: trial 2, kind=fine" in output
    assert "exit code 1 (RuntimeError: no such [luck])" in output
    code, output, errors = sweeping.call("show", "sweep.yaml")
    assert (code, errors) == (0, "")
    assert "the best of 2 complete trials" in output
    assert "importance of parameters: kind" in output
    assert (tmp_path / "runs/sweeps/sweep/sweep.svg").stat().st_size > 1000

    # A second start, and a file that says something else, would mix up two sweeps.
    code, output, errors = sweeping.call("run", "sweep.yaml")
    assert "has been started already: go on with metaopt sweep resume" in one_line(errors)
    (tmp_path / "sweep.yaml").write_text(KINDS.replace("silent", "quiet").replace("loss", "error"))
    code, output, errors = sweeping.call("resume", "sweep.yaml")
    assert (code, output) == (1, "")
    assert one_line(errors).startswith("metaopt: metric and parameters changed in the file since sweep 'sweep'")


def test_a_sweep_whose_every_value_is_not_finite_has_found_nothing(tmp_path):
    sweeping = Sweeping(
        tmp_path, KINDS.replace("raises, diverges, fine, killed, silent", "diverges, overflows"), BY_KIND
    )
    code, output, errors = sweeping.run("run", "sweep.yaml", "--workers", "2")
    assert (code, errors) == (1, "")
    assert output.splitlines()[-1] == "2 complete; best loss not finite (trial 0)"
    assert "best loss not finite: trial 0, kind=diverges" in sweeping.call("status", "sweep.yaml")[1]
    code, output, errors = sweeping.call("show", "sweep.yaml")
    assert (code, errors) == (0, "")
    assert output.splitlines()[-1] == "no trial has a finite loss: importance of parameters not known"
    assert not (tmp_path / "runs/sweeps/sweep/sweep.svg").exists()


def test_what_failed_is_run_once_more_if_that_is_asked_for(tmp_path):
    sweeping = Sweeping(tmp_path, KINDS.replace("raises, diverges, fine, killed, silent", "raises, killed"), BY_KIND)
    code, output, errors = sweeping.run("run", "sweep.yaml", "--workers", "2")
    assert (code, errors) == (1, "")
    assert output.splitlines()[-1].startswith("2 failed; what failed stays so: ")
    (tmp_path / "program.py").write_text(BY_KIND.replace("raise RuntimeError", "log(3.0) #"))
    code, output, errors = sweeping.run("resume", "sweep.yaml", "--retry-failed", "--workers", "2")
    assert (code, errors) == (0, "")
    assert output.splitlines()[-1].startswith("1 complete, 1 failed; best loss 3 (trial 0); what failed stays so: ")
    assert [trial.user_attrs["config"]["kind"] for trial in sweeping.study().trials] == ["raises", "killed"] * 2


def test_a_full_disk_ends_the_sweep_and_resume_finishes_it(tmp_path):
    sweeping = Sweeping(tmp_path, LONG)
    code, output, errors = sweeping.run("run", "sweep.yaml", "--patience", "1", before=FULL)
    assert code == 1
    assert "sweep.db cannot be used: database or disk is full" in errors
    assert errors.splitlines()[-1].endswith("go on with metaopt sweep resume when it does")
    assert "Traceback" not in errors
    code, output, errors = sweeping.run("resume", "sweep.yaml")
    assert (code, errors) == (0, "")
    assert "4 complete" in output
    assert sweeping.lives().total() == 4


def test_results_without_their_database_are_said_to_be_that_by_every_command(sweeping, tmp_path):
    place = tmp_path / "runs/sweeps/sweep"
    place.mkdir(parents=True)
    code, output, errors = sweeping.call("resume", "sweep.yaml")
    assert (code, output) == (1, "")
    assert one_line(errors) == "metaopt: sweep 'sweep' has not been started: metaopt sweep run does that"
    (place / "study.json").write_text('"of a sweep whose database was removed"')
    for command in ("run", "resume", "status", "show"):
        code, output, errors = sweeping.call(command, "sweep.yaml")
        assert (code, output) == (1, "")
        assert one_line(errors) == (
            "metaopt: runs/sweeps/sweep holds the trials of a sweep, but not its database sweep.db: "
            "name that one with --storage, put it back, or move the folder away and start anew"
        )
        assert [path.name for path in place.iterdir()] == ["study.json"]


def test_a_locked_database_is_said_in_one_line(tmp_path):
    sweeping = Sweeping(tmp_path)
    (tmp_path / "runs/sweeps/sweep").mkdir(parents=True)
    connection = sqlite3.connect(tmp_path / "runs/sweeps/sweep/sweep.db")
    connection.execute("BEGIN EXCLUSIVE")
    code, output, errors = sweeping.call("run", "sweep.yaml", "--patience", "1")
    connection.close()
    assert (code, output) == (1, "")
    assert one_line(errors).endswith("sweep.db cannot be used: database is locked")


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (("program.py", "missing.py"), ("run", "sweep.yaml"), "program: there is no file missing.py in "),
        (('"${interpreter}"', "nosuch"), ("run", "sweep.yaml"), "command: there is no program nosuch"),
        (("", ""), ("run", "none.yaml"), "none.yaml: No such file or directory"),
        (("", ""), ("run", "sweep.yaml", "--workers", "0"), "workers must be >= 1, got 0"),
        (("", ""), ("run", "sweep.yaml", "--storage", "mysql://a:b@c/d"), "storage must be sqlite:///FILE or "),
        (("", ""), ("status", "sweep.yaml"), "sweep 'sweep' has not been started: metaopt sweep run does that"),
        (("", ""), ("run", "sweep.yaml", "--engine", "wandb"), "--engine wandb needs an account at wandb's server"),
    ],
)
def test_bad_input_is_said_in_one_line_and_leaves_nothing_behind(sweeping, tmp_path, monkeypatch, change, words, said):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    sweeping.file(lambda text: text.replace(*change))
    code, output, errors = sweeping.call(*words)
    assert (code, output) == (1, "")
    assert one_line(errors).startswith(f"metaopt: {said}")
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.yaml", "program.py"}


def test_a_database_that_comes_back_gets_the_result_that_was_ready_and_nothing_is_run_again(tmp_path):
    sweeping = Sweeping(tmp_path, program=PROGRAM + RECORD + "if config['number'] == 2:\n    Path('away').touch()\n")
    sweeping.file(lambda text: text.replace("[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]", "[0, 1, 2, 3]"))
    command = sweeping.start("run", "sweep.yaml", before=AWAY)
    line = command.stderr.readline()
    (tmp_path / "away").unlink()
    output, errors = command.communicate(timeout=60)
    assert line.endswith("sweep.db cannot be used: no route to host\n")
    assert (command.returncode, errors) == (0, "")
    assert output.splitlines()[-1] == "4 complete; best validation/loss 1 (trial 4)"  # 3 is what went on with 2
    assert sweeping.lives() == Counter(range(4))
