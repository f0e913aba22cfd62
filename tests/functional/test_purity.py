"""Pure functions on pytrees: nothing is modified, and the shape of the tree is the user's choice."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from metaopt.functional import REGISTRY, Optimizer
from tests.functional.cases import CASES, F64, FIRST_CASES, Case, Problem, pack
from tests.functional.snapshots import untouched


def exactly(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["constants", "learned"])
def test_init_and_step_modify_nothing(case: Case, learned: bool) -> None:
    """Neither the first step, which starts from zeros, nor the seventh, which RAdam rectifies, nor one in between."""
    opt, params = case.opt, Problem().params
    values = {key: torch.tensor(value, dtype=F64, requires_grad=learned) for key, value in case.elements.items()}
    hyper = pack(values)
    if learned:
        for p in params.values():
            p.requires_grad_()
    with untouched(params, hyper):
        state = opt.init(params, **hyper)
    for _ in range(7):
        grads: dict[str, Tensor | None] = {name: torch.randn_like(p) for name, p in params.items()}
        grads["hidden.bias"] = None
        with untouched(params, grads, state, hyper):
            params, state = opt.step(params, grads, state, **hyper)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_an_optimizer_follows_the_protocol(case: Case) -> None:
    opt = case.opt
    assert isinstance(opt, Optimizer)
    assert tuple(opt.defaults) == opt.hyperparameters
    with pytest.raises(TypeError):
        opt.defaults["lr"] = 1.0
    assert all(f"{name}={value!r}" in repr(opt) for name, value in {**opt.defaults, **case.options}.items())


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_a_state_has_the_structure_of_the_parameters_field_by_field(case: Case) -> None:
    params = {"a": [torch.ones(2, 3), torch.ones(())], "b": (torch.ones(1, dtype=torch.complex64),)}
    state = case.opt.init(params)
    state = case.opt.step(params, params, state)[1]
    for name, field in state._asdict().items():
        assert tree_structure(field) == tree_structure(params)
        for leaf, p in zip(tree_leaves(field), tree_leaves(params), strict=True):
            assert leaf.shape == (() if name == "step" else p.shape)
            assert leaf.dtype == (torch.float32 if name == "step" else p.dtype)
    assert {step.item() for step in tree_leaves(state.step)} == {1}


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_a_missing_gradient_leaves_its_parameter_and_its_state_alone(case: Case, problem: Problem) -> None:
    opt, params = case.opt, problem.params
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    params, state = opt.step(params, grads, opt.init(params))
    new_params, new_state = opt.step(params, {**grads, "out.weight": None}, state)
    assert new_params["out.weight"] is params["out.weight"]
    for old, new in zip(state, new_state, strict=True):
        assert new["out.weight"] is old["out.weight"]
    expected_params, expected_state = opt.step(params, grads, state)
    for name in params.keys() - {"out.weight"}:
        assert new_state.step[name] == 2
        exactly(new_params[name], expected_params[name])
        exactly([field[name] for field in new_state], [field[name] for field in expected_state])


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_without_any_gradient_nothing_changes(case: Case, problem: Problem) -> None:
    state = case.opt.init(problem.params)
    params, new_state = case.opt.step(problem.params, dict.fromkeys(problem.params), state)
    exactly(params, problem.params)
    exactly(new_state, state)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_the_order_of_a_dicts_keys_does_not_matter(case: Case, problem: Problem) -> None:
    opt, params = case.opt, problem.params
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    backwards = lambda tree: dict(reversed(tree.items()))  # noqa: E731
    state = opt.init(params)
    expected = opt.step(params, grads, state)
    assert list(expected[0]) == list(params)
    exactly(opt.step(params, backwards(grads), type(state)(*map(backwards, state))), expected)


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_any_pytree_gives_what_its_leaves_would_alone(case: Case) -> None:
    opt = case.opt
    w = [torch.randn(2, 3, dtype=F64), torch.randn((), dtype=F64), torch.randn(4, dtype=F64), torch.randn(1, dtype=F64)]
    trees = [
        {"layers": [{"weight": w[0]}, {"weight": w[1]}], "head": (w[2], w[3])},
        [w[0], [w[1], (w[2],)], w[3]],
        OrderedDict(a=Pair(w[0], w[1]), b=Pair(w[2], [w[3]])),
        w[0],
        {},
    ]
    for tree in trees:
        params, state = tree, opt.init(tree)
        grads = tree_map(torch.sin, tree)
        for _ in range(2):
            params, state = opt.step(params, grads, state)
        assert tree_structure(params) == tree_structure(tree)
        for start, got in zip(tree_leaves(tree), tree_leaves(params), strict=True):
            alone, own = start, opt.init(start)
            for _ in range(2):
                alone, own = opt.step(alone, start.sin(), own)
            exactly(got, alone)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_names_in_a_nested_tree_are_dotted_as_in_a_module(case: Case) -> None:
    params = {"layers": [{"weight": torch.ones(2)}, {"weight": torch.ones(3)}], "head": (torch.ones(1),)}
    rates = {"layers.0.weight": 0.1, "layers.1.weight": 0.2, "head.0": 0.3}
    opt = REGISTRY[case.name]()
    new = opt.step(params, params, opt.init(params, lr=rates), lr=rates)[0]
    leaves = dict(zip(rates, (new["layers"][0]["weight"], new["layers"][1]["weight"], new["head"][0]), strict=True))
    for name, leaf in leaves.items():
        lonely = torch.ones(1)
        expected = opt.step(lonely, lonely, opt.init(lonely, lr=rates[name]), lr=rates[name])[0]
        exactly(leaf, expected.expand_as(leaf))
        assert not expected.equal(lonely)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_a_pair_may_be_a_mapping_of_pairs_or_a_pair_of_mappings(case: Case, problem: Problem) -> None:
    opt, names = case.opt, list(problem.params)
    grads = {name: p.sin() for name, p in problem.params.items()}
    state = opt.init(problem.params)
    by_name = {key: dict.fromkeys(names, value) for key, value in opt.defaults.items()}
    by_side = pack({key: dict.fromkeys(names, value) for key, value in case.elements.items()})
    expected = opt.step(problem.params, grads, state)
    exactly(opt.step(problem.params, grads, state, **by_name), expected)
    exactly(opt.step(problem.params, grads, state, **by_side), expected)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_the_memory_layout_does_not_matter(case: Case) -> None:
    opt = case.opt
    params, grads = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    layouts = [params.t().contiguous().t(), torch.stack([params, params], dim=2)[..., 0]]
    expected = opt.step(params, grads, opt.init(params))
    for p in layouts:
        assert not p.is_contiguous()
        exactly(opt.step(p, grads, opt.init(p)), expected)
        exactly(opt.step(params, p - params + grads, opt.init(params)), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "duplicate", [lambda opt: pickle.loads(pickle.dumps(opt)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_a_copy_does_the_same(case: Case, duplicate: Any, problem: Problem) -> None:
    opt, params = case.opt, problem.params
    again = duplicate(opt)
    assert again is not opt
    assert repr(again) == repr(opt)
    grads = {name: p.sin() for name, p in params.items()}
    state = opt.init(params)
    exactly(again.init(params), state)
    exactly(again.step(params, grads, duplicate(state)), opt.step(params, grads, state))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_tensors_and_mappings_as_defaults_survive_pickling(case: Case) -> None:
    tensors = pack({key: {"w": torch.tensor(value, dtype=F64)} for key, value in case.elements.items()})
    opt = REGISTRY[case.name](**tensors)
    again = pickle.loads(pickle.dumps(opt))
    params = {"w": torch.ones(3)}
    state = opt.init(params)
    exactly(again.step(params, params, state), opt.step(params, params, state))
