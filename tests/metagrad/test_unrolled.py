"""`Unrolled`: its values and gradients are those of the inner loop written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import constraints

from metaopt import Hyperparameters, PerParameter, Schedule
from metaopt.functional import REGISTRY, adam, rprop, sgd
from metaopt.metagrad import Estimator, Unrolled
from metaopt.tasks import NoisyQuadratic
from tests.metagrad.reference import STARTS, UPDATES, Regression, finite_difference, learn_all, seeded, unroll

F64 = torch.float64
STEPS = 12  # RAdam rectifies from the sixth on
TASK = Regression()
NAMES = ("in.weight", "in.bias", "out.weight")

each_optimizer = pytest.mark.parametrize("name", REGISTRY)
each_objective = pytest.mark.parametrize("objective", ["final", "mean", "inner"])


def grads_of(hyper: nn.Module) -> dict[str, Tensor | None]:
    return {key: p.grad for key, p in hyper.named_parameters()}


def assert_equals_by_hand(
    name: str,
    opt: Any,
    hyper: nn.Module,
    estimator: Unrolled,
    task: Any = TASK,
    may_be_flat: frozenset[str] = frozenset(),
) -> None:
    """Value to 1e-14, each gradient to 1e-10 of its largest element; none is 0, except where the case says so."""
    got = estimator.backward(task, opt, hyper, seeded())
    values = {**opt.defaults, **hyper()}
    expected = unroll(UPDATES[name], task, values, estimator.steps, estimator.objective, estimator.truncation, seeded())
    assert got.shape == ()
    assert not got.requires_grad
    torch.testing.assert_close(got, expected.detach(), rtol=1e-14, atol=0.0)
    parameters = dict(hyper.named_parameters())
    slopes = torch.autograd.grad(expected, list(parameters.values()))
    for (key, p), slope in zip(parameters.items(), slopes, strict=True):
        assert p.grad is not None, key
        assert slope.abs().max() > 0 or key in may_be_flat, key
        torch.testing.assert_close(p.grad, slope, rtol=0.0, atol=1e-10 * slope.abs().max().item())


# Against the same written out by hand


@each_optimizer
@each_objective
def test_meta_loss_and_hypergradient_equal_an_unroll_by_hand(name: str, objective: Any) -> None:
    assert_equals_by_hand(name, *learn_all(name), Unrolled(STEPS, objective))


@each_optimizer
@each_objective
@pytest.mark.parametrize("truncation", [1, 5, 6, STEPS])
def test_truncation_detaches_between_windows_and_adds_up_their_gradients(
    name: str, objective: Any, truncation: int
) -> None:
    opt, hyper = learn_all(name)
    estimator = Unrolled(STEPS, objective, truncation)
    if objective == "inner" and truncation == 1:
        # The objective of a window is then one loss, before any step.
        with pytest.raises(ValueError, match="only before a truncation"):
            estimator.backward(TASK, opt, hyper, seeded())
        return
    if name == "rprop" and objective == "final" and truncation < STEPS:
        # lr is read at the start alone.
        opt = rprop(lr=STARTS["rprop"]["lr"])
        hyper = Hyperparameters(opt, {key: start for key, start in STARTS["rprop"].items() if key != "lr"})
    # A smaller eta is felt one step after the flip, and only elements at a bound feel it: not in every short window.
    short = name == "rprop" and (truncation == 1 or objective == "final")
    may_be_flat = frozenset({"etas[0]", "step_sizes[0]", "step_sizes[1]"} if short else ())
    assert_equals_by_hand(name, opt, hyper, estimator, may_be_flat=may_be_flat)


@pytest.mark.parametrize("objective", ["mean", "inner"])
def test_a_truncation_of_the_whole_horizon_cuts_nothing(objective: Any) -> None:
    grads = []
    for truncation in (None, STEPS):
        opt, hyper = learn_all("radam")
        Unrolled(STEPS, objective, truncation).backward(TASK, opt, hyper, seeded())
        grads.append(grads_of(hyper))
    assert grads[0] == grads[1]


@pytest.mark.parametrize("name", ["radam", "rprop", "sgd"])
@pytest.mark.parametrize(("objective", "truncation"), [("final", None), ("mean", 5)])
def test_schedules_and_per_parameter_values_get_the_gradient_of_an_unroll_by_hand(
    name: str, objective: Any, truncation: int | None
) -> None:
    opt = REGISTRY[name](**STARTS[name])
    learn: dict[str, Any] = {"lr": PerParameter(NAMES, 0.05)}
    if name == "radam":
        rising = torch.linspace(0.7, 0.9, STEPS, dtype=F64)
        learn["betas"] = (Schedule(STEPS, rising), PerParameter(NAMES, Schedule(STEPS, 0.97)))
        learn["weight_decay"] = Schedule(3, 0.05)
    elif name == "rprop":
        learn["etas"] = (PerParameter(NAMES, 0.5), 1.3)
    else:
        learn["lr"] = PerParameter(NAMES, Schedule(STEPS, 0.1))
    hyper = Hyperparameters(opt, learn)
    assert_equals_by_hand(name, opt, hyper, Unrolled(STEPS, objective, truncation))


def test_a_truncated_final_objective_with_a_schedule_reaches_the_steps_of_the_last_window_alone() -> None:
    opt = sgd()
    hyper = Hyperparameters(opt, {"lr": Schedule(STEPS, 0.1)})
    assert_equals_by_hand("sgd", opt, hyper, Unrolled(STEPS, "final", truncation=5))
    assert hyper.lr.grad is not None
    assert hyper.lr.grad[:10].tolist() == [0.0] * 10
    assert bool((hyper.lr.grad[10:] != 0).all())


# Against finite differences


@each_optimizer
@each_objective
def test_the_hypergradient_is_that_of_finite_differences(name: str, objective: Any) -> None:
    """Of the whole map from hyper's parameters to the meta-loss."""
    opt, hyper = learn_all(name)
    estimator = Unrolled(STEPS, objective)
    estimator.backward(TASK, opt, hyper, seeded())
    grads = grads_of(hyper)
    for key, p in hyper.named_parameters():
        difference = finite_difference(lambda: estimator.backward(TASK, opt, hyper, seeded()).item(), p)
        grad = grads[key]
        assert grad is not None
        assert grad.item() == pytest.approx(difference, rel=1e-8, abs=3e-12), key


# Like loss.backward()


def test_gradients_add_up_in_grad() -> None:
    opt, hyper = learn_all("radam")
    estimator = Unrolled(STEPS)
    estimator.backward(TASK, opt, hyper, seeded(0))
    first = grads_of(hyper)
    hyper.zero_grad()
    estimator.backward(TASK, opt, hyper, seeded(1))
    second = grads_of(hyper)
    assert first != second
    hyper.zero_grad()
    for p in hyper.parameters():
        p.grad = torch.full_like(p, 0.5)
    estimator.backward(TASK, opt, hyper, seeded(0))
    estimator.backward(TASK, opt, hyper, seeded(1))
    for key, p in hyper.named_parameters():
        torch.testing.assert_close(p.grad, 0.5 + first[key] + second[key], rtol=1e-14, atol=0.0)


def test_nothing_but_hypers_parameters_gets_a_gradient() -> None:
    task = Regression()
    task.x.requires_grad_()
    opt, hyper = learn_all("sgd")
    Unrolled(STEPS, "mean").backward(task, opt, hyper, seeded())
    assert task.x.grad is None
    assert all(grad is not None for grad in grads_of(hyper).values())


def test_the_surrounding_grad_mode_makes_no_difference() -> None:
    grads = []
    for enabled in (True, False):
        opt, hyper = learn_all("radam")
        with torch.set_grad_enabled(enabled):
            Unrolled(STEPS, "mean", truncation=5).backward(TASK, opt, hyper, seeded())
            assert torch.is_grad_enabled() == enabled
        grads.append(grads_of(hyper))
    assert grads[0] == grads[1]


def test_a_generator_makes_it_reproducible_and_the_default_one_is_torchs() -> None:
    opt, hyper = learn_all("radam")
    estimator = Unrolled(STEPS)
    before = torch.random.get_rng_state()
    losses = [estimator.backward(TASK, opt, hyper, seeded(seed)).item() for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(3)
    assert estimator.backward(TASK, opt, hyper).item() == losses[0]


def test_a_generator_goes_on_from_call_to_call() -> None:
    opt, hyper = learn_all("sgd")
    generator = seeded()
    assert Unrolled(3).backward(TASK, opt, hyper, generator) != Unrolled(3).backward(TASK, opt, hyper, generator)


def test_a_float32_task_gives_the_float64_gradient_to_single_precision() -> None:
    class Single(Regression):
        def init(self, generator: Generator | None) -> dict[str, Tensor]:
            return {name: p.float() for name, p in super().init(generator).items()}

        def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
            x, y = super().batch(step, generator)
            return x.float(), y.float()

        def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
            return self.error(params, self.x[20:].float(), self.y[20:].float())

    grads = []
    for task in (TASK, Single()):
        opt, hyper = learn_all("radam")
        loss = Unrolled(STEPS).backward(task, opt, hyper, seeded())
        grads.append(torch.stack([p.grad for p in hyper.parameters() if p.grad is not None]))
    assert loss.dtype == torch.float32
    assert grads[1].dtype == F64
    torch.testing.assert_close(grads[1], grads[0], rtol=0.0, atol=1e-5 * grads[0].abs().max().item())


# Any module may be hyper


class Learned(nn.Module):
    """Values from a small network, one from a parameter as it is, and one that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1, dtype=F64)
        self.weight_decay = nn.Parameter(torch.tensor(0.05, dtype=F64))

    def forward(self) -> dict[str, Any]:
        lr = self.net(torch.tensor([0.3, -0.2], dtype=F64)).squeeze().sigmoid() / 10
        return {"lr": lr, "weight_decay": self.weight_decay, "momentum": 0.9}


def test_any_module_that_returns_a_mapping_is_learned() -> None:
    assert_equals_by_hand("sgd", sgd(), Learned(), Unrolled(STEPS, "mean", truncation=5))


def test_a_value_used_under_two_names_gets_both_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.tensor(0.05, dtype=F64))

        def forward(self) -> dict[str, Any]:
            return {"lr": self.both, "penalty": self.both}

    assert_equals_by_hand("sgd", sgd(), Tied(), Unrolled(STEPS))


def test_a_frozen_parameter_gets_no_gradient_and_changes_none_of_the_others() -> None:
    opt, hyper = learn_all("radam")
    Unrolled(STEPS).backward(TASK, opt, hyper, seeded())
    everything = grads_of(hyper)
    hyper.zero_grad()
    hyper.lr.requires_grad_(False)
    Unrolled(STEPS).backward(TASK, opt, hyper, seeded())
    assert grads_of(hyper) == {**everything, "lr": None}


def test_a_hyper_that_returns_no_mapping_or_learns_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match="must return a mapping of values, got Parameter"):
        Unrolled(STEPS).backward(TASK, sgd(), Returns(1.0))
    opt, hyper = learn_all("sgd")
    hyper.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to learn"):
        Unrolled(STEPS).backward(TASK, opt, hyper)


class Returns(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self) -> Any:
        return self.value


# Values that the task reads


@each_optimizer
@each_objective
def test_values_that_only_the_task_reads_get_the_gradient_of_an_unroll_by_hand(name: str, objective: Any) -> None:
    more: dict[str, Any] = {}
    if name != "rprop" or objective == "inner":  # a sign carries no derivative to a penalty in the inner loss
        more["penalty"] = (0.02, constraints.positive)
    if objective != "inner":
        more["outer"] = (0.03, constraints.positive)
    assert_equals_by_hand(name, *learn_all(name, **more), Unrolled(STEPS, objective))


class Penalized(NoisyQuadratic):
    """Gradient descent from x_0 takes x_T = (1 - lr (h + penalty))^T x_0."""

    def loss(self, params: Tensor, batch: Tensor, hyper: Mapping[str, Any]) -> Tensor:
        return super().loss(params, batch, hyper) + 0.5 * hyper["penalty"] * params.square().sum()


def test_a_learned_penalty_has_the_derivative_of_the_closed_form() -> None:
    task = Penalized(dimension=3, condition=10.0, noise=0.0, dtype=F64)
    opt = sgd()
    hyper = Hyperparameters(opt, {"lr": 0.2, "penalty": (0.3, constraints.positive)})
    steps = 9
    loss = Unrolled(steps).backward(task, opt, hyper, seeded())
    h, x = task.curvature, task.init(seeded())
    factor = 1 - 0.2 * (h + 0.3)
    assert loss.item() == pytest.approx((0.5 * h * (factor**steps * x) ** 2).sum().item(), rel=1e-13)
    by_factor = h * x**2 * steps * factor ** (2 * steps - 1)
    # In the unconstrained coordinate, the logarithm.
    assert hyper.penalty.grad.item() == pytest.approx((by_factor * -0.2).sum().item() * 0.3, rel=1e-12)
    assert hyper.lr.grad.item() == pytest.approx((by_factor * -(h + 0.3)).sum().item() * 0.2, rel=1e-12)


def test_the_task_also_sees_values_that_are_not_learned() -> None:
    seen: list[dict[str, Any]] = []

    class Looks(Regression):
        def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
            seen.append(dict(hyper))
            return super().loss(params, batch, {})

        def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
            seen.append(dict(hyper))
            return super().meta_loss(params, {})

    opt = adam(lr=0.3, betas=(0.8, 0.9))
    Unrolled(2).backward(Looks(), opt, Hyperparameters(opt, {"lr": 0.2}), seeded())
    assert len(seen) == 3
    for values in seen:
        assert values["betas"] == (0.8, 0.9)
        assert values["lr"].item() == pytest.approx(0.2, rel=1e-12)
        assert set(values) == set(opt.hyperparameters)


# What does not matter is an error


class Unread(nn.Module):
    """One of its parameters is in no value."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(0.1, dtype=F64))
        self.forgotten = nn.Parameter(torch.tensor(0.1, dtype=F64))

    def forward(self) -> dict[str, Any]:
        return {"lr": self.lr}


SGD, RPROP = sgd(), rprop(lr=0.03)
PENALTY = {"penalty": (0.1, constraints.positive)}


@pytest.mark.parametrize(
    ("opt", "make", "task", "estimator", "named"),
    [
        (SGD, lambda: Hyperparameters(SGD, {"lr": 0.1, **PENALTY}), NoisyQuadratic(), Unrolled(3), "'penalty'"),
        (RPROP, lambda: Hyperparameters(RPROP, {"etas": (0.5, 1.2), **PENALTY}), TASK, Unrolled(9), "'penalty'"),
        (
            SGD,
            lambda: Hyperparameters(SGD, {"lr": PerParameter((*NAMES, "in.typo"), 0.1)}),
            TASK,
            Unrolled(3),
            r"'lr\.in\.typo'",
        ),
        (SGD, lambda: Hyperparameters(SGD, ("lr", "dampening")), TASK, Unrolled(3), "'dampening'"),
        (RPROP, lambda: Hyperparameters(RPROP, ("lr",)), TASK, Unrolled(9, "final", truncation=5), "'lr'.*truncation"),
        (SGD, Unread, TASK, Unrolled(3), "'forgotten'"),
    ],
    ids=["ignored by the task", "lost in a sign", "no such parameter", "no momentum", "cut off", "in no value"],
)
@pytest.mark.parametrize("grad", [None, 0.25])
def test_a_learned_value_without_effect_is_named_before_any_grad_is_touched(
    opt: Any, make: Callable[[], nn.Module], task: Any, estimator: Unrolled, named: str, grad: float | None
) -> None:
    hyper = make()
    if grad is not None:
        for p in hyper.parameters():
            p.grad = torch.full_like(p, grad)
    with pytest.raises(ValueError, match=f"does not depend on the learned {named}"):
        estimator.backward(task, opt, hyper, seeded())
    for p in hyper.parameters():
        assert p.grad is None if grad is None else bool((p.grad == grad).all())


def test_a_per_parameter_value_that_leaves_a_parameter_out_is_refused() -> None:
    opt = sgd()
    hyper = Hyperparameters(opt, {"lr": PerParameter(NAMES[:2], 0.1)})
    with pytest.raises(ValueError, match=r"lr has no value for parameter 'out\.weight'"):
        Unrolled(3).backward(TASK, opt, hyper, seeded())
    assert hyper.lr.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got steps=0"),
        ({"steps": 3, "objective": "last"}, "objective must be one of .*final.*mean.*inner.* got objective='last'"),
        ({"steps": 3, "truncation": 0}, r"truncation must be in 1\.\.steps \(3\), got truncation=0"),
        ({"steps": 3, "truncation": 4}, r"truncation must be in 1\.\.steps \(3\), got truncation=4"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unrolled(**arguments)


def test_it_is_an_estimator_with_a_repr() -> None:
    estimator = Unrolled(5, "mean", truncation=2)
    assert isinstance(estimator, Estimator)
    assert repr(estimator) == "Unrolled(steps=5, objective='mean', truncation=2)"


# Rprop needs no second derivatives


class Quartic(torch.autograd.Function):
    """x^4 / 4, whose derivative cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**4 / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x**3


class OnceDifferentiable(NoisyQuadratic):
    quartic: Callable[[Tensor], Tensor] = staticmethod(Quartic.apply)

    def loss(self, params: Tensor, batch: Tensor, hyper: Mapping[str, Any]) -> Tensor:
        return super().loss(params, batch, hyper) + self.quartic(params).sum()


class TwiceDifferentiable(OnceDifferentiable):
    quartic = staticmethod(lambda x: x**4 / 4)


@each_objective
def test_rprop_trains_on_a_loss_that_can_be_differentiated_only_once(objective: Any) -> None:
    results = []
    for kind in (OnceDifferentiable, TwiceDifferentiable):
        opt, hyper = learn_all("rprop")
        task = kind(dimension=4, condition=4.0, dtype=F64)
        loss = Unrolled(STEPS, objective).backward(task, opt, hyper, seeded())
        results.append((loss.item(), [p.grad.item() for p in hyper.parameters() if p.grad is not None]))
    assert results[0] == results[1]
    assert len(results[0][1]) == 5


def test_such_a_loss_cannot_be_differentiated_twice() -> None:
    """Or the test above would say nothing."""
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad((Quartic.apply(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.xfail(strict=True, reason="torch drops the second derivative without a word")
def test_an_optimizer_that_differentiates_gradients_refuses_such_a_loss() -> None:
    opt, hyper = learn_all("sgd")
    with pytest.raises(RuntimeError, match="once_differentiable"):
        Unrolled(STEPS).backward(OnceDifferentiable(dtype=F64), opt, hyper, seeded())


def test_radam_learns_both_betas_through_rectified_and_unrectified_steps_alike() -> None:
    """T = 5 has no rectified step: beta2 and eps have no effect; T = 6 has one."""
    opt, hyper = learn_all("radam")
    Unrolled(5).backward(TASK, opt, hyper, seeded())
    grads = grads_of(hyper)
    assert grads["betas[1]"].item() == grads["eps"].item() == 0.0 != grads["betas[0]"].item()
    hyper.zero_grad()
    Unrolled(6).backward(TASK, opt, hyper, seeded())
    assert 0.0 not in {grads_of(hyper)["betas[1]"].item(), grads_of(hyper)["eps"].item()}


def test_learning_at_the_defaults_gives_finite_gradients_for_every_optimizer() -> None:
    for name in REGISTRY:
        opt = REGISTRY[name]()
        learnable = [key for key in opt.hyperparameters if key not in {"weight_decay", "momentum", "dampening"}]
        hyper = Hyperparameters(opt, learnable)
        Unrolled(STEPS).backward(TASK, opt, hyper, seeded())
        assert all(grad is not None and grad.isfinite() for grad in grads_of(hyper).values()), name
