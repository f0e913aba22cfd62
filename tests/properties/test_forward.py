"""The numbers of a step for random trees, hyperparameters and gradients: torch's, and those of exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from metaopt.functional import REGISTRY
from metaopt.functional.optimizer import compute_dtype
from tests.properties.arithmetic import Exact, Rounded, exactly
from tests.properties.reference import trajectory
from tests.properties.strategies import (
    DOUBLE,
    HALF,
    SINGLE,
    STARTS,
    Run,
    Setup,
    runs,
    setups,
    sized,
)

NAMES = list(REGISTRY)


def ours(setup: Setup, run: Run, hyper: dict[str, Any] | None = None) -> Iterator[tuple[list[Tensor], list[list[Any]]]]:
    """After each step, the leaves: of the parameters, and of each field of the state."""
    opt, hyper = setup.opt, hyper or {}
    params, state = run.params, opt.init(run.params, **hyper)
    for grads in run.grads:
        params, state = opt.step(params, grads, state, **hyper)
        yield tree_leaves(params), [tree_leaves(field) for field in state]


def torchs(setup: Setup, run: Run) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """After each step, the parameters, and the state of each."""
    live = [p.clone() for p in tree_leaves(run.params)]
    optimizer = setup.torch_optimizer([*live, torch.zeros(0)])  # which wants at least one
    for grads in run.grads:
        for p, grad in zip(live, gradients(grads), strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
        yield live, [optimizer.state[p] for p in live]


def gradients(tree: Any) -> list[Tensor | None]:
    return tree_leaves(tree)


def real(x: Tensor) -> np.ndarray:
    """Its numbers in float64; complex ones are pairs."""
    return (torch.view_as_real(x) if x.is_complex() else x).to(torch.float64).numpy()


class Bounds:
    """How far a computation of one parameter may be off by rounding, step by step: of it and of its state."""

    def __init__(self, setup: Setup, param: Tensor, *, torchs: bool) -> None:
        numbers, start = Rounded(compute_dtype(param), torchs), real(param)
        self.number, self.grads = numbers.number, list[Any]()
        self.now = [np.zeros_like(start)] * 3
        # Rprop adds up no products: equal to the last bit.
        self.moves = setup.name != "rprop"
        self.steps = trajectory(
            setup.name, setup.exact, numbers, self.number(start), self.number(np.zeros_like(start)), iter(self.grads)
        )

    def step(self, grad: Tensor) -> None:
        if self.moves:
            self.grads.append(self.number(real(grad)))
            with exactly(), np.errstate(all="ignore"):
                self.now = [x.error for x in next(self.steps)]


def assert_within(got: Tensor, expected: Tensor, bound: np.ndarray, what: str) -> None:
    """Finite and near wherever what is expected is finite. A bound that is NaN or infinite allows any finite number."""
    mine, theirs = real(got), real(expected)
    finite = np.isfinite(theirs)
    with np.errstate(all="ignore"):
        near = ~(np.abs(mine - theirs) > bound) & np.isfinite(mine)
    assert bool(near[finite].all()), f"{what}: {got} for {expected}, off by more than {bound}"


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_every_step_is_torchs_wherever_torch_is_finite(name: str, data: st.DataObject) -> None:
    """Parameter and state, up to twice what either may be off by rounding; a missing gradient leaves both alone."""
    setup, run = data.draw(setups(name)), data.draw(runs(SINGLE + DOUBLE))
    bounds = [Bounds(setup, p, torchs=True) for p in tree_leaves(run.params)]
    taken = [0] * len(bounds)
    for grads, mine, theirs in zip(run.grads, ours(setup, run), torchs(setup, run), strict=True):
        for index, grad in enumerate(gradients(grads)):
            if grad is not None:
                taken[index] += 1
                bounds[index].step(grad)
            param, state = theirs[0][index], theirs[1][index]
            error, *errors = bounds[index].now
            step, *parts = (field[index] for field in mine[1])
            assert step == taken[index]
            assert_within(mine[0][index], param, 2 * error, "parameter")
            for key, part, bound in zip(setup.opt.State._fields[1:], parts, errors, strict=False):
                if state.get(key) is not None:  # torch's SGD keeps no buffer without momentum
                    assert_within(part, state[key], 2 * bound, key)


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_a_half_precision_step_is_the_float32_step_rounded_once(name: str, data: st.DataObject) -> None:
    setup, run = data.draw(setups(name)), data.draw(runs(HALF))
    opt, params = setup.opt, run.params
    state = opt.init(params)
    for grads in run.grads:
        full = opt.step(*(tree_map(single, tree) for tree in (params, grads, state)))
        params, state = opt.step(params, grads, state)
        for got, expected in zip(tree_leaves((params, state)), tree_leaves(full), strict=True):
            assert_close(got, expected.to(got.dtype), rtol=0, atol=0, equal_nan=True)


def single(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_float_and_tensor_hyperparameters_give_the_same_numbers(name: str, data: st.DataObject) -> None:
    """To the last bit, wherever the number's trajectory has been finite: a tensor of 0 still multiplies."""
    setup, run = data.draw(setups(name, nearest=7.0)), data.draw(runs(HALF + SINGLE + DOUBLE))
    tensors = tree_map(lambda x: torch.tensor(x, dtype=torch.float64), setup.hyper)
    finite = [np.isfinite(real(p)) for p in tree_leaves(run.params)]
    for by_number, by_tensor in zip(ours(setup, run), ours(setup, run, tensors), strict=True):
        for index, p in enumerate(by_number[0]):
            finite[index] &= np.isfinite(real(p))
            for number, tensor in ((p, by_tensor[0][index]), *fields(by_number, by_tensor, index)):
                np.testing.assert_array_equal(real(number)[finite[index]], real(tensor)[finite[index]])


def fields(a: tuple[Any, Any], b: tuple[Any, Any], index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A parameter's parts of two states, without the step."""
    return ((x[index], y[index]) for x, y in zip(a[1][1:], b[1][1:], strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rprop"])
@given(st.data())
def test_every_step_is_that_of_exact_arithmetic_up_to_rounding(name: str, data: st.DataObject) -> None:
    """For betas up to 1 - 1e-7, where torch's own coefficients are off; one parameter, in float64."""
    setup = data.draw(setups(name, nearest=7.0))
    start = data.draw(STARTS)
    grads = data.draw(st.lists(sized([-40, -20, 20, 40]), min_size=1, max_size=8))
    run = Run(torch.tensor(start, dtype=torch.float64), [torch.tensor(g, dtype=torch.float64) for g in grads])
    bounds = Bounds(setup, run.params, torchs=False)
    with exactly():
        numbers = (Decimal(start), Decimal(0), map(Decimal, grads))
        exact = trajectory(name, setup.exact, Exact, *numbers)
        for grad, (params, state) in zip(run.grads, ours(setup, run), strict=True):
            bounds.step(grad)
            try:
                expected = next(exact)
            except ArithmeticError:  # 0 / 0, without eps
                assert not params[0].isfinite()
                return
            parts = (params[0], *(field[0] for field in state[1:]))
            for got, number, bound in zip(parts, expected, bounds.now, strict=False):
                if np.isfinite(bound):  # else rounding decides what is divided by 0
                    assert abs(Decimal(got.item()) - number) <= Decimal(float(bound)), (got, float(number), bound)
