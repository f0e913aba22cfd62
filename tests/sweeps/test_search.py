"""Searches: how many trials there are, where they go, and which are stopped early."""

from __future__ import annotations

import sys

import pytest
import yaml

from tests.sweeps.sweeping import Sweeping

SEARCH = """
program: program.py
method: {method}
run_cap: {cap}
metric: {{name: score, goal: maximize{target}}}
parameters: {{x: {{min: -1.0, max: 1.0}}, kind: {{values: [a, b]}}}}
"""
SCORE = """
import argparse, json, os

parser = argparse.ArgumentParser()
parser.add_argument("--x", type=float)
parser.add_argument("--kind")
config = parser.parse_args()
with open(os.environ["METAOPT_RECORD"], "a") as file:
    file.write(json.dumps({"score": -((config.x - 0.5) ** 2) - (config.kind == "a")}) + "\\n")
"""
EARLY = """
program: program.py
method: grid
metric: {name: validation.loss}
parameters: {model: {parameters: {level: {values: [1, 2, 100]}}}}
early_terminate: {type: hyperband, min_iter: 3, eta: 2}
command: ["${interpreter}", "${program}"]
"""
# A program that knows nothing but wandb. Only the bad one waits to be stopped.
SLOW = """
import time, wandb

run = wandb.init()
level = run.config.model["level"]
for step in range(5):
    run.log({"validation": {"loss": level / (step + 1)}})
time.sleep(30 if level == 100 else 0)
"""


def test_run_cap_is_kept_by_workers_that_start_together(tmp_path):
    sweeping = Sweeping(tmp_path, SEARCH.format(method="random", cap=5, target=""), SCORE)
    code, _output, errors = sweeping.run("run", "sweep.yaml", "--workers", "4")
    assert (code, errors) == (0, "")
    assert [trial.state.name for trial in sweeping.study().trials] == ["COMPLETE"] * 5
    assert len({trial.params["x"] for trial in sweeping.study().trials}) == 5


def test_bayes_finds_what_is_better_and_stops_at_the_target(tmp_path):
    sweeping = Sweeping(tmp_path, SEARCH.format(method="bayes", cap=60, target=", target: -0.02"), SCORE)
    code, _output, errors = sweeping.run("run", "sweep.yaml", "--workers", "2")
    assert (code, errors) == (0, "")
    values = [trial.value for trial in sweeping.study().trials]
    assert max(values) >= -0.02
    assert len(values) < 60
    assert sum(value >= -0.02 for value in values) <= 2  # the other worker's last one may be good too


def test_hyperband_stops_a_program_that_only_logs_to_wandb(tmp_path):
    pytest.importorskip("wandb")
    sweeping = Sweeping(tmp_path, EARLY, SLOW)
    code, _output, errors = sweeping.run("run", "sweep.yaml", WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0.2")
    assert (code, errors) == (0, "")
    good, fair, bad = sweeping.study().trials
    assert [trial.state.name for trial in (good, fair, bad)] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert good.value == 0.2
    assert good.intermediate_values == {step: 1 / (step + 1) for step in range(5)}
    assert len(bad.intermediate_values) >= 3


def test_wandbs_engine_gets_the_file_as_it_is_and_its_agents_run_the_trials(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    text = SEARCH.format(method="bayes", cap=3, target="") + "project: mine\n"
    sweeping = Sweeping(tmp_path, text)
    told = []

    class Agent:
        def __init__(self, words):
            told.append(words)

        def wait(self):
            return len(told)

    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "sweep", lambda config, **where: told.append((config, where)) or "abc")
    monkeypatch.setattr("metaopt.sweeps.server.subprocess.Popen", Agent)
    code, _output, errors = sweeping.call("run", "sweep.yaml", "--engine", "wandb", "--workers", "2")
    assert (code, errors) == (3, "")
    agent = [sys.executable, "-m", "wandb", "agent", "--project", "mine", "abc"]
    assert told == [(yaml.safe_load(text), {"entity": None, "project": "mine"}), agent, agent]
