"""Steps under vmap and torch.compile are those without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from metaopt.learned import LearnedOptimizer, MLPOptimizer
from tests.learned.problems import DESIGNS, big_steps, loss, start, unroll

each_design = pytest.mark.parametrize("design", DESIGNS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    counters.clear()


def assert_close(actual: Any, expected: Any, **tolerances: float) -> None:
    torch.testing.assert_close(pytree.tree_leaves(actual), pytree.tree_leaves(expected), **tolerances)


def batch_of_starts() -> tuple[Any, list[Any]]:
    """Three problems, together and each alone."""
    alone = [pytree.tree_map(lambda leaf, k=k: leaf * (1 + k / 2), start()) for k in range(3)]
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *alone), alone


@each_design
def test_problems_in_a_batch_are_trained_like_each_alone(design: type[LearnedOptimizer]) -> None:
    opt = big_steps(design)
    together, alone = batch_of_starts()
    result = torch.vmap(lambda params: unroll(opt, params, 4))(together)
    for index, params in enumerate(alone):
        assert_close(pytree.tree_map(lambda leaf, k=index: leaf[k], result), unroll(opt, params, 4))


@each_design
def test_weights_in_a_batch_are_those_of_several_optimizers(design: type[LearnedOptimizer]) -> None:
    opts = [big_steps(design), big_steps(design)]
    weights = {name: torch.stack([opt()["weights"][name] for opt in opts]) for name in opts[0]()["weights"]}
    params = start()
    result = torch.vmap(lambda w: unroll(opts[0], params, 4, weights=w)[0])(weights)
    for index, opt in enumerate(opts):
        assert_close(pytree.tree_map(lambda leaf, k=index: leaf[k], result), unroll(opt, start(), 4)[0])


@each_design
def test_parameters_replaced_by_functional_call_are_the_weights(design: type[LearnedOptimizer]) -> None:
    opt, other = big_steps(design), big_steps(design)
    values = torch.func.functional_call(opt, dict(other.named_parameters()), ())
    assert_close(unroll(opt, start(), 3, **values), unroll(other, start(), 3), rtol=0, atol=0)


@each_design
def test_a_compiled_step_is_the_plain_one_and_is_compiled_once(design: type[LearnedOptimizer]) -> None:
    opt = big_steps(design)
    weights = {name: p.detach() for name, p in opt.named_parameters()}
    step = torch.compile(lambda p, g, s, w: opt.step(p, g, s, weights=w), fullgraph=True, backend="aot_eager")
    params, state = start(), opt.init(start())
    for _ in range(3):
        params, state = step(params, torch.func.grad(loss)(params), state, weights)
    assert_close((params, state), unroll(opt, start(), 3))
    assert counters["stats"]["unique_graphs"] == 1


@each_design
def test_a_step_compiles_with_its_own_weights(design: type[LearnedOptimizer]) -> None:
    opt = big_steps(design)
    state, grads = opt.init(start()), torch.func.grad(loss)(start())
    step = torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    assert_close(step(start(), grads, state, lr=0.5), opt.step(start(), grads, state, lr=0.5))


def test_generated_code_takes_the_plain_step() -> None:
    opt = big_steps(MLPOptimizer, torch.float32).requires_grad_(False)
    together, _ = batch_of_starts()
    together = pytree.tree_map(lambda leaf: leaf.to(torch.float32), together)
    one = lambda p, s: opt.step(p, torch.func.grad(loss)(p), s)  # noqa: E731
    state = torch.vmap(opt.init)(together)
    assert_close(torch.compile(torch.vmap(one), fullgraph=True)(together, state), torch.vmap(one)(together, state))
