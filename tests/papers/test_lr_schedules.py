"""Schedules learned through all of training fall at its end, and train better on seeds they have not seen."""

import pytest
import torch

import metaopt
from experiments.lr_schedules import SGD, STUDY, TASK, Config, learn, network, ratio
from metaopt import Schedule
from metaopt.unroll import InnerStep


@pytest.mark.long
def test_learning_rates_of_all_weights_fall_in_the_last_ten_steps(tmp_path):
    findings = STUDY.findings(Config(quick=True, out=tmp_path))
    assert len(findings) == 6
    assert all(finding.holds is not False for finding in findings), findings
    assert [finding.holds for finding in findings].count(True) == 4
    assert "learned lr: weights" in (tmp_path / "lr_schedules.svg").read_text()


def test_every_step_and_tensor_has_a_learning_rate_of_its_own():
    learned = learn(Config(steps=30, meta_steps=2, replicas=1))
    assert list(learned.schedules) == [name for name, _ in network().named_parameters()]
    assert all(schedule.shape == (30,) for schedule in learned.schedules.values())
    assert all(len(schedule.unique()) > 20 for schedule in learned.schedules.values())


@pytest.mark.parametrize("step", [0, 17, 29])
def test_derivative_of_one_steps_rate_is_that_of_a_finite_difference(step):
    """Through the steps that follow it, in float32: a central difference of the whole training."""
    params = TASK.init(torch.Generator().manual_seed(1))
    names, rates = list(params), torch.full((30,), 0.05, dtype=torch.float64)
    hyper = metaopt.Hyperparameters(SGD, {"lr": metaopt.PerParameter(names, Schedule(30, 0.05))})
    metaopt.metagrad.Unrolled(30).backward(TASK, SGD, hyper, torch.Generator().manual_seed(0))

    def meta_loss(change: float) -> float:
        changed = rates.clone()
        changed[step] *= 1 + change
        values = {"lr": {name: Schedule.of(changed if name == "2.weight" else rates) for name in names}}
        generator, inner = torch.Generator().manual_seed(0), InnerStep(TASK, SGD)
        with torch.no_grad():
            carry = inner.init(values, generator)
            for t in range(30):
                carry, _ = inner(carry, TASK.batch(t, generator), values, t)
            return TASK.meta_loss(carry.params, {}).item()

    # The parameter is the logarithm: a relative change of the rate.
    slope = (meta_loss(0.2) - meta_loss(-0.2)) / 0.4
    assert hyper.lr.grad[names.index("2.weight"), step].item() == pytest.approx(slope, rel=0.05)


def test_ratio_compares_the_last_ten_steps_with_the_fifth_in_the_middle():
    schedule = torch.ones(100)
    schedule[40:60], schedule[90:] = 4.0, 2.0
    assert ratio(schedule) == 0.5


@pytest.mark.parametrize(("name", "value"), [("steps", 29), ("meta_steps", 0), ("start", 0.0)])
def test_bad_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{name}={value}"):
        Config(**{name: value})
