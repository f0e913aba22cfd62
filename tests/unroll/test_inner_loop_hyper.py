"""The forms in which an inner loop takes hyperparameters, and what it says about those that it does not take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt import optim
from tests.unroll.inner_loop_by_hand import CASES, F64, Case, distance
from tests.unroll.test_inner_loop_live import snapshot

STEPS = 8


class Quadratic(nn.Module):
    """``(c1 . a^2 + c2 . b^2) / 2`` with parameters a and b; the step sees it times a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
        self.b = nn.Parameter(torch.tensor([[0.5], [1.5]], dtype=F64))

    def forward(self) -> Tensor:
        c = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
        return 0.5 * ((c * self.a**2).sum() + self.b.square().sum())


def unroll(
    hyper: Any, options: Mapping[str, Any] | None = None, groups: int = 1, kind: Any = torch.optim.SGD
) -> Tensor:
    """The meta-loss."""
    model = Quadratic()
    params: Any = [model.a, model.b] if groups == 1 else [{"params": [model.a]}, {"params": [model.b]}]
    optimizer = kind(params, **(options or {"lr": 0.1}))
    with metaopt.inner_loop(model, optimizer, hyper) as (fmodel, fopt):
        for _ in range(STEPS):
            fopt.step(fmodel())
        result: Tensor = fmodel()
    return result


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def contract(lrs_a: Any, lrs_b: Any) -> Tensor:
    """The meta-loss of plain gradient descent in closed form, from the learning rates of each step."""
    a, b = Quadratic().a.detach(), Quadratic().b.detach()
    c = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    for lr_a, lr_b in zip(lrs_a, lrs_b, strict=True):
        a, b = a * (1 - lr_a * c), b * (1 - lr_b)
    return 0.5 * ((c * a**2).sum() + b.square().sum())


def assert_same_gradients(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert distance(actual, expected) < 1e-13
    slopes = [torch.autograd.grad(loss, leaves) for loss in (actual, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        assert bool((theirs != 0).all())
        assert distance(ours, theirs) < 1e-13


def test_a_scalar_tensor() -> None:
    lr = leaf(0.2)
    assert_same_gradients(unroll({"lr": lr}), contract([lr] * STEPS, [lr] * STEPS), [lr])


def test_a_tensor_in_another_dtype_gets_its_gradient_in_that() -> None:
    lr = torch.tensor(0.25, requires_grad=True)
    unroll({"lr": lr}).backward()
    exact = leaf(0.25)
    contract([exact] * STEPS, [exact] * STEPS).backward()
    assert lr.grad is not None
    assert lr.grad.dtype == torch.float32
    assert distance(lr.grad.double(), exact.grad) < 5e-7


def test_a_number() -> None:
    assert distance(unroll({"lr": 0.2}), contract([0.2] * STEPS, [0.2] * STEPS)) < 1e-13


def test_a_tensor_with_a_value_for_each_element() -> None:
    lr = leaf([0.1, 0.2, 0.3])
    actual = unroll([{"lr": lr}, {}], groups=2)
    assert_same_gradients(actual, contract([lr] * STEPS, [0.1] * STEPS), [lr])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_mapping_from_parameter_name(groups: int) -> None:
    a, b = leaf(0.2), leaf(0.3)
    assert_same_gradients(unroll({"lr": {"a": a, "b": b}}, groups=groups), contract([a] * STEPS, [b] * STEPS), [a, b])


def test_a_schedule() -> None:
    values = leaf([0.1, 0.2, 0.3, 0.25, 0.15])
    schedule = metaopt.Schedule(steps=5, init=values)
    lrs = [values[min(step, 4)] for step in range(STEPS)]
    assert_same_gradients(unroll({"lr": schedule}), contract(lrs, lrs), [values])


def test_a_function_of_the_step() -> None:
    lr, seen = leaf(0.2), []

    def decay(step: int) -> Tensor:
        seen.append(step)
        return lr / (1 + step)

    lrs = [lr / (1 + step) for step in range(STEPS)]
    assert_same_gradients(unroll({"lr": decay}), contract(lrs, lrs), [lr])
    assert set(seen) == set(range(STEPS))
    assert all(type(step) is int for step in seen)


def test_a_mapping_of_schedules_and_functions() -> None:
    a, values = leaf(0.2), leaf([0.1, 0.2, 0.3])
    hyper = {"lr": {"a": lambda step: a * 0.9**step, "b": metaopt.Schedule(steps=3, init=values)}}
    lrs_a, lrs_b = [a * 0.9**step for step in range(STEPS)], [values[min(step, 2)] for step in range(STEPS)]
    assert_same_gradients(unroll(hyper), contract(lrs_a, lrs_b), [a, values])


def test_steps_are_counted_from_the_start_of_the_loop_also_in_mid_training() -> None:
    model = Quadratic()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    seen = []
    with metaopt.inner_loop(model, optimizer, {"lr": lambda step: seen.append(step) or 0.1}) as (fmodel, fopt):
        seen.clear()
        for _ in range(3):
            fopt.step(fmodel())
    assert sorted(set(seen)) == [0, 1, 2]


def test_one_mapping_per_group_in_the_order_of_the_groups() -> None:
    a, b = leaf(0.2), leaf(0.3)
    actual = unroll([{"lr": a}, {"lr": b}], groups=2)
    assert_same_gradients(actual, contract([a] * STEPS, [b] * STEPS), [a, b])


def test_one_mapping_serves_all_groups() -> None:
    lr = leaf(0.2)
    assert_same_gradients(unroll({"lr": lr}, groups=2), contract([lr] * STEPS, [lr] * STEPS), [lr])


def test_what_a_mapping_leaves_out_comes_from_the_group() -> None:
    a = leaf(0.2)
    assert_same_gradients(unroll([{"lr": a}, {}], groups=2), contract([a] * STEPS, [0.1] * STEPS), [a])


def test_rprops_lr_is_read_at_the_first_step() -> None:
    lrs = leaf([0.01, 7.0, 7.0])
    unroll({"lr": metaopt.Schedule(steps=3, init=lrs)}, kind=torch.optim.Rprop).backward()
    assert lrs.grad is not None
    assert lrs.grad[0] != 0
    assert lrs.grad[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_hyperparameters_reach_their_parameters(case: Case) -> None:
    """Against finite differences of ``hyper.numbers()`` trained by the live optimizer's own class."""
    kind = {"SGD": "sgd", "Adam": "adam", "AdamW": "adamw", "RAdam": "radam", "Rprop": "rprop"}[case.kind.__name__]
    flags = {name: value for name, value in case.options.items() if value is True}
    opt = getattr(metaopt.functional, kind)(**flags, **({"momentum": 0.5} if "nesterov" in flags else {}))
    hyper = metaopt.Hyperparameters(opt, learn=dict(case.learn))

    model = Quadratic()
    with metaopt.inner_loop(model, case.optimizer(model.parameters()), hyper()) as (fmodel, fopt):
        for _ in range(STEPS):
            fopt.step(case.sign * fmodel())
        fmodel().backward()

    def trained() -> Tensor:
        live = Quadratic()
        optimizer = case.kind(live.parameters(), **{**case.options, **hyper.numbers()})
        for _ in range(STEPS):
            optimizer.zero_grad()
            (case.sign * live()).backward()
            optimizer.step()
        return live().detach()

    for parameter in hyper.parameters():
        start, h = parameter.detach().clone(), 1e-5
        values = []
        for k in (1, -1, 2, -2):
            parameter.data.copy_(start + k * h)
            values.append(trained())
        parameter.data.copy_(start)
        slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
        assert parameter.grad is not None
        # absolute: the rounding error of the loss over h
        assert abs(parameter.grad - slope) < 1e-6 * abs(slope) + 1e-9


# What is refused.


class Subclass(torch.optim.Adam):
    """May have another step."""


def refused(
    error: type[Exception],
    match: str,
    hyper: Any = None,
    *,
    make: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: torch.optim.Adam(model.parameters()),
) -> None:
    model = nn.Linear(2, 1)
    optimizer = make(model)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=match), metaopt.inner_loop(model, optimizer, hyper):
        raise AssertionError("entered")
    assert snapshot(model, optimizer) == before


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (torch.optim.Adagrad, "Adagrad"),
        (Subclass, "Subclass"),
        (type("RAdam", (optim.RAdam,), {"__qualname__": "Mine"}), "Mine"),
    ],
)
def test_an_optimizer_of_another_type(kind: Any, name: str) -> None:
    match = f"cannot unroll an optimizer of type {name}; it knows .*torch.Adam,.*metaopt.Rprop"
    refused(TypeError, match, make=lambda model: kind(model.parameters()))


def test_amsgrad() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [model.weight]}, {"params": [model.bias], "amsgrad": True}])

    refused(ValueError, "group 1 has amsgrad=True", make=make)


def test_a_parameter_that_is_not_the_models() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": model.parameters()}, {"params": [nn.Parameter(torch.ones(3, 4))]}])

    refused(
        ValueError, r"group 1 of the optimizer has a parameter of shape \(3, 4\) that is not the model's", make=make
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_mappings(count: int) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [model.weight]}, {"params": [model.bias]}])

    refused(ValueError, rf"hyper must hold one mapping per group \(2\), got {count}", [{}] * count, make=make)


@pytest.mark.parametrize("hyper", [0.1, "lr", [0.1], [("lr", 0.1)], torch.tensor([0.1])], ids=repr)
def test_hyper_in_another_form(hyper: Any) -> None:
    refused(TypeError, "hyper must be a mapping of values, or a list with one mapping per group, got ", hyper)


def test_hyperparameters_that_were_not_called() -> None:
    hyper = metaopt.Hyperparameters(metaopt.functional.adam(), learn=("lr",))
    refused(TypeError, r"got Hyperparameters\(lr=0.001\): call it", hyper)


@pytest.mark.parametrize("hyper", [{"momentum": 0.9}, [{"momentum": 0.9}]])
def test_a_name_that_the_optimizer_does_not_have(hyper: Any) -> None:
    match = r"Adam has no hyperparameter 'momentum' \(got momentum=0.9\); it has lr, betas, eps, weight_decay"
    refused(TypeError, match, hyper)


@pytest.mark.parametrize(
    ("hyper", "match"),
    [
        ({"lr": -0.5}, "lr must be >= 0.0, got lr=-0.5"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0.0, 1.0\), got betas\[1\]=1.0"),
        ({"lr": {"weight": 0.1, "bias": -0.5}}, r"lr\['bias'\] must be >= 0.0, got .*-0.5"),
        ({"lr": lambda step: -0.5}, "lr must be >= 0.0, got lr=-0.5"),
        ({"lr": {"weight": 0.1}}, "lr has no value for parameter 'bias'"),
    ],
)
def test_a_number_outside_its_domain(hyper: Any, match: str) -> None:
    refused(ValueError, match, hyper)


@pytest.mark.parametrize("value", ["0.1", None, (0.1, 0.2)], ids=repr)
def test_a_value_of_another_type(value: Any) -> None:
    refused(TypeError, "lr must be a number, a tensor, .* got ", {"lr": value})


def test_step_sizes_of_a_group_in_the_wrong_order() -> None:
    """torch does not look at it."""
    make = lambda model: torch.optim.Rprop(model.parameters(), step_sizes=(1.0, 0.1))  # noqa: E731
    refused(ValueError, r"step_sizes\[1\] must be >= 1.0, got step_sizes\[1\]=0.1", make=make)


def test_inference_mode() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with (
        pytest.raises(RuntimeError, match=r"inference_mode\(\) rules out; use torch.no_grad\(\)"),
        torch.inference_mode(),
        metaopt.inner_loop(model, optimizer),
    ):
        raise AssertionError("entered")


def _live(model: nn.Module, fmodel: Any) -> Any:
    return model(torch.ones(1, 2)).sum()


def _without_graph(model: nn.Module, fmodel: Any) -> Any:
    with torch.no_grad():
        return fmodel(torch.ones(1, 2)).sum()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda model, fmodel: fmodel(torch.ones(3, 2)), r"loss must be a scalar tensor, got \(3, 1\)"),
        (lambda model, fmodel: 0.5, "loss must be a scalar tensor, got 0.5"),
        (_live, "loss depends on no parameter of fmodel: was it computed with the live model"),
        (_without_graph, "loss has no graph: compute it from fmodel, with gradients enabled"),
        (lambda model, fmodel: torch.tensor(1.0), "loss has no graph"),
        (lambda model, fmodel: fmodel(torch.ones(0, 2)), r"loss must be a scalar tensor, got \(0, 1\)"),
    ],
    ids=["not a scalar", "not a tensor", "live model", "no graph", "constant", "empty"],
)
def test_a_loss_that_cannot_be_stepped_on_changes_nothing(make: Any, match: str) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, optimizer)
    with metaopt.inner_loop(model, optimizer) as (fmodel, fopt):
        params = dict(fmodel.params)
        with pytest.raises(ValueError, match=match):
            fopt.step(make(model, fmodel))
        assert all(fmodel.params[name] is p for name, p in params.items())
        fopt.step(fmodel(torch.ones(1, 2)).sum())  # one can go on
        assert snapshot(model, optimizer) == before
        fopt.apply()
    assert all(int(entry["step"]) == 1 for entry in optimizer.state.values())


def test_a_value_that_turns_out_bad_in_a_later_group_changes_no_group() -> None:
    model = Quadratic()
    optimizer = torch.optim.SGD([{"params": [model.a]}, {"params": [model.b]}], lr=0.1)
    hyper = [{}, {"lr": lambda step: 0.1 if step == 0 else -0.1}]
    with metaopt.inner_loop(model, optimizer, hyper) as (fmodel, fopt):
        fopt.step(fmodel())
        params = dict(fmodel.params)
        with pytest.raises(ValueError, match=r"lr must be >= 0.0, got lr=-0.1"):
            fopt.step(fmodel())
        assert all(fmodel.params[name] is p for name, p in params.items())


def test_an_optimizer_with_nothing_to_train() -> None:
    model = nn.Linear(2, 1).requires_grad_(False)
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, fopt):
        loss = fmodel(torch.ones(1, 2, requires_grad=True)).sum()
        with pytest.raises(ValueError, match="the optimizer holds no parameter that requires grad"):
            fopt.step(loss)
