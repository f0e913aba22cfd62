"""Nothing is modified in place, and what comes out looks like what went in, for random trees of any dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_structure

from metaopt.functional import REGISTRY
from tests.functional.cases import pack
from tests.functional.snapshots import untouched
from tests.properties.strategies import DOUBLE, HALF, SINGLE, learned, runs, setups


@pytest.mark.parametrize("name", list(REGISTRY))
@given(st.data())
def test_no_input_is_modified_and_every_output_is_like_its_input(name: str, data: st.DataObject) -> None:
    """Parameters, gradients, states and hyperparameters, in the steps and in the backward pass."""
    setup, run = data.draw(setups(name)), data.draw(runs(HALF + SINGLE + DOUBLE))
    differentiated = data.draw(st.booleans())
    variables = {
        key: torch.tensor(value, dtype=torch.float64, requires_grad=differentiated)
        for key, value in learned(setup).items()
    }
    hyper, opt = pack({**setup.elements, **variables}), setup.opt
    params = run.params
    with untouched(params, hyper):
        states = [opt.init(params, **hyper)]
    for grads in run.grads:
        with untouched(params, grads, states, hyper):
            new, state = opt.step(params, grads, states[-1], **hyper)
        for field, tree in {"params": new, **state._asdict()}.items():
            assert tree_structure(tree) == tree_structure(params), field
            for got, like in zip(tree_leaves(tree), tree_leaves(params), strict=True):
                assert got.device == like.device
                if field == "step":
                    assert (got.dtype, got.shape) == (torch.float32, ())
                else:
                    assert (got.dtype, got.shape) == (like.dtype, like.shape)
        params = new
        states.append(state)
    outputs = [p for p in tree_leaves(params) if p.requires_grad]
    if outputs:
        with untouched(run.params, run.grads, states, params, hyper):
            torch.autograd.grad(
                outputs, list(variables.values()), [torch.ones_like(p) for p in outputs], allow_unused=True
            )
