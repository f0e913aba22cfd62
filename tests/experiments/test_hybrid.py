"""Hybrid search: a trial that learns is judged as one that does not, and its steps are counted to the last."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from experiments import hybrid, hybrid_search
from experiments.hybrid_search import Trial, best_so_far, comparisons, until
from experiments.parts.session import options
from metaopt.sweeps import engine, read
from metaopt.sweeps.command import expand
from metaopt.sweeps.storage import Timing, open_storage
from metaopt.sweeps.study import create
from metaopt.tasks import MNIST1D

SMALL: dict[str, Any] = {
    "task": "mnist1d",
    "steps": 5,
    "width": 4,
    "batch_size": 10,
    "seeds": 2,
    "meta_steps": 3,
    "wandb": "off",
}
FILES = Path(hybrid_search.FILES)


# A trial


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    return [line for line in lines if "kind" not in line]


def test_a_plain_trial_is_training_by_torch(tmp_path: Path) -> None:
    """Same seeds, same batches, torch's own RAdam with its learning rate set before every step."""
    config = hybrid.Config(**SMALL, lr=0.05, beta1=0.8, decay="linear", out=tmp_path)
    figures = hybrid.main(config)
    task = MNIST1D(lambda: hybrid.network(config), batch_size=10)
    generator = torch.Generator().manual_seed(1_000_000)
    starts = [task.init(generator) for _ in range(2)]
    batches = [[task.batch(step, generator) for _ in range(2)] for step in range(5)]
    losses = []
    for seed, start in enumerate(starts):
        params = {name: p.clone().requires_grad_() for name, p in start.items()}
        optimizer = torch.optim.RAdam(params.values(), betas=(0.8, 0.999))
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 5)
            optimizer.zero_grad()
            task.loss(params, batches[step][seed], {}).backward()
            optimizer.step()
        losses.append(task.meta_loss(params, {}).item())
    assert figures["validation/loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert figures["inner_steps"] == 2 * 5
    assert rows(tmp_path)[-1]["validation/loss"] == figures["validation/loss"]


def test_learning_lowers_the_loss_and_every_step_is_counted(tmp_path: Path) -> None:
    small = SMALL | {"steps": 20, "meta_steps": 8}
    plain = hybrid.main(hybrid.Config(**small, lr=0.003, out=tmp_path / "plain"))
    config = hybrid.Config(
        **small,
        lr=0.003,
        learn=("lr", "betas"),
        per_step=("lr",),
        per_parameter=("lr",),
        replicas=2,
        meta_lr=0.5,
        out=tmp_path / "learned",
    )
    learned = hybrid.main(config)
    assert learned["validation/loss"] < plain["validation/loss"] - 0.05
    assert learned["inner_steps"] == 8 * 2 * 20 + 2 * 20
    *learning, last = rows(config.out)
    assert [row["inner_steps"] for row in learning] == [40 * step for step in range(1, 9)]
    assert last["inner_steps"] == learned["inner_steps"]
    assert [row for row in learning if "validation/loss" in row] == []  # that would be another training run
    schedules = learning[-1]["hyper"]["lr"]
    assert {len(schedule) for schedule in schedules.values()} == {20}


def test_a_trial_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SMALL | {"lr": 0.05, "learn": ("lr", "betas"), "meta_steps": 4}
    whole = hybrid.main(hybrid.Config(**options, out=tmp_path / "whole"))
    monkeypatch.setenv("METAOPT_CHECKPOINT", str(tmp_path / "checkpoint"))
    monkeypatch.setenv("METAOPT_RECORD", str(tmp_path / "record.jsonl"))
    config = hybrid.Config(**options, out=tmp_path / "out")
    log = hybrid._Counting.log

    def stopped_in_the_second(self: Any, metrics: Any, step: int) -> None:
        log(self, metrics, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(hybrid._Counting, "log", stopped_in_the_second)
        with pytest.raises(SystemExit):
            hybrid.main(config)
    assert [row["inner_steps"] for row in rows(tmp_path)] == [5, 10]
    again = hybrid.main(config)
    for name in ("validation/loss", "test/loss", "inner_steps"):
        assert again[name] == whole[name]
    # The engine reads the metric where it has told the program to write it.
    assert [row["inner_steps"] for row in rows(tmp_path)] == [5, 10, 15, 20, whole["inner_steps"]]
    assert [row.get("validation/loss") for row in rows(tmp_path)] == [*[None] * 4, whole["validation/loss"]]


# of torch: the first meta-step is skipped, and the meta-learning rate annealed all the same
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_training_that_diverges_is_counted_and_has_no_loss(tmp_path: Path) -> None:
    config = hybrid.Config(
        **SMALL | {"meta_steps": 12}, optimizer="sgd", lr=1e30, depth=2, activation="relu", learn=("lr",), out=tmp_path
    )
    figures = hybrid.main(config)
    assert math.isnan(figures["validation/loss"])
    assert 9 * 5 <= figures["inner_steps"] <= 10 * 5
    assert rows(tmp_path)[-1]["validation/loss"] == "NaN"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learn": ("momentum",)}, "learn must be among lr, betas, eps, weight_decay.* got 'momentum'"),
        ({"learn": ("lr",), "per_step": ("betas",)}, "per_step must be among learn=.*got 'betas'"),
        ({"momentum": 0.5}, "radam has no momentum, got momentum=0.5"),
        ({"lr": -1.0}, "lr"),
        ({"learn": ("lr",), "decay": "cosine"}, "needs it in per_step"),
        ({"optimizer": "rprop", "decay": "linear"}, "decay is of a learning rate per step"),
        ({"seeds": 0}, "seeds must be >= 1, got seeds=0"),
    ],
)
def test_bad_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hybrid.Config(**wrong)


@pytest.mark.parametrize(("optimizer", "names"), [("rprop", ("etas", "step_sizes")), ("sgd", ("lr", "momentum"))])
def test_other_optimizers_learn_theirs(optimizer: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    given: dict[str, Any] = {"momentum": 0.5} if optimizer == "sgd" else {"eta_plus": 1.3, "step_max": 0.1}
    config = hybrid.Config(**SMALL, **given, optimizer=optimizer, learn=names, out=tmp_path)
    assert math.isfinite(hybrid.main(config)["validation/loss"])


# The sweep files


@pytest.mark.parametrize("kind", ["random", "bayes", "hybrid"])
def test_a_sweeps_command_is_a_config(kind: str) -> None:
    sweep = read(FILES / f"{kind}.yaml")
    values = sweep.suggest(optuna.create_study().ask())
    python, module, name, *words = expand(sweep, values, "python")
    assert [python, module, name] == ["python", "-m", "experiments.hybrid"]
    config = options(hybrid.Config, None, words)
    assert config.width == values["width"]
    assert config.functional().defaults["betas"] == (values["beta1"], values["beta2"])
    assert (config.learn != ()) == (kind == "hybrid")
    if kind == "hybrid":
        assert config.learn == ("lr", "betas", "eps", "weight_decay")
        assert config.per_step == ("lr",)


def test_the_ways_search_the_same_space_and_are_judged_alike() -> None:
    random, bayes, mixed = (read(FILES / f"{kind}.yaml") for kind in ("random", "bayes", "hybrid"))
    assert random.parameters == bayes.parameters
    assert random.run_cap == bayes.run_cap
    for name in ("width", "depth", "activation"):
        assert mixed.parameters[name] == random.parameters[name]
    for name in ("steps", "seeds", "batch_size", "task", "optimizer"):
        assert not any(name in sweep.parameters for sweep in (random, bayes, mixed))


def test_learning_starts_at_the_middle_of_the_searched_ranges() -> None:
    searched, learned = read(FILES / "random.yaml").parameters, read(FILES / "hybrid.yaml").parameters
    for name in ("lr", "eps", "weight_decay"):
        low, high = searched[name].min, searched[name].max  # type: ignore[attr-defined]
        assert learned[name].value == pytest.approx(math.sqrt(low * high), rel=0.01)  # type: ignore[attr-defined]
    for name in ("beta1", "beta2"):
        low, high = searched[name].min, searched[name].max  # type: ignore[attr-defined]
        assert learned[name].value == pytest.approx((low + high) / 2)  # type: ignore[attr-defined]


# The comparison


NAN = float("nan")
PLAIN = [Trial(2.0, 2.1, 300, 1.0), Trial(NAN, NAN, 300, 1.0), Trial(1.5, 1.7, 300, 2.0), Trial(1.6, 1.4, 300, 1.0)]
HYBRID = [Trial(1.55, 1.5, 800, 4.0), Trial(1.4, 1.45, 800, 5.0)]


def test_the_best_so_far_and_what_all_trials_took() -> None:
    course = best_so_far(PLAIN)
    assert [best.validation_loss for best in course] == [2.0, 2.0, 1.5, 1.5]
    assert [best.test_loss for best in course] == [2.1, 2.1, 1.7, 1.7]  # of the trial that validation chose
    assert [best.inner_steps for best in course] == [300, 600, 900, 1200]
    assert [best.seconds for best in course] == [1.0, 2.0, 4.0, 5.0]
    assert best_so_far([Trial(NAN, NAN, 7, 1.0)])[0].validation_loss == math.inf


def test_steps_until_a_loss_is_found() -> None:
    assert until(PLAIN, 1.5) == Trial(1.5, 1.7, 900, 4.0)
    assert until(PLAIN, 1.49) is None
    assert until(HYBRID, 1.5) == Trial(1.4, 1.45, 1600, 9.0)


def test_equal_losses_are_compared_by_the_median_hybrid_sweep() -> None:
    late, never = [Trial(1.7, 1.7, 800, 1.0)] * 4 + HYBRID, [Trial(1.6, 1.6, 800, 1.0)]
    sweeps = {"random": [PLAIN], "bayes": [PLAIN[:1]], "hybrid": [HYBRID, late, never]}
    random, bayes = comparisons(sweeps)
    assert [None if trial is None else trial.inner_steps for trial in random.hybrid] == [1600, 4800, None]
    assert (random.loss, random.to_it.inner_steps, random.whole.inner_steps) == (1.5, 900, 1200)
    assert random.steps == 4800
    assert bayes.steps == 800
    assert hybrid_search.equal_losses([random])[1] == (
        *("random", "0", "1.500", "1,200", "900", "1,600, 4,800, not found", "4.00", "5.33", "5", "9, 13, -"),
    )


# of Optuna: nothing runs here that would beat
@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_trials_are_read_from_the_sweeps_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = engine.named(read(FILES / "random.yaml"), FILES / "random.yaml")
    engine.folder(sweep).mkdir(parents=True)
    study = create(sweep, open_storage(engine.default_storage(sweep), Timing(), create=True))
    first, second, third = (study.ask() for _ in range(3))
    expected = []
    for trial, loss in ((second, 1.5), (first, 1.25)):  # in the order in which they end
        study.tell(trial, loss)
        folder = engine.folder(sweep) / "trials" / str(trial.number)
        folder.mkdir(parents=True)
        row = {"step": 0, "validation/loss": loss, "test/loss": 2 * loss, "inner_steps": 300, "seconds": 0.5}
        (folder / "record.jsonl").write_text(json.dumps(row) + "\n")
        expected.append(Trial(loss, 2 * loss, 300, 0.5))
    study.tell(third, state=optuna.trial.TrialState.FAIL)
    assert hybrid_search.found(sweep) == expected


def test_the_study_prints_its_tables_and_saves_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"random": PLAIN, "bayes": PLAIN[:3], "hybrid": HYBRID}
    monkeypatch.setattr(hybrid_search, "search", lambda kind, repeat, config: found[kind])
    compared = hybrid_search.main(hybrid_search.Config(repeats=2, out=tmp_path, wandb="off"))
    assert [(one.kind, one.repeat, one.steps) for one in compared] == [
        *(("random", repeat, 1600) for repeat in (0, 1)),
        *(("bayes", repeat, 1600) for repeat in (0, 1)),
    ]
    assert "1,600, 1,600" in capsys.readouterr().out
    assert "inner training steps" in (tmp_path / "hybrid_search.svg").read_text()
    table = (tmp_path / "table.md").read_text()
    assert "| random | 1 | 4 | 1,200 | 5 | 1.500 | 1.700 |" in table
    assert "| bayes | 0 | 1.500 | 900 | 900 | 1,600, 1,600 | 1.78 | 1.78 | 4 | 9, 9 |" in table
    (line,) = (tmp_path / "record.jsonl").read_text().splitlines()
    assert json.loads(line)["content"]["hybrid"][1][0]["inner_steps"] == 800
