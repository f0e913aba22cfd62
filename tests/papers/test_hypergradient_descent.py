"""Hypergradient descent is the published rule, step by step, and takes a poor learning rate near the tuned one."""

import pytest
import torch

from experiments.hypergradient_descent import METHODS, STUDY, Config, descend
from metaopt.tasks import Digits


@pytest.mark.long
def test_a_poor_learning_rate_reaches_nearly_the_loss_of_the_tuned_one(tmp_path):
    findings = STUDY.findings(Config(quick=True, out=tmp_path))
    assert len(findings) == 2
    assert all(finding.holds for finding in findings), findings
    assert "Adam-HD" in (tmp_path / "hypergradient_descent.svg").read_text()


def by_hand(name: str, lr: float, beta: float, steps: int) -> list[float]:
    """The learning rate after each step, by algorithms 4 and 6 of Baydin et al., in plain torch on a flat vector."""
    task, generator = Digits(), torch.Generator().manual_seed(5)
    params, rates = task.init(generator), []
    m = v = direction = torch.zeros(())
    for t in range(steps + 1):
        leaves = {key: p.detach().requires_grad_() for key, p in params.items()}
        grads = torch.autograd.grad(task.loss(leaves, task.batch(t, generator), {}), list(leaves.values()))
        g = torch.cat([grad.flatten() for grad in grads]).double()
        if t > 0:
            lr -= beta * float(g @ direction)
            rates.append(lr)
        direction = -g
        if name == "Adam":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            direction = -(m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        pieces = direction.split([p.numel() for p in params.values()])
        params = {
            key: p + (lr * piece).reshape(p.shape).float()
            for (key, p), piece in zip(params.items(), pieces, strict=True)
        }
    return rates


@pytest.mark.parametrize("name", METHODS)
def test_every_move_of_the_learning_rate_is_that_of_the_published_rule(name):
    method = METHODS[name]
    training = descend(method, method.meta_lr, steps=20, seed=5)
    expected = by_hand(name, method.poor, method.meta_lr, steps=20)
    # The last one sees the batch of its own step again: training ends there.
    assert training.rates[:-1] == pytest.approx(expected[:-1], rel=1e-4)
    assert training.rates[-2] > 2 * method.poor


@pytest.mark.parametrize("name", ["steps", "seeds"])
def test_bad_options_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got {name}=0"):
        Config(**{name: 0})
