"""The study of a learned optimizer: meta-training lowers the loss, and the comparison says who wins and who loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from experiments.learned_optimizer import DESIGNS, Config, draw, meta_train, scenarios, table
from experiments.parts.study import save_figure
from experiments.parts.tuning import GRID, HAND_DESIGNED, Trained, judged, tuned


@pytest.mark.parametrize("design", [pytest.param("mlp", marks=pytest.mark.long), "adafactor"])
def test_meta_training_lowers_the_loss_at_the_end_of_training(design: str) -> None:
    config = Config(horizon=15, meta_steps=24, replicas=2, meta_lr=1e-2)
    task, steps = scenarios(config)["trained on"]
    torch.manual_seed(0)
    learned = DESIGNS[design]()
    before = judged(task, learned, "before", None, steps, 8)
    meta_train(config, learned, Console(quiet=True))
    after = judged(task, learned, "after", None, steps, 8)
    assert after.mean < before.mean - 4 * (before.error**2 + after.error**2) ** 0.5


@pytest.mark.parametrize("estimator", ["truncated", "pes"])
def test_windows_can_meta_train_too(estimator: Any) -> None:
    config = Config(horizon=10, meta_steps=4, replicas=1, estimator=estimator)
    learned = DESIGNS["adafactor"]()
    before = [p.detach().clone() for p in learned.parameters()]
    history = meta_train(config, learned, Console(quiet=True))
    assert len(history) == 4
    assert any(not torch.equal(p, old) for p, old in zip(learned.parameters(), before, strict=True))


def test_tuning_finds_the_best_of_the_grid_on_other_seeds() -> None:
    task, _ = scenarios(Config())["digits"]
    found = tuned(task, "SGD", 12, seeds=4, tuning_seeds=2)
    assert found.lr in GRID
    for lr in (GRID[3], GRID[-1]):
        assert found.mean < judged(task, HAND_DESIGNED["SGD"](), "SGD", lr, 12, 4).mean
    assert found.curve.shape == (13, 4)
    assert found.curve[-1].mean() < found.curve[0].mean()


def trained(name: str, losses: list[float], lr: float | None = None) -> Trained:
    return Trained(name, lr, torch.tensor(losses), torch.ones(3, len(losses)))


def test_a_verdict_needs_more_than_the_standard_error(tmp_path: Path) -> None:
    others = [trained(name, [1.0, 1.2, 1.1], 0.1) for name in ("SGD", "SGD, momentum .9", "Adam", "RAdam")]
    failed = trained("Rprop", [float("nan"), 1.0, 1.0], 0.1)
    found = {
        "a": [trained("learned", [0.5, 0.6, 0.7]), *others, failed],
        "b": [trained("learned", [1.05, 1.1, 1.2]), *others, failed],
        "c": [trained("learned", [2.0, 2.1, 2.2]), *others, failed],
    }
    shown = table(Config(), found)
    assert list(shown.columns[-1].cells) == ["wins", "even", "loses"]
    save_figure(tmp_path / "figure.svg", lambda figure: draw(found, figure), (14, 6))
    assert (tmp_path / "figure.svg").stat().st_size > 1000


@pytest.mark.parametrize(("name", "value"), [("horizon", 0), ("replicas", 0), ("clip", 0.0), ("meta_lr", -1.0)])
def test_bad_options_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*got {name}={value}"):
        Config(**{name: value})
