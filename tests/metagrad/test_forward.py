"""`Forward`: its arguments, closed forms and learning with it; more gradients are in `tests/unroll/test_modes.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metaopt import Hyperparameters, meta_train
from metaopt.functional import sgd
from metaopt.metagrad import Estimator, Forward, Unrolled
from metaopt.tasks import NoisyQuadratic
from tests.metagrad.reference import seeded

F64 = torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got steps=0"),
        ({"steps": -3}, "steps must be >= 1, got steps=-3"),
        ({"steps": 3, "objective": "last"}, "objective must be one of .*final.*mean.*inner.* got objective='last'"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forward(**arguments)


def test_it_is_an_estimator_with_a_repr() -> None:
    assert isinstance(Forward(3), Estimator)
    assert repr(Forward(3, "mean")) == "Forward(steps=3, objective='mean', compile=False)"


@pytest.mark.parametrize("steps", [1, 9, 300])
def test_gradient_descent_on_a_quadratic_has_the_derivative_of_the_closed_form(steps: int) -> None:
    """x_T = (1 - lr h)^T x_0."""
    task, opt = NoisyQuadratic(3, condition=10.0, noise=0.0, dtype=F64), sgd()
    hyper = Hyperparameters(opt, {"lr": 0.2})
    loss = Forward(steps).backward(task, opt, hyper, seeded())
    h, x = task.curvature, task.init(seeded())
    factor = 1 - 0.2 * h
    assert loss.shape == ()
    assert not loss.requires_grad
    assert loss.item() == pytest.approx((0.5 * h * (factor**steps * x) ** 2).sum().item(), rel=1e-10)
    slope = (h * x**2 * steps * factor ** (2 * steps - 1) * -h).sum().item()
    assert hyper.lr.grad.item() == pytest.approx(0.2 * slope, rel=1e-10)  # in the unconstrained coordinate, log(lr)


@pytest.mark.parametrize("estimator", [Forward(20), Unrolled(20, segments="sqrt"), Unrolled(20, "mean", 10, 3)])
def test_meta_training_with_it_lowers_the_meta_loss_like_recorded_unrolls(estimator: Estimator) -> None:
    runs = []
    for each in (estimator, Unrolled(20, estimator.objective, getattr(estimator, "truncation", None))):
        task, opt = NoisyQuadratic(dtype=F64), sgd(lr=0.01)
        hyper = Hyperparameters(opt, ("lr",))
        meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.3)
        result = meta_train(task, opt, hyper, each, meta_optimizer, 15, generator=seeded(), progress=False)
        runs.append(result.losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-8)
    assert sum(runs[0][-3:]) < 0.7 * sum(runs[0][:3])
