"""Sweeps whose workers are killed: every point is run once, and what was cut off goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.sweeps.sweeping import GRID, PROGRAM, WANDB, Sweeping, gone, kill_group, parent, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


def test_a_killed_worker_takes_its_program_along_and_the_trial_goes_on(tmp_path):
    sweeping = Sweeping(tmp_path, program=PROGRAM + WANDB)
    command = sweeping.start("run", "sweep.yaml", "--workers", "2", "--heartbeat", "1")
    program = sweeping.reached()
    os.kill(parent(program), signal.SIGKILL)
    wait_for(lambda: gone(program), seconds=2)
    output, errors = command.communicate(timeout=60)
    assert command.returncode == 0, errors
    assert errors.strip() == "a worker was killed by SIGKILL; its trial goes on in a new one"
    assert "12 complete; best validation/loss 0 (trial 4)" in output
    sweeping.check_complete()


def test_resume_goes_on_after_everything_was_killed(tmp_path):
    sweeping = Sweeping(tmp_path)
    command = sweeping.start("run", "sweep.yaml", "--workers", "2")
    program = sweeping.reached()
    kill_group(command)
    wait_for(lambda: gone(program), seconds=2)
    code, output, errors = sweeping.run("resume", "sweep.yaml", "--workers", "2")
    assert code == 0, errors
    assert "12 complete" in output
    sweeping.check_complete()


def test_ctrl_c_stops_the_program_gently_and_queues_its_trial_again(tmp_path):
    sweeping = Sweeping(tmp_path)
    command = sweeping.start("run", "sweep.yaml", "--workers", "2")
    program = sweeping.reached()
    os.killpg(command.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, errors = command.communicate(timeout=20)
    assert command.returncode == 130
    assert gone(program)
    assert "go on with metaopt sweep resume" in errors
    assert "Traceback" not in errors
    assert "cut off" not in output  # queued already
    assert (sweeping.trials() / "7/checkpoint/told").read_text() == "SIGTERM"
    assert sweeping.run("resume", "sweep.yaml", "--workers", "2")[0] == 0
    sweeping.check_complete()


def test_a_second_ctrl_c_does_not_wait_for_a_program_that_will_not_end(tmp_path):
    deaf = PROGRAM.replace('sys.exit((folder / "told").write_text("SIGTERM") and 1)', "None")
    sweeping = Sweeping(tmp_path, GRID.replace("[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]", "[7]"), deaf)
    command = sweeping.start("run", "sweep.yaml")
    program = sweeping.reached()
    os.kill(command.pid, signal.SIGINT)
    line = command.stderr.readline()
    assert line.startswith("stopping: running trials have 15 s")
    time.sleep(0.6)
    assert not gone(program)
    os.kill(command.pid, signal.SIGINT)
    command.communicate(timeout=5)
    assert command.returncode == 130
    assert wait_for(lambda: gone(program), seconds=5)
    assert sweeping.study().trials[-1].state.name == "WAITING"
