"""The learning rate of SGD on MNIST-1D is learned from either side, and where it goes is where the loss is lowest."""

import pytest
import torch
from torch import nn

from experiments.mnist1d_lr import STUDY, Config, descend
from metaopt.tasks import load_mnist1d


def test_learning_rate_ends_near_the_published_one_from_either_side(tmp_path):
    findings = STUDY.findings(Config(quick=True, out=tmp_path))
    assert len(findings) == 3
    assert all(finding.holds for finding in findings), findings
    assert "published: 0.62" in (tmp_path / "mnist1d_lr.svg").read_text()


def plain_training(lr: float, steps: int) -> float:
    """The study's inner loop in plain torch: the mean of the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    train, total = load_mnist1d().train, 0.0
    for step in range(steps):
        rows = slice(50 * step % 4000, 50 * step % 4000 + 50)
        loss = nn.functional.cross_entropy(model(train.images[rows]), train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / steps
    return total


def test_meta_loss_and_its_gradient_are_those_of_plain_torch_training():
    descent = descend(0.5, Config(steps=100, meta_steps=1, meta_lr=0.3))
    slope = (plain_training(0.505, 100) - plain_training(0.495, 100)) / 0.01
    assert descent.losses[0] == pytest.approx(plain_training(0.5, 100), rel=1e-5)
    assert (descent.rates[0] - descent.rates[1]) / 0.3 == pytest.approx(slope, rel=0.01)


def test_published_rate_has_a_lower_loss_than_its_neighbours_in_plain_torch():
    low, published, high = (plain_training(lr, 200) for lr in (0.5, 0.62, 0.75))
    assert published < low
    assert published < high


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("meta_steps", 0), ("meta_lr", 0.0)])
def test_bad_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{name}={value}"):
        Config(**{name: value})
