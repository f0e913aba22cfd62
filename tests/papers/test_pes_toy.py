"""The 2-d toy problem of PES, with larger meta-steps than the study's, and its ingredients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from experiments.pes_toy import STEPS, Config, Toy, learn, total


def test_the_start_is_that_of_the_study() -> None:
    assert total([0.0, 0.0]) == pytest.approx(2423.5, abs=0.1)


def test_training_with_the_schedule_is_gradient_descent_by_hand() -> None:
    x = torch.ones(2, requires_grad=True)
    summed = 0.0
    for t in range(STEPS):
        lr = math.exp(-1.0) * (STEPS - t) / STEPS + math.exp(0.5) * t / STEPS
        (slope,) = torch.autograd.grad(Toy().meta_loss(x, {}), x)
        x = (x - lr * slope).detach().requires_grad_()
        value = torch.sqrt(x[0] ** 2 + 5) - math.sqrt(5) + torch.sin(x[1]) ** 2 * torch.exp(-5 * x[0] ** 2)
        summed += (value + 0.25 * torch.abs(x[1] - 100)).item()
    assert total([-1.0, 0.5]) == pytest.approx(summed, rel=1e-4)


def test_pes_leaves_the_hill_and_short_windows_do_not() -> None:
    config = Config(iterations=240, meta_lr=0.02)
    assert learn(config, "PES", every=240)[-1][1] < 1000
    assert learn(replace(config, iterations=60), "TBPTT", every=60)[-1][1] > 2300
