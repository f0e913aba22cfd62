"""`Schedule`: a value per step, by int, by tensor and under transforms, differentiable wherever it was read before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt import Schedule
from metaopt.functional import radam, sgd

F64 = torch.float64
VALUES = [0.5, 0.25, 0.125]


@pytest.fixture
def leaf() -> Tensor:
    return torch.tensor(VALUES, dtype=F64, requires_grad=True)


@pytest.mark.parametrize(("step", "value"), [(0, 0.5), (1, 0.25), (2, 0.125), (3, 0.125), (10**9, 0.125)])
def test_an_int_reads_its_step_and_the_last_value_is_held(step: int, value: float) -> None:
    schedule = Schedule(3, VALUES)
    assert schedule(step).item() == value
    assert schedule(torch.tensor(step)).item() == value
    assert schedule(step).shape == schedule(torch.tensor(step)).shape == ()


def test_a_number_stands_for_every_step() -> None:
    schedule = Schedule(steps=4, init=0.1)
    assert schedule.values.tolist() == [0.1] * 4
    assert len(schedule) == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_an_integer_tensor_of_any_shape_reads_each_of_its_steps(dtype: torch.dtype) -> None:
    steps = torch.tensor([[0, 2], [7, 1]], dtype=dtype)
    assert Schedule(3, VALUES)(steps).tolist() == [[0.5, 0.125], [0.125, 0.25]]


def test_numbers_are_kept_in_float64() -> None:
    assert Schedule(2, 0.1)(0).dtype == F64
    assert Schedule(2, torch.tensor([0.1, 0.2]))(1).item() == torch.tensor(0.2).item()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Schedule(0, 0.1), ValueError, "steps must be >= 1, got steps=0"),
        (lambda: Schedule(3, [0.1, 0.2]), ValueError, r"one per step \(3\), got init of shape \(2,\)"),
        (lambda: Schedule(3, torch.ones(3, 1)), ValueError, r"one per step \(3\), got init of shape \(3, 1\)"),
        (lambda: Schedule(3, VALUES)(-1), ValueError, "step must be >= 0, got step=-1"),
        (lambda: Schedule(3, VALUES)(torch.tensor(1.0)), TypeError, "integer tensor, got dtype torch.float32"),
    ],
)
def test_a_bad_argument_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("as_step", [int, torch.tensor])
def test_the_derivative_goes_to_the_step_read_and_the_held_value_collects_its_own(
    leaf: Tensor, as_step: Callable[[int], Any]
) -> None:
    schedule = Schedule(3, leaf)
    total = sum((step + 1.0) * schedule(as_step(step)) for step in range(5))
    (grad,) = torch.autograd.grad(total, leaf)
    assert grad.tolist() == [1.0, 2.0, 3.0 + 4.0 + 5.0]


@pytest.mark.parametrize(
    "before", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference_mode"]
)
@pytest.mark.parametrize("transformed", [False, True])
def test_the_derivative_does_not_depend_on_how_it_was_read_before(
    leaf: Tensor, before: Callable[[], Any], transformed: bool
) -> None:
    schedule = Schedule.of(leaf.exp())
    with before():
        schedule(1)
        if transformed:
            torch.func.grad(lambda x: x * schedule(1).to(x.dtype))(torch.ones(()))
    (grad,) = torch.autograd.grad(3.0 * schedule(1), leaf)
    torch.testing.assert_close(grad, torch.tensor([0.0, 3.0, 0.0], dtype=F64) * leaf.detach().exp(), rtol=1e-15, atol=0)


def test_it_can_be_read_at_batched_steps_and_with_batched_values() -> None:
    schedule = Schedule(3, VALUES)
    steps = torch.tensor([2, 0, 9])
    assert torch.vmap(schedule)(steps).tolist() == [0.125, 0.5, 0.125]

    values = torch.tensor([VALUES, [1.0, 2.0, 3.0]], dtype=F64)
    assert torch.vmap(lambda v: Schedule.of(v)(1))(values).tolist() == [0.25, 2.0]
    both = torch.vmap(lambda v, step: Schedule.of(v)(step))(values, torch.tensor([0, 2]))
    assert both.tolist() == [0.5, 3.0]


def test_a_mapping_of_schedules_is_a_pytree_of_their_values() -> None:
    tree = {"lr": Schedule(2, [1.0, 2.0]), "betas": (0.9, Schedule(2, [3.0, 4.0]))}
    doubled = pytree.tree_map(lambda leaf: leaf * 2, tree)
    assert doubled["lr"].values.tolist() == [2.0, 4.0]
    assert doubled["betas"][0] == 1.8
    assert doubled["betas"][1](0).item() == 6.0
    assert tree["lr"].values.tolist() == [1.0, 2.0]


def test_func_grad_goes_through_a_mapping_of_schedules() -> None:
    grads = torch.func.grad(lambda hyper: hyper["lr"](1) ** 2 + hyper["lr"](5))({"lr": Schedule(3, VALUES)})
    assert grads["lr"].values.tolist() == [0.0, 2 * 0.25, 1.0]


def test_a_reader_sees_its_length_and_ends() -> None:
    assert repr(Schedule(3, VALUES)) == "Schedule(steps=3, 0.5 to 0.125)"


def test_an_optimizer_reads_the_value_of_the_step_it_takes() -> None:
    """SGD on f(x) = x^2 / 2: x_t = x_0 times the product of 1 - lr_t."""
    opt = sgd(lr=Schedule(3, VALUES))
    params = torch.tensor([8.0], dtype=F64)
    state = opt.init(params)
    for _ in range(5):
        params, state = opt.step(params, params, state)
    assert params.item() == 8.0 * 0.5 * 0.75 * 0.875**3


def test_an_optimizer_reads_it_as_torch_does_when_its_group_is_set_before_each_step() -> None:
    live = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    optimizer = torch.optim.RAdam([live], foreach=False)
    ours = radam(lr=Schedule(7, [0.1 * 0.8**t for t in range(7)]), betas=(Schedule(2, [0.9, 0.8]), 0.99))
    params = live.detach().clone()
    state = ours.init(params)
    for t in range(9):
        optimizer.param_groups[0].update(lr=0.1 * 0.8 ** min(t, 6), betas=(0.9 if t == 0 else 0.8, 0.99))
        live.grad = live.detach().sin()
        optimizer.step()
        params, state = ours.step(params, params.sin(), state)
    torch.testing.assert_close(params, live.detach(), rtol=1e-13, atol=0)


def test_vmapped_training_reads_it_as_single_runs_do() -> None:
    opt = sgd(lr=Schedule(3, VALUES))
    starts = torch.tensor([[8.0], [-4.0]], dtype=F64)

    def train(params: Tensor) -> Tensor:
        state = opt.init(params)
        for _ in range(5):
            params, state = opt.step(params, params, state)
        return params

    assert torch.vmap(train)(starts).tolist() == [train(start).tolist() for start in starts]


def test_a_step_counter_that_is_batched_reads_each_its_own_step() -> None:
    """Two runs in one vmap, one of them a step ahead."""
    opt = sgd(lr=Schedule(3, VALUES))
    params = torch.tensor([8.0], dtype=F64)
    fresh = opt.init(params)
    _, ahead = opt.step(params, params, fresh)
    states = pytree.tree_map(lambda *leaves: torch.stack(leaves), fresh, ahead)
    new, _ = torch.vmap(lambda state: opt.step(params, params, state))(states)
    assert new.tolist() == [[8.0 * 0.5], [8.0 * 0.75]]
