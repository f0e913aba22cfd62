"""Influence balancing: truncated backpropagation follows the exact recursion, PES finds the optimum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.influence_balancing import OPTIMUM, Config, LinearSystem, learn, loss


def by_hand(window: int, iterations: int, lr: float) -> float:
    """Truncated backpropagation as a recursion of the state and of its derivative by theta, in float64."""
    system = LinearSystem()
    transition, direction = system.transition.double(), system.direction.double()
    state, theta = torch.ones(23, dtype=torch.float64), 0.5
    for _ in range(iterations):
        slope = torch.zeros(23, dtype=torch.float64)
        for _ in range(window):
            state = transition @ state + theta * direction
            slope = transition @ slope + direction
        theta -= lr * float((state[0] - 1.0) * slope[0])
    return theta


@pytest.mark.parametrize(
    ("name", "window", "iterations"), [("TBPTT-1", 1, 300), ("TBPTT-10", 10, 60), ("TBPTT-100", 100, 12)]
)
def test_truncated_backpropagation_is_the_exact_recursion(name: str, window: int, iterations: int) -> None:
    path = learn(Config(iterations=iterations), name)
    assert path[-1] == pytest.approx(by_hand(window, iterations, 1e-4), rel=1e-5)
    assert (path[-1] > 0.5) == (window < 100)  # short windows push theta away from the optimum


def test_pes_finds_the_optimum_and_truncated_es_does_not() -> None:
    config = Config(iterations=1500, particles=60)  # half of the way that the study goes
    assert learn(config, "PES")[-1] == pytest.approx(OPTIMUM, abs=0.01)
    assert learn(replace(config, iterations=300), "ES")[-1] > 0.55


def test_the_optimum_is_a_closed_form() -> None:
    """At the fixed point s = (I - A)^-1 theta v, of which the first entry is -6 theta."""
    assert loss(OPTIMUM) < 1e-10
    assert loss(0.5) > 1.0
