"""The main job runs from end to end, and says what it did."""

import json
import math

import pytest
import torch

from experiments import hyperopt
from experiments.parts import table
from experiments.parts.evaluation import read
from experiments.parts.running import random_search
from experiments.parts.space import RADAM, RPROP, LogUniform, cosine, draw, fill
from metaopt import functional
from metaopt.tasks import NoisyQuadratic


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    out = tmp_path_factory.mktemp("hyperopt")
    config = hyperopt.Config(task="quadratic", steps=8, meta_steps=5, replicas=2, seeds=6, out=out)
    return config, hyperopt.main(config)


def test_every_comparison_is_in_the_table(outcome):
    config, results = outcome
    assert list(results) == ["radam", "rprop"]
    for rows in results.values():
        assert [row.contender.name for row in rows] == [
            "torch's defaults",
            "random search, scalars",
            "random search, scalars, cosine",
            "random search, per step and parameter",
            "learned, scalars",
            "learned, per step and parameter",
        ]
        assert {row.contender.trainings for row in rows[1:]} == {config.meta_steps * config.replicas}
        assert all(row.loss.shape == row.loss_twice.shape == (config.seeds,) for row in rows)
        assert all(row.curve.shape == (config.steps + 1, config.seeds) for row in rows)
    assert table.make(results, config.steps, config.seeds).row_count == 14


def test_defaults_are_torchs(outcome):
    """What the table calls torch's defaults is what torch's own optimizer reaches from the same start."""
    config, results = outcome
    task = NoisyQuadratic()
    generator = torch.Generator().manual_seed(1_000_000)
    starts = [task.init(generator) for _ in range(config.seeds)]
    batches = [[task.batch(step, generator) for _ in range(config.seeds)] for step in range(config.steps)]
    for seed, start in enumerate(starts):
        p = start.clone().requires_grad_()
        optimizer = torch.optim.RAdam([p])
        for step in range(config.steps):
            optimizer.zero_grad()
            task.loss(p, batches[step][seed], {}).backward()
            optimizer.step()
        torch.testing.assert_close(results["radam"][0].loss[seed], task.meta_loss(p.detach(), {}), rtol=1e-5, atol=1e-7)


def test_record_holds_learning_trials_and_evaluation(outcome):
    config, results = outcome
    lines = [json.loads(line) for line in (config.out / "record.jsonl").read_text().splitlines()]
    by_study = {}
    for line in lines:
        if "kind" in line:  # curves and artifacts
            continue
        by_study.setdefault((line["optimizer"], line["study"]), []).append(line)
    for optimizer, rows in results.items():
        for space in ("scalars", "per step and parameter"):
            learned = by_study[optimizer, f"learned, {space}"]
            assert [line["step"] for line in learned] == list(range(config.meta_steps))
            assert all(math.isfinite(line["meta_loss"]) and line["grad_norm"] > 0 for line in learned)
            trials = by_study[optimizer, f"random search, {space}"]
            assert [t["meta_loss"] for t in trials] == sorted(t["meta_loss"] for t in trials)
        evaluated = by_study[optimizer, "evaluation"]
        assert [line["test_loss"] for line in evaluated] == [row.loss.tolist() for row in rows]
        # What was written is what was judged: plain numbers, schedules of one float per step.
        key = {"radam": "lr", "rprop": "step_sizes"}[optimizer]
        schedules = evaluated[-1]["numbers"][key]
        schedule = schedules if optimizer == "radam" else schedules[1]
        assert len(schedule[""]) == config.steps


def test_figure_is_saved(outcome):
    config, _ = outcome
    svg = (config.out / "hyperopt.svg").read_text()
    assert "radam: meta-loss" in svg
    assert "rprop: meta-loss" in svg


def test_learning_starts_at_the_middle_of_the_searched_ranges():
    config = hyperopt.Config()
    numbers = hyperopt.starts(config, "radam", ["w"], "scalars")
    assert numbers["lr"] == pytest.approx(math.sqrt(1e-3 * 1.0))
    assert numbers["betas"][0] == pytest.approx(1 - math.sqrt(0.01 * 0.9))
    assert hyperopt.starts(config, "rprop", ["w"], "scalars")["etas"] == pytest.approx((0.525, 1.1))


@pytest.mark.parametrize(("space", "make"), [(RADAM, functional.radam), (RPROP, functional.rprop)])
def test_every_draw_lies_in_the_optimizers_domain(space, make):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        opt = make(**fill(space, lambda key, part: draw(part, generator)))  # raises outside
    assert set(space) == set(opt.hyperparameters)


def test_log_uniform_is_uniform_in_the_logarithm():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([draw(LogUniform(1e-4, 1.0), generator) for _ in range(4000)])
    below = [(draws < 10.0**-k).double().mean().item() for k in (1, 2, 3)]
    assert below == pytest.approx([0.75, 0.5, 0.25], abs=0.03)


def test_random_search_finds_the_best_of_its_draws():
    """On a quadratic without noise the meta-loss of an lr is known: ((1 - lr h)^steps x)^2 h / 2."""
    task = NoisyQuadratic(dimension=1, noise=0.0)
    rates = iter([0.01, 0.9, 0.3, 1.9])
    trials = random_search(
        task, functional.sgd(), lambda _: {"lr": next(rates)}, dict, trials=4, steps=3, replicas=2, seed=0
    )
    assert [trial.values["lr"] for trial in trials] == [0.9, 0.3, 1.9, 0.01]


def test_cosine_falls_from_its_peak_to_zero_and_stays():
    schedule = cosine(2.0, 10)
    assert [schedule(step) for step in (0, 5, 10, 15)] == pytest.approx([2.0, 1.0, 0.0, 0.0], abs=1e-12)
    values = read({"lr": 1.0, "etas": (0.5, 1.2), "step_sizes": (1e-6, 2.0)}, "rprop", cosine_steps=10)
    assert values["step_sizes"][1](10) == 1e-6


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("seeds", 0), ("meta_lr", 0.0), ("clip", float("nan"))])
def test_bad_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{name}={value}"):
        hyperopt.Config(**{name: value})
