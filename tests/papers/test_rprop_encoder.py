"""Rprop learns the 10-5-10 encoder as fast as published, and in as many epochs as torch's own."""

import pytest
import torch

import metaopt
from experiments.rprop_encoder import STUDY, Config, Encoder, epochs_needed


def test_rprop_needs_about_25_epochs_and_backpropagation_more_than_three_times_as_many(tmp_path):
    findings = STUDY.findings(Config(quick=True, out=tmp_path, epochs=250))
    assert len(findings) == 4
    assert all(finding.holds for finding in findings), findings
    assert "Rprop" in (tmp_path / "rprop_encoder.svg").read_text()


@pytest.mark.parametrize("name", ["Rprop", "SGD"])
def test_trials_side_by_side_need_the_epochs_that_torchs_optimizer_needs_on_each(name):
    task, generator = Encoder(), torch.Generator().manual_seed(3)
    lr = {"Rprop": 0.1, "SGD": 2.0}[name]
    expected = []
    for _ in range(4):
        params = {key: value.requires_grad_() for key, value in task.init(generator).items()}
        optimizer = getattr(torch.optim, name)(params.values(), lr=lr)
        for epoch in range(200):
            if task.learned(params):
                expected.append(epoch)
                break
            optimizer.zero_grad()
            task.loss(params, task.patterns, {}).backward()
            optimizer.step()
    assert len(expected) == 4
    opt = getattr(metaopt.functional, name.lower())(lr=lr)
    assert epochs_needed(opt, Config(trials=4, epochs=200, seed=3)).tolist() == expected


@pytest.mark.parametrize("name", ["trials", "epochs"])
def test_bad_options_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got {name}=0"):
        Config(**{name: 0})
