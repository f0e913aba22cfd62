"""Meta-gradients that are not finite: found at once, explained, skipped if that is wanted."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaopt import Hyperparameters, meta_train
from metaopt.functional import adam, radam, rprop, sgd
from metaopt.functional.optimizer import Optimizer
from metaopt.metagrad import ES, PES, Forward, Unrolled
from metaopt.tasks import NoisyQuadratic, Replicas
from metaopt.train import NonFiniteError
from metaopt.unroll.growth import growth


class Planted:
    """A quadratic with something wrong at one inner step; the noise is 0 but there."""

    def __init__(self, at: int = 37, what: str = "loss", run: int | None = None) -> None:
        self.at, self.what, self.run, self.drawn = at, what, run, 0

    def init(self, generator: Any) -> dict[str, Tensor]:
        self.drawn = 0
        return {"w": torch.full((3,), 2.0), "b": torch.ones(())}

    def batch(self, step: int, generator: Any) -> dict[str, Tensor]:
        """The size of the bad thing: 0 but in one step, of one run where there are several."""
        self.drawn += 1
        mine = self.run is None or (self.drawn - 1) % 3 == self.run
        return {"bad": torch.tensor(float(step == self.at and mine)), "noise": torch.zeros(3)}

    def loss(self, params: Any, batch: Any, hyper: Any) -> Tensor:
        value = (params["w"] ** 2).sum() + params["b"] ** 2 + batch["noise"].sum()
        bad = batch["bad"]
        if self.what == "loss":
            return value * torch.where(bad == 1, math.nan, 1.0)
        if self.what == "gradient":  # of a norm at 0: the loss is finite
            return value + bad * torch.linalg.vector_norm(params["w"] * (1 - bad)).sqrt()
        return value * torch.where(bad == 1, 1e37, 1.0) if self.what == "parameter" else value

    def meta_loss(self, params: Any, hyper: Any) -> Tensor:
        return (params["w"] ** 2).sum() + (torch.log(-params["b"].abs()) if self.what == "meta-loss" else 0.0)


def run(task: Any, opt: Optimizer | None = None, estimator: Any = None, **options: Any) -> Any:
    opt = sgd(lr=0.01) if opt is None else opt
    hyper = Hyperparameters(opt, ("lr",))
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=0.01)
    options = {"steps": 3, "progress": False, **options}
    return hyper, meta_train(task, opt, hyper, estimator or Unrolled(50), meta_optimizer, **options)


@pytest.mark.parametrize(
    ("what", "quantity"),
    [
        ("loss", "the loss is the first"),
        ("gradient", "the gradient 'w' is the first"),
        ("parameter", "the parameter 'w' is the first"),
    ],
)
def test_the_first_step_and_quantity_are_named(what: str, quantity: str) -> None:
    opt = sgd(lr=0.01) if what != "parameter" else sgd(lr=1e3)
    task = Planted(37 if what != "parameter" else 0, what)
    step = task.at
    with pytest.raises(NonFiniteError) as raised:
        run(task, opt)
    message = str(raised.value)
    assert message.startswith("meta-step 0: the meta-")
    assert f"Inner step {step} of 0..49: {quantity} that is not finite. Hyperparameters: Hyper" in message
    assert f"Hyperparameters(lr={opt.defaults['lr']:g})" in message
    assert "What usually helps: " in message


def test_a_batch_with_nan_is_named_as_data() -> None:
    class Dirty(NoisyQuadratic):
        def batch(self, step: int, generator: Any) -> Any:
            return super().batch(step, generator) * (math.nan if step == 37 else 1.0)

    with pytest.raises(NonFiniteError, match=r"Inner step 37 of 0\.\.49: the batch is the first.*cleaning the data"):
        run(Dirty())


def test_the_state_of_an_optimizer_is_named() -> None:
    """Squares of large gradients overflow in Adam's second moment before anything else does."""

    class Large(NoisyQuadratic):
        def loss(self, params: Any, batch: Any, hyper: Any) -> Tensor:
            return params.sum() * 1e25

        def meta_loss(self, params: Any, hyper: Any) -> Tensor:
            return (params**2).sum() * math.nan

    with pytest.raises(NonFiniteError, match=r"Inner step 0 of 0\.\.49: the state 'exp_avg_sq' is the first"):
        run(Large(), adam(lr=0.01))


def test_of_several_runs_the_one_is_named() -> None:
    with pytest.raises(NonFiniteError, match=r"Inner step 37 of 0\.\.49: the loss of run 1 is the first"):
        run(Replicas(Planted(37, "loss", run=1), 3))


def test_a_meta_loss_is_named() -> None:
    with pytest.raises(NonFiniteError, match="The meta-loss after all 50 inner steps is the first that is not finite"):
        run(Planted(what="meta-loss"))


@pytest.mark.parametrize("estimator", [ES(50, std=0.1, pairs=2), PES(50, 10, std=0.1, pairs=2), Forward(50)], ids=repr)
def test_other_estimators_say_so_too(estimator: Any) -> None:
    opt = radam(lr=0.01)
    with pytest.raises(NonFiniteError, match=r"Inner step 7 of 0\.\.49: the loss is the first"):
        run(Planted(7), opt, estimator, steps=20)


def test_a_derivative_that_overflows_alone_is_named_with_its_growth() -> None:
    """x <- 4 x (1 - x): bounded, and a change doubles in every step."""
    with pytest.raises(NonFiniteError, match="it is the derivative that overflows") as raised:
        run(Logistic(), sgd(lr=1.0), Unrolled(1100))
    rate = float(re.search(r"grows x ([\d.]+) in an inner step", str(raised.value))[1])  # type: ignore[index]
    assert rate == pytest.approx(2.0, rel=0.02)


class Logistic:
    """Gradient descent at lr 1 is the logistic map, whose Lyapunov exponent is log 2."""

    def init(self, generator: Any) -> Tensor:
        return torch.tensor([0.3], dtype=torch.float64)

    def batch(self, step: int, generator: Any) -> tuple[()]:
        return ()

    def loss(self, x: Tensor, batch: Any, hyper: Any) -> Tensor:
        # x - loss' = 4 x (1 - x)
        return (-1.5 * x**2 + 4 / 3 * x**3).sum()

    def meta_loss(self, x: Tensor, hyper: Any) -> Tensor:
        return x.sum()


def test_an_exploding_meta_gradient_is_warned_of_once_with_its_growth() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, result = run(Logistic(), sgd(lr=1.0), Unrolled(60), steps=2)
    assert result.history[0]["grad_norm"] > 1e6
    assert [warning.category for warning in caught] == [UserWarning]
    message = str(caught[0].message)
    assert message.startswith("the meta-gradient explodes: norm ")
    assert float(re.search(r"grows x ([\d.]+)", message)[1]) == pytest.approx(2.0, rel=0.1)  # type: ignore[index]


@pytest.mark.parametrize("lr", [0.02, 0.5, 1.5])
def test_growth_is_that_of_a_quadratic(lr: float) -> None:
    """Gradient descent on h/2 x^2: dx_t/dlr = -t h (1 - lr h)^(t-1) x_0; the state holds h x_(t-1)."""
    task = NoisyQuadratic(dimension=1, condition=1.0, noise=0.0, dtype=torch.float64)
    h = float(task.curvature)
    opt = sgd(lr=lr)
    values = {**opt.defaults, **Hyperparameters(opt, ("lr",))()}
    rate = growth(task, opt, torch.ones(1, dtype=torch.float64), values, 100, None)
    size = {t: h * math.hypot(t * (1 - lr * h) ** (t - 1), h * (t - 1) * (1 - lr * h) ** (t - 2)) for t in (51, 100)}
    expected = (size[100] / size[51]) ** (1 / 49)
    assert rate == pytest.approx(expected, rel=1e-9)


def test_no_warning_where_nothing_explodes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(NoisyQuadratic(), radam(lr=0.1))
        run(NoisyQuadratic(), rprop(lr=0.1))


class Units(NoisyQuadratic):
    """In other units: the learning rate's is a billionth, and so its derivative is large."""

    def loss(self, params: Any, batch: Any, hyper: Any) -> Tensor:
        return 1e9 * super().loss(params, batch, hyper)


class Plain(nn.Module):
    """A learning rate without a logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(1e-10, dtype=torch.float64))

    def forward(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def test_a_large_meta_gradient_without_growth_is_no_explosion() -> None:
    hyper = Plain()
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=1e-24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = meta_train(Units(), sgd(), hyper, Unrolled(20), meta_optimizer, steps=2, progress=False)
    assert min(record["grad_norm"] for record in result.history) > 1e6 * max(result.losses)


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_a_loss_that_overflows_in_a_diverging_training_is_divergence(start: float) -> None:
    """Squares overflow before the parameters do: the root at the edge of its domain would be the wrong advice."""
    with pytest.raises(NonFiniteError, match="the loss is the first") as caught:
        run(NoisyQuadratic(start=start), sgd(lr=1e3), Unrolled(200))
    assert re.search(r"The largest parameter had grown from [\d.]+ to [\d.e+]+: training diverged\.", str(caught.value))
    assert "a smaller lr" in str(caught.value)
    assert "root" not in str(caught.value)


def test_a_loss_at_the_edge_of_its_domain_is_no_divergence() -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(Planted(what="loss"), estimator=Unrolled(50))
    assert "diverged" not in str(caught.value)
    assert "root" in str(caught.value)


class Sometimes(NoisyQuadratic):
    """Every third unroll is spoilt."""

    unrolls = 0

    def init(self, generator: Any) -> Tensor:
        self.unrolls += 1
        return super().init(generator) * (math.nan if self.unrolls % 3 == 0 else 1.0)


def test_skipping_leaves_the_hyperparameters_and_counts() -> None:
    class Tracker:
        def __init__(self) -> None:
            self.skipped: list[int] = []

        def log(self, metrics: Any, step: int) -> None:
            if metrics.get("skipped"):
                self.skipped.append(step)

    tracker = Tracker()
    _, result = run(Sometimes(), steps=9, on_nonfinite="skip", tracker=tracker)
    lrs = [record["hyper"]["lr"] for record in result.history]
    assert result.skipped == 3
    assert tracker.skipped == [2, 5, 8]
    assert lrs[2] == lrs[3]
    assert lrs[5] == lrs[6]
    assert len(set(lrs)) == 7
    assert math.isnan(result.losses[2])
    assert result.best is not None
    assert math.isfinite(result.best.meta_loss)


def test_windows_begin_anew_after_a_skip() -> None:
    """A NaN in the carry would spoil all windows to come."""
    _, result = run(Sometimes(), estimator=Unrolled(6, "mean", truncation=2, carry=True), steps=12, on_nonfinite="skip")
    assert [step for step, record in enumerate(result.history) if record.get("skipped")] == [6]


def test_ten_in_a_row_are_too_many() -> None:
    class Always(NoisyQuadratic):
        def meta_loss(self, params: Tensor, hyper: Any) -> Tensor:
            return super().meta_loss(params, hyper) * math.nan

    with pytest.raises(NonFiniteError, match=r"meta-step 9: .*for the 10th time in a row"):
        run(Always(), steps=50, on_nonfinite="skip")


def test_a_module_of_the_users_is_diagnosed() -> None:
    class Rate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_lr = nn.Parameter(torch.tensor(-3.0))

        def forward(self) -> dict[str, Tensor]:
            return {"lr": self.log_lr.exp()}

    rate = Rate()
    meta_optimizer = torch.optim.Adam(rate.parameters())
    with pytest.raises(NonFiniteError, match=r"the meta-.*Inner step 37 of.*Hyperparameters: Rate"):
        meta_train(Planted(), sgd(), rate, Unrolled(50), meta_optimizer, progress=False)


def test_looking_leaves_the_generators_alone() -> None:
    states = []
    for estimator in (Unrolled(50), Unrolled(50)):
        generator = torch.Generator().manual_seed(0)
        with pytest.raises(NonFiniteError):
            run(Planted(), estimator=estimator, generator=generator)
        states.append(generator.get_state())
    generator = torch.Generator().manual_seed(0)
    task, opt = Planted(), sgd(lr=0.01)
    Unrolled(50).backward(task, opt, Hyperparameters(opt, ("lr",)), generator)
    assert torch.equal(states[0], generator.get_state())
    assert torch.equal(*states)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="on_nonfinite must be 'raise' or 'skip', got on_nonfinite='ignore'"):
        run(NoisyQuadratic(), on_nonfinite="ignore")
