"""What is taken up next, what was cut off, and what is given up."""

from __future__ import annotations

import os
import subprocess
import sys

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from metaopt.sweeps import SweepError, engine, parse, process
from metaopt.sweeps.storage import Timing, open_storage
from metaopt.sweeps.study import DEATHS, Queue, create, deaths, find, latest, outcome, recover, retry_failed, root, size
from tests.sweeps.sweeping import REPOSITORY

GRID = """
name: one
program: a.py
method: grid
metric: {name: loss}
parameters: {x: {values: [1, 2, 3]}, kind: {values: [a, b]}}
"""
ELSEWHERE = {"machine": "another", "pid": 1, "born": 1}


@pytest.fixture
def storage(tmp_path):
    return open_storage(f"sqlite:///{tmp_path / 'sweep.db'}", Timing(heartbeat=1), create=True)


def take(study: optuna.Study, worker: process.Mark | None) -> optuna.Trial:
    """A trial that runs; its worker may have died before it said that it runs it."""
    with pytest.warns(UserWarning, match="Heartbeat of storage is supposed to be used with Study.optimize"):
        trial = study.ask()
    if worker is not None:
        trial.set_user_attr("worker", {"trial": trial.number, **worker})
    return trial


def started(storage, text: str = GRID) -> tuple[optuna.Study, Queue]:
    sweep = parse(text)
    create(sweep, storage)
    study = find(sweep, storage)
    return study, Queue(study, sweep)


def test_a_grid_is_every_point_once_and_then_nothing(storage):
    study, queue = started(storage)
    seen = []
    while queue.ready():
        assert queue.ready()  # asking twice adds nothing
        trial = take(study, process.mark(os.getpid()))
        seen.append(tuple(trial.user_attrs["config"][name] for name in ("x", "kind")))
        study.tell(trial, 0.0)
    assert sorted(seen) == [(x, kind) for x in (1, 2, 3) for kind in "ab"]
    assert size(parse(GRID)) == len(seen)
    assert size(parse(GRID + "run_cap: 4")) == 4


def test_what_was_cut_off_is_queued_once_with_its_configuration_and_root(storage):
    study, queue = started(storage)
    assert queue.ready()
    first = take(study, None)
    for _ in range(2):
        recover(study)
        recover(study)
        (again,) = study.get_trials(states=(TrialState.WAITING,))
        assert root(again) == first.number
        assert again.user_attrs["config"] == first.user_attrs["config"]
        assert queue.ready()
        assert len(study.get_trials(states=(TrialState.WAITING,))) == 1
        take(study, None)


def test_a_running_trial_is_left_alone_while_its_worker_lives(storage):
    study, queue = started(storage)
    queue.ready()
    trial = take(study, process.mark(os.getpid()))
    recover(study)
    assert study.trials[trial.number].state is TrialState.RUNNING


def test_a_trial_of_another_machine_is_given_up_when_its_heart_stops(storage):
    study, queue = started(storage)
    queue.ready()
    trial = take(study, ELSEWHERE)
    storage.record_heartbeat(trial._trial_id)
    recover(study)
    assert study.trials[trial.number].state is TrialState.RUNNING
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-5 seconds')"))
    recover(study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_a_trial_that_kills_its_workers_is_given_up(storage):
    study, queue = started(storage)
    for _ in range(DEATHS):
        assert queue.ready()
        take(study, None)
        recover(study)
    trials = latest(study.trials)
    assert [outcome(trial) for trial in trials.values()] == ["failed"]
    assert len(study.trials) == DEATHS


def test_a_trial_that_is_stopped_again_and_again_is_not(storage):
    study, queue = started(storage)
    for stops in range(1, DEATHS + 3):
        assert queue.ready()
        trial = take(study, process.mark(os.getpid()))
        trial.set_user_attr("stops", stops)
        study.tell(trial, state=TrialState.FAIL)
        recover(study)
    assert [outcome(trial) for trial in latest(study.trials).values()] == ["waiting"]


def test_what_failed_is_queued_once_more_and_its_own_fault_killed_no_worker(storage):
    study, queue = started(storage, GRID.replace("[1, 2, 3]", "[1]").replace("[a, b]", "[a]"))
    assert queue.ready()
    trial = take(study, process.mark(os.getpid()))
    trial.set_user_attr("error", "the program ended with exit code 1")
    study.tell(trial, state=TrialState.FAIL)
    assert not queue.ready()
    retry_failed(study)
    retry_failed(study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert queue.ready()
    again = take(study, process.mark(os.getpid()))
    assert again.user_attrs["config"] == trial.user_attrs["config"]
    study.tell(again, state=TrialState.FAIL)  # its worker dies
    assert [(outcome(last), deaths(last), root(last)) for last in latest(study.trials).values()] == [("cut off", 1, 0)]


def test_a_study_is_found_by_those_who_search_for_the_same(storage):
    started(storage)
    assert find(parse(GRID + "run_cap: 9"), storage).user_attrs["text"] == GRID
    with pytest.raises(SweepError, match="method changed in the file"):
        find(parse(GRID.replace("grid", "random")), storage)
    with pytest.raises(SweepError, match="has been started already"):
        create(parse(GRID), storage)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("../../../evil", "evil"), ("--storage=x", "storage-x"), ("..", "sweep"), ("a-b.c", "a-b.c"), ("a/b", "a-b")],
)
def test_results_are_in_a_folder_that_is_neither_hidden_nor_elsewhere_nor_an_option(name, folder):
    assert engine.folder(parse(GRID.replace("one", name))) == engine.FOLDER / folder


def test_sweeps_know_nothing_of_the_rest_of_the_package():
    code = "import sys, metaopt.sweeps.engine, metaopt.sweeps.report; print('torch' in sys.modules, *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    torch, *modules = done.stdout.split()
    assert torch == "False"
    ours = {name for name in modules if name.startswith("metaopt.")}
    assert {name for name in ours if not name.startswith("metaopt.sweeps")} == set()
