"""Which graph an inner loop records: first order, truncation, none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import metaopt
from tests.unroll.inner_loop_by_hand import (
    CASES,
    F64,
    ONE_OF_EACH,
    RPROPS,
    ByHand,
    Case,
    Scenario,
    convolutional,
    count_kept,
    distance,
    layered,
    mse,
    recurrent,
    tensors,
)

TOLERANCE = 1e-11


def gradients(learned: list[Tensor], model: nn.Module) -> list[Tensor | None]:
    return [leaf.grad for leaf in [*learned, *model.parameters()]]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float = TOLERANCE) -> None:
    assert any(slope is not None and bool((slope != 0).any()) for slope in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        if theirs is None:  # by hand, RAdam's first steps know nothing of eps
            assert ours is None or not ours.any()
        else:
            assert ours is not None
            assert distance(ours, theirs) <= tolerance


# First order.


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("make", [recurrent, layered], ids=lambda make: make.__name__)
def test_first_order_takes_gradients_as_constants(case: Case, make: Callable[[], Scenario]) -> None:
    scenario = make()
    model, optimizer = scenario.model, scenario.optimizer(case)
    hyper = [case.values() for _ in scenario.groups]
    learned = list(tensors(hyper))
    by_hand = ByHand(model, optimizer, hyper, first_order=True)
    for x, y in scenario.training:
        by_hand.step(case.sign * mse(by_hand(x), y))
    mse(by_hand(scenario.validation[0]), scenario.validation[1]).backward()
    expected = gradients(learned, model)
    for leaf in [*learned, *model.parameters()]:
        leaf.grad = None

    with metaopt.inner_loop(model, optimizer, hyper, first_order=True) as (fmodel, fopt):
        for x, y in scenario.training:
            fopt.step(case.sign * mse(fmodel(x), y))
        mse(fmodel(scenario.validation[0]), scenario.validation[1]).backward()
    assert_same(gradients(learned, model), expected)


def test_first_order_sgd_is_fomaml() -> None:
    """The gradient at the end, into the initial parameters: Finn et al. 2017, section 5.2."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(5, 2, dtype=F64), torch.randn(5, 1, dtype=F64)
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.3), first_order=True) as (fmodel, fopt):
        for _ in range(4):
            fopt.step(mse(fmodel(x), y))
        mse(fmodel(x), y).backward()
        adapted = {name: p.detach().requires_grad_() for name, p in fmodel.params.items()}
    loss = mse(torch.func.functional_call(model, adapted, (x,)), y)
    for p, expected in zip(model.parameters(), torch.autograd.grad(loss, list(adapted.values())), strict=True):
        assert p.grad is not None
        assert distance(p.grad, expected) < 1e-14


@pytest.mark.parametrize("case", RPROPS, ids=str)
def test_rprop_is_the_same_with_and_without_first_order(case: Case) -> None:
    scenario = recurrent()
    learned = case.values()
    results = []
    for first_order in (False, True):
        for leaf in [*tensors(learned), *scenario.model.parameters()]:
            leaf.grad = None
        optimizer = scenario.optimizer(case)
        with metaopt.inner_loop(scenario.model, optimizer, learned, first_order=first_order) as (fmodel, fopt):
            for x, y in scenario.training:
                fopt.step(case.sign * mse(fmodel(x), y))
            mse(fmodel(scenario.validation[0]), scenario.validation[1]).backward()
        results.append(gradients(list(tensors(learned)), scenario.model))
    assert_same(*results, tolerance=0.0)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Once(nn.Module):
    """``v . w^3``, whose backward pass into w cannot be differentiated (torch notices where v has a gradient)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.8, 1.5], dtype=F64))
        self.v = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=F64))

    def forward(self) -> Tensor:
        return (self.v * _Cube.apply(self.w)).sum()


@pytest.mark.parametrize("case", RPROPS, ids=str)
def test_rprop_needs_no_second_derivative_of_the_loss(case: Case) -> None:
    model, values = Once(), case.values()
    with metaopt.inner_loop(model, case.optimizer([model.w]), values) as (fmodel, fopt):
        for _ in range(3):
            fopt.step(case.sign * fmodel())
        fmodel().backward()
    # Every gradient is positive: w_3 = w_0 - lr (1 + plus + plus^2)
    lr, plus, high = values["lr"], values["etas"][1], values["step_sizes"][1]
    assert lr * plus**2 < high
    w, v = (model.w - lr * (1 + plus + plus**2)).detach(), model.v.detach()
    slope = 3 * v * w**2
    for actual, expected in (
        (fmodel.params["w"], w),
        (model.w.grad, slope),
        (model.v.grad, w**3),
        (lr.grad, -slope.sum() * (1 + plus + plus**2)),
        (plus.grad, -slope.sum() * lr * (1 + 2 * plus)),
    ):
        assert actual is not None
        assert distance(actual, expected) < 1e-14


def test_others_need_one_unless_first_order() -> None:
    model = Once()
    for first_order in (False, True):
        optimizer = torch.optim.SGD([model.w], lr=0.1)
        with metaopt.inner_loop(model, optimizer, first_order=first_order) as (fmodel, fopt):
            fopt.step(fmodel())
            if first_order:
                fmodel().backward()
            else:
                with pytest.raises(RuntimeError, match="once_differentiable"):
                    fmodel().backward()
    assert model.w.grad is not None


# The inner loss in the meta-loss.


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_inner_losses_can_be_summed_into_the_meta_loss(case: Case, first_order: bool) -> None:
    scenario = recurrent()
    model, optimizer, values = scenario.model, scenario.optimizer(case), case.values()
    learned = list(tensors(values))
    by_hand = ByHand(model, optimizer, [values], first_order=first_order)
    losses = []
    for x, y in scenario.training:
        losses.append(mse(by_hand(x), y))
        by_hand.step(losses[-1])
    torch.stack(losses).mean().backward()
    expected = gradients(learned, model)
    for leaf in [*learned, *model.parameters()]:
        leaf.grad = None

    losses = []
    with metaopt.inner_loop(model, optimizer, values, first_order=first_order) as (fmodel, fopt):
        for x, y in scenario.training:
            losses.append(mse(fmodel(x), y))
            fopt.step(losses[-1])
        torch.stack(losses).mean().backward()
    assert_same(gradients(learned, model), expected)


# Truncation.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_detach_truncates(case: Case) -> None:
    """Windows of four steps, each with a backward pass of its own, as in truncated backpropagation through time."""
    scenario = recurrent()
    model, optimizer, values = scenario.model, scenario.optimizer(case), case.values()
    learned = list(tensors(values))
    x_val, y_val = scenario.validation

    def train(call: Any, step: Any, detach: Any) -> list[list[Tensor | None]]:
        windows = []
        for index, (x, y) in enumerate(scenario.training):
            step(case.sign * mse(call(x), y))
            if index % 4 == 3:
                mse(call(x_val), y_val).backward()
                windows.append(gradients(learned, model))
                for leaf in [*learned, *model.parameters()]:
                    leaf.grad = None
                detach()
        return windows

    by_hand = ByHand(model, optimizer, [values])
    expected = train(by_hand, by_hand.step, by_hand.detach)
    with metaopt.inner_loop(model, optimizer, values) as (fmodel, fopt):
        actual = train(fmodel, fopt.step, fopt.detach)
    assert len(actual) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs)
    # The second window starts from constants, and does not reach the initial parameters.
    assert all(slope is None for slope in actual[1][len(learned) :])


def test_detach_cuts_buffers_too() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))
            self.register_buffer("total", torch.tensor(0.0))

        def forward(self) -> Tensor:
            self.total = self.total + self.w
            return self.total

    model = Sum()
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, fopt):
        fopt.step(fmodel())
        assert fmodel.buffers["total"].requires_grad
        fopt.detach()
        assert not fmodel.buffers["total"].requires_grad
        fmodel().backward()  # the graph of the first call is gone
    assert model.w.grad is None
    assert fmodel.buffers["total"] == 2.0 + 1.5


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_memory_stays_flat_under_truncation(case: Case) -> None:
    scenario = recurrent()
    values = case.values()
    kept, counted = count_kept()
    counts = []
    with counted, metaopt.inner_loop(scenario.model, scenario.optimizer(case), values) as (fmodel, fopt):
        for x, y in scenario.training:
            fopt.step(case.sign * mse(fmodel(x), y))
            assert kept
            mse(fmodel(x), y).backward()
            fopt.detach()
            counts.append(len(kept))
    assert counts[2:] == [counts[1]] * (len(counts) - 2)


# No graph.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_under_no_grad_the_numbers_are_the_same_and_no_graph_is_kept(case: Case) -> None:
    scenario = convolutional()
    values = case.values()

    def train(check: Callable[[Any], None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(1)
        with metaopt.inner_loop(scenario.model, scenario.optimizer(case), values) as (fmodel, fopt):
            for x, y in scenario.training:
                loss = case.sign * mse(fmodel(x), y)
                fopt.step(loss)
                check(fmodel)  # while the loss is still there
                del loss
        return fmodel.params, fmodel.buffers

    expected = train(lambda fmodel: None)
    assert all(p.grad_fn is not None for p in expected[0].values())
    kept, counted = count_kept()

    def check(fmodel: Any) -> None:
        assert not kept
        assert all(p.is_leaf and p.requires_grad for p in fmodel.params.values())

    with counted, torch.no_grad():
        actual = train(check)
        assert not torch.is_grad_enabled()
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_under_no_grad_the_graph_that_remains_is_of_the_last_call() -> None:
    """What is left to differentiate: the validation loss in the trained parameters, not the training."""
    model = nn.Linear(2, 1)
    lr = torch.tensor(0.1, requires_grad=True)
    with torch.no_grad(), metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5), {"lr": lr}) as inner:
        fmodel, fopt = inner
        fopt.step(fmodel(torch.ones(1, 2)).sum())
        slopes = torch.autograd.grad(fmodel(torch.ones(1, 2)).sum(), list(fmodel.params.values()))
    assert torch.equal(slopes[0], torch.ones(1, 2))
    assert lr.grad is None
    assert model.weight.grad is None


def test_grad_mode_is_restored_after_the_block() -> None:
    model = nn.Linear(2, 1)
    for mode in (False, True):
        with torch.set_grad_enabled(mode):
            with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)):
                assert torch.is_grad_enabled()
            assert torch.is_grad_enabled() == mode
            with (
                pytest.raises(KeyError),
                metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, _),
            ):
                fmodel.params["none of these"]
            assert torch.is_grad_enabled() == mode


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_steps_under_no_grad_are_a_warm_up_before_the_graph_begins(case: Case) -> None:
    """As truncation after the warm-up: the same numbers, and gradients of the steps that come after."""
    scenario = recurrent()
    model, optimizer, values = scenario.model, scenario.optimizer(case), case.values()
    learned = list(tensors(values))
    x_val, y_val = scenario.validation
    by_hand = ByHand(model, optimizer, [values])
    for index, (x, y) in enumerate(scenario.training):
        if index == 3:
            by_hand.detach()
        by_hand.step(case.sign * mse(by_hand(x), y))
    mse(by_hand(x_val), y_val).backward()
    expected = gradients(learned, model)
    for leaf in learned:
        leaf.grad = None

    kept, counted = count_kept()
    with counted, metaopt.inner_loop(model, optimizer, values) as (fmodel, fopt):
        for index, (x, y) in enumerate(scenario.training):
            loss = case.sign * mse(fmodel(x), y)
            with torch.set_grad_enabled(index >= 3):
                fopt.step(loss)
            del loss
            assert bool(kept) == (index >= 3)
        mse(fmodel(x_val), y_val).backward()
    assert_same(gradients(learned, model), expected)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_without_second_order_the_activations_of_a_step_are_let_go(case: Case, first_order: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(13, 2, dtype=F64), torch.randn(13, 1, dtype=F64)
    values = case.values()
    kept, counted = count_kept()
    optimizer = case.optimizer(model.parameters())
    with counted, metaopt.inner_loop(model, optimizer, values, first_order=first_order) as (fmodel, fopt):
        for _ in range(3):
            fopt.step(mse(fmodel(x), y))
        activations = [box for box in kept if 13 in box.tensor.shape]
        assert kept
        assert bool(activations) == (case not in RPROPS and not first_order)
        mse(fmodel(x), y).backward()
    assert values["lr"].grad is not None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_second_backward_pass_can_go_through_the_same_unroll(case: Case) -> None:
    scenario = layered()
    model, values = scenario.model, case.values()
    learned = list(tensors(values))
    x_val, y_val = scenario.validation
    with metaopt.inner_loop(model, scenario.optimizer(case), values) as (fmodel, fopt):
        for x, y in scenario.training:
            fopt.step(case.sign * mse(fmodel(x), y))
        mse(fmodel(x_val), y_val).backward(retain_graph=True)
        first = [None if slope is None else slope.clone() for slope in gradients(learned, model)]
        mse(fmodel(x_val), y_val).backward()
    twice = [None if slope is None else slope / 2 for slope in gradients(learned, model)]
    assert_same(twice, first, 1e-14)
