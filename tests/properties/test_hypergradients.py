"""Derivatives by every hyperparameter through random unrolls: finite, and those of exact arithmetic."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metaopt.functional import REGISTRY
from tests.functional.cases import pack
from tests.properties.arithmetic import ROUNDING, exactly
from tests.properties.duals import Dual, ExactDuals
from tests.properties.reference import trajectory
from tests.properties.strategies import STARTS, Run, Setup, learned, runs, setups, sized, spread

NAMES = list(REGISTRY)

# Of which sizes gradients may be, if not 0: in float32 the squares of others are 0 or infinite.
SIZES = {torch.float32: spread(-15, 15), torch.float64: spread(-40, 40)}


def unroll(setup: Setup, run: Run) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor], list[Tensor]]:
    """The final parameters, the hyperparameters, the initial parameters, and all numbers in between."""
    hyper = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in learned(setup).items()}
    params = tree_map(lambda p: p.clone().requires_grad_(), run.params)
    opt, values = setup.opt, pack({**setup.elements, **hyper})
    state, start, between = opt.init(params, **values), tree_leaves(params), []
    for grads in run.grads:
        params, state = opt.step(params, grads, state, **values)
        between += [x for x in tree_leaves((params, state)) if x.requires_grad]
    return tree_leaves(params), hyper, start, between


def derivatives(final: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum of the final parameters with weights of both signs."""
    loss = sum((torch.cos(torch.arange(p.numel()).to(p)) @ p.flatten() for p in final), torch.zeros(()))
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def are_finite(tensors: list[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_every_hypergradient_is_finite(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """If the unroll itself is; in float32 also if the derivative by every number on the way is a float32 number."""
    setup = data.draw(setups(name, nearest=7.0, with_eps=True))
    run = data.draw(runs([dtype], SIZES))
    assume(tree_leaves(run.params))
    final, hyper, start, between = unroll(setup, run)
    assume(are_finite(between))
    if dtype == torch.float32:
        double = Run(*(tree_map(lambda x: None if x is None else x.double(), tree) for tree in (run.params, run.grads)))
        last, others, first, on_the_way = unroll(setup, double)
        exact = derivatives(last, [*others.values(), *first, *on_the_way])
        assume(all(bool((x.abs() < torch.finfo(dtype).max / 100).all()) for x in exact))
    inputs = {**hyper, **{f"start {index}": p for index, p in enumerate(start)}}
    for key, derivative in zip(inputs, derivatives(final, list(inputs.values())), strict=True):
        assert are_finite([derivative]), (key, derivative)


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_every_hypergradient_is_that_of_exact_arithmetic(name: str, data: st.DataObject) -> None:
    """Up to 16 roundings a step of what it is summed from. One parameter, in float64."""
    setup = data.draw(setups(name, nearest=7.0, with_eps=True))
    start = data.draw(STARTS)
    grads = data.draw(st.lists(sized([-10, -3, 3, 10]), min_size=1, max_size=8))
    run = Run(torch.tensor(start, dtype=torch.float64), [torch.tensor(g, dtype=torch.float64) for g in grads])
    final, hyper, first, _ = unroll(setup, run)
    inputs = {**hyper, "start": first[0]}
    for key, got in zip(inputs, derivatives(final, list(inputs.values())), strict=True):
        with exactly():
            exact = exact_derivative(setup, start, grads, key)
            if exact is None:
                continue
            error = abs(Decimal(got.item()) - exact.slope)
            assert error <= Decimal(16 * len(grads) * ROUNDING) * exact.steep, (key, got, float(exact.slope))


def exact_derivative(setup: Setup, start: float, grads: list[float], key: str) -> Dual | None:
    """The parameter after the last step as a function of one element; None where it is no smooth one."""
    elements = {name: Dual.of(value, slope=name == key) for name, value in setup.elements.items()}
    options = {**setup.exact, **pack(elements)}
    first = Dual.of(start, slope=key == "start")
    try:
        *_, last = trajectory(setup.name, options, ExactDuals, first, Dual.of(0), map(Dual.of, grads))
    except ArithmeticError:
        return None
    return last[0]
