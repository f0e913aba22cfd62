"""The numbers of a step: those of torch.optim, for every option and every kind of parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from metaopt.functional import REGISTRY, adam, radam, rprop
from tests.functional.cases import CASES, F64, FIRST_CASES, PEERS, Case, Problem, pack, train, train_torch

exactly = functools.partial(assert_close, rtol=0, atol=0, equal_nan=False)
FINE = {"rtol": 1e-12, "atol": 1e-12}


def states_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], field: str) -> dict[str, Any]:
    """A field of torch's states, by name of parameter."""
    return {name: optimizer.state[p].get(field) for name, p in params.items()}


def test_every_optimizer_has_a_peer_to_be_compared_with() -> None:
    assert PEERS.keys() == REGISTRY.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fifty_steps_equal_those_of_torch(case: Case, problem: Problem) -> None:
    params, state = train(case, problem, 50)
    expected, optimizer = train_torch(case, problem, 50)
    assert_close(params, {name: p.detach() for name, p in expected.items()}, **FINE)
    for field in state._fields:
        # torch's SGD keeps no step, and no buffer without momentum.
        known = {name: value for name, value in states_of(optimizer, expected, field).items() if value is not None}
        ours = {name: getattr(state, field)[name] for name in known}
        assert_close(ours, known, **FINE)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_the_states_fields_are_torchs_state_keys(case: Case, problem: Problem) -> None:
    optimizer = train_torch(case, problem, 1)[1]
    keys = {key for entry in optimizer.state.values() for key in entry}
    assert set(case.opt.State._fields) == keys | {"step"}  # torch's SGD does without a step
    assert case.opt.State._fields[0] == "step"


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_the_defaults_are_torchs(case: Case) -> None:
    theirs = case.peer([torch.zeros(1)]).defaults
    opt = REGISTRY[case.name]()
    for name, value in {**opt.defaults, **opt.flags}.items():
        assert value == theirs[name], name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensors_and_floats_give_the_same_trajectory_to_the_last_bit(case: Case, problem: Problem) -> None:
    tensors = {name: torch.tensor(value, dtype=F64) for name, value in case.elements.items()}
    exactly(train(case, problem, 12), train(case, problem, 12, pack(tensors)))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
@pytest.mark.parametrize("kind", [np.float64, lambda x: Fraction(str(x))], ids=["numpy", "fraction"])
def test_any_real_number_will_do(case: Case, kind: Callable[[float], Any], problem: Problem) -> None:
    numbers = {name: kind(value) for name, value in case.elements.items()}
    exactly(train(case, problem, 8, pack(numbers)), train(case, problem, 8))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_constant_tensors_of_any_shape_equal_the_number(case: Case, problem: Problem) -> None:
    shapes = {"hidden.weight": (8, 5), "hidden.bias": (1,), "out.weight": (8,), "phase": (3,), "empty": (1, 3)}
    tensors = {
        key: {name: torch.full(shapes.get(name, ()), value, dtype=F64) for name in problem.params}
        for key, value in case.elements.items()
    }
    exactly(train(case, problem, 8, pack(tensors)), train(case, problem, 8))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_values_by_name_equal_torchs_parameter_groups(case: Case, problem: Problem) -> None:
    factors = dict(zip(problem.params, (1.0, 0.9, 0.95, 0.97, 0.99, 1.0), strict=True))
    ours = {key: {name: value * factor for name, factor in factors.items()} for key, value in case.elements.items()}
    theirs = lambda name, _: pack({key: value * factors[name] for key, value in case.elements.items()})  # noqa: E731
    expected = train_torch(case, problem, 20, theirs)[0]
    params = train(case, problem, 20, pack(ours))[0]
    assert_close(params, {name: p.detach() for name, p in expected.items()}, **FINE)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_callables_are_given_the_number_of_steps_that_the_parameter_took(case: Case, problem: Problem) -> None:
    decay = 0.995
    ours = {key: lambda step, value=value: value * decay**step for key, value in case.elements.items()}
    theirs = lambda _, count: pack({key: value * decay**count for key, value in case.elements.items()})  # noqa: E731
    expected = train_torch(case, problem, 20, theirs)[0]
    params = train(case, problem, 20, pack(ours))[0]
    assert_close(params, {name: p.detach() for name, p in expected.items()}, **FINE)


@pytest.mark.parametrize("case", [c for c in FIRST_CASES if "betas" in c.options or "etas" in c.options], ids=str)
def test_a_callable_may_give_a_pair(case: Case, problem: Problem) -> None:
    pairs = {key: (lambda step, value=value: value) for key, value in case.opt.defaults.items()}
    exactly(train(case, problem, 8, pairs), train(case, problem, 8))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_a_callable_gets_a_python_int(case: Case, problem: Problem) -> None:
    seen = []
    name, value = list(case.opt.defaults.items())[-1]
    train(case, problem, 5, {name: lambda step: seen.append(step) or value})
    assert {type(step) for step in seen} == {int}
    assert set(seen) == set(range(5))


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_per_element_values_treat_each_element_as_its_own_value_would(case: Case) -> None:
    gradients = torch.randn(10, 3, dtype=F64)
    start = torch.randn(3, dtype=F64)
    factors = torch.tensor([1.0, 0.95, 0.9], dtype=F64)

    def run(hyper: dict[str, Any]) -> Tensor:
        params, state = start, case.opt.init(start, **pack(hyper))
        for gradient in gradients:
            params, state = case.opt.step(params, gradient, state, **pack(hyper))
        return params

    together = run({key: value * factors for key, value in case.elements.items()})
    alone = [
        run({key: value * float(factor) for key, value in case.elements.items()})[i] for i, factor in enumerate(factors)
    ]
    exactly(together, torch.stack(alone))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_follows_torchs_float32(case: Case) -> None:
    problem = Problem(torch.float32)
    params = train(case, problem, 20)[0]
    expected = train_torch(case, problem, 20)[0]
    assert all(p.dtype == problem.params[name].dtype for name, p in params.items())
    assert_close(params, {name: p.detach() for name, p in expected.items()}, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_is_a_float32_step_rounded_once(case: Case, dtype: torch.dtype) -> None:
    """Each step starts from our rounded numbers: torch, in float32, must come out within half a unit of ours."""
    problem = Problem(torch.float32)
    params = {name: p.to(dtype) for name, p in problem.params.items() if not p.is_complex()}
    number = torch.finfo(dtype)
    half_a_unit = {"rtol": 1.01 * number.eps / 2, "atol": number.smallest_normal * number.eps}
    opt = case.opt
    state = opt.init(params)
    kept: set[str] = set()
    for _ in range(12):
        grads = {name: torch.randn(p.shape).to(dtype) for name, p in params.items()}
        live = {name: p.float().requires_grad_() for name, p in params.items()}
        optimizer = case.torch_optimizer(list(live.values()))
        for name, p in live.items():
            p.grad = grads[name].float()
            optimizer.state[p].update({field: getattr(state, field)[name].float().clone() for field in kept})
        if case.name == "rprop":  # the first step size is lr, already rounded
            for name, p in live.items():
                optimizer.state[p].update({field: v[name].float().clone() for field, v in state._asdict().items()})
        optimizer.step()
        params, state = opt.step(params, grads, state)
        for name, p in live.items():
            assert params[name].dtype == dtype
            assert_close(params[name].float(), p.detach(), **half_a_unit)
            # What torch does not keep (SGD's buffer without momentum) is not loaded either.
            kept = {field for field in state._fields if optimizer.state[p].get(field) is not None}
            for field in kept - {"step"}:
                ours = getattr(state, field)[name]
                assert ours.dtype == dtype
                assert_close(ours.float(), optimizer.state[p][field], **half_a_unit)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_extreme_gradients_are_treated_as_by_torch(case: Case, dtype: torch.dtype) -> None:
    """At 1e20 the product of squares overflows in float32 unless it is formed in torch's order."""
    tolerance = 1e-12 if dtype == F64 else 1e-5
    huge = torch.tensor([1e20, -1e20, 1e-20, 0.0, 1.0, -1.0], dtype=dtype)
    gradients = [huge, huge, -huge, torch.zeros(6, dtype=dtype), *torch.randn(8, 6, dtype=dtype)]
    params = live = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0], dtype=dtype)
    live = live.clone().requires_grad_()
    optimizer, state = case.torch_optimizer([live]), case.opt.init(params)
    for gradient in gradients:
        live.grad = gradient.clone()
        optimizer.step()
        params, state = case.opt.step(params, gradient, state)
        kept = {field: value for field, value in optimizer.state[live].items() if value is not None}
        close = functools.partial(assert_close, rtol=tolerance, atol=tolerance, equal_nan=True)
        close(params, live.detach())
        close({field: getattr(state, field) for field in kept}, kept)
        # With beta2 = 0 the square itself is stored, and torch's overflows too.
        assert bool(live.isfinite().all()) or case.elements["betas[1]"] == 0


@pytest.mark.parametrize("size", [1, 4099], ids=["operations", "kernel"])
def test_a_tiny_step_size_over_a_tiny_denominator_does_not_overflow(size: int) -> None:
    """At beta2 = eps = 0 the first moment is 1e40 times the root of the second; torch multiplies by lr first."""
    options = {"lr": 1e-12, "betas": (0.9, 0.0), "eps": 0.0}
    params = live = torch.zeros(size)
    live = live.clone()
    opt, optimizer = adam(**options), torch.optim.Adam([live], **options, foreach=False)
    state = opt.init(params)
    for value in (1e19, 1e-22):
        live.grad = torch.full((size,), value)
        params, state = opt.step(params, live.grad, state)
        optimizer.step()
    assert_close(params, live, rtol=1e-6, atol=0)
    assert bool((live < -1e28).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_an_infinite_eta_leads_to_the_largest_step_size_at_once(dtype: torch.dtype) -> None:
    """And is multiplied by 0 for an element that keeps its step size, or shrinks it."""
    params = live = torch.zeros(3, dtype=dtype)
    live = live.clone()
    options = {"lr": 0.25, "etas": (0.5, float("inf"))}
    opt, optimizer = rprop(**options), torch.optim.Rprop([live], **options, foreach=False)
    state = opt.init(params)
    for grad in ([1.0, 1.0, 0.0], [1.0, -1.0, 0.0]):
        live.grad = torch.tensor(grad, dtype=dtype)
        params, state = opt.step(params, live.grad, state)
        optimizer.step()
    exactly(params, live)
    assert state.step_size.tolist() == [50.0, 0.125, 0.25]


def rectified_exactly(beta2: float, step: int) -> bool:
    """rho_t > 5 in exact arithmetic."""
    b = Fraction(beta2)
    rho_inf = 2 / (1 - b) - 1
    return rho_inf - 2 * step * b**step / (1 - b**step) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("beta2", [0.5, 0.7, 0.75, 0.8, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-5, 1 - 1e-6])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_radam_rectifies_at_the_exact_step_in_every_dtype(beta2: float, dtype: torch.dtype, as_tensor: bool) -> None:
    """Under a gradient of 1 and beta1 = 0 a plain step has the length lr, a rectified one less: its factor is < 1."""
    opt = radam(lr=1.0, betas=(0.0, torch.tensor(beta2, dtype=F64) if as_tensor else beta2))
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    state = opt.init(zero)
    for step in range(1, 13):
        moved, state = opt.step(zero, one, state)
        assert (moved.item() > -0.99) == rectified_exactly(beta2, step), step


def test_radam_on_a_quadratic_reaches_the_published_number() -> None:
    """Eight steps on (x1^2 + 2 x2^2 + 3 x3^2) / 2 from (1, 2, 3)."""
    curvature = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    opt = radam(lr=0.1)
    x, state = curvature, opt.init(curvature)
    for _ in range(8):
        x, state = opt.step(x, curvature * x, state)
    assert abs(x.square().sum().item() - 0.489775845062415) < 1e-14
