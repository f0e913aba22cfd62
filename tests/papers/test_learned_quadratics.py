"""A learned optimizer on random quadratics, in a form of seconds."""

from __future__ import annotations

import pytest
import torch

from experiments.learned_quadratics import FAMILY, Config, curve, meta_train
from metaopt.functional import sgd
from metaopt.learned import MLPOptimizer


def test_the_loss_before_training_is_that_of_the_study() -> None:
    """``E|W x - y|^2 = 10 (1 + 10 start^2)`` for normal W and y and x = start N(0, 1)."""
    losses = curve(sgd(lr=0.0), Config(steps=1, held_out=20_000))
    assert losses[0] == losses[1] == pytest.approx(10 * (1 + 10 * FAMILY.start**2), rel=0.02)


@pytest.mark.long
def test_meta_training_lowers_the_loss_of_tasks_that_it_never_saw() -> None:
    config = Config(meta_steps=40, steps=60, tasks=32, quick=True)
    torch.manual_seed(config.seed)
    untrained = curve(MLPOptimizer(step_scale=0.1, magnitude_scale=1.0), config)
    learned = curve(meta_train(config), config)
    assert learned[-1] < 0.5 * untrained[-1]
    assert learned[-1] < 1.0
