"""The drop-ins with ``differentiable=True``: any number of steps unrolled, every hyperparameter reached."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt import optim
from tests.optim.problem import (
    F64,
    FUNCTIONAL,
    PAIRS,
    PROBLEM,
    STEPS,
    differentiable_steps,
    distance,
    functional_steps,
    learned,
    leaves,
    name_of,
    plain_steps,
    tensors,
)

TOLERANCE = 1e-12
TORCH = dict(PAIRS)

# Flags, and values for every hyperparameter.
CASES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (optim.RAdam, {}, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (
        optim.RAdam,
        {"decoupled_weight_decay": True},
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    ),
    (optim.RAdam, {"maximize": True}, {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.05}),
    (optim.RAdam, {"maximize": True}, {"lr": 0.05, "betas": (0.9, 0.6), "eps": 1e-2, "weight_decay": 0.05}),
    (optim.Rprop, {}, {"lr": 0.03, "etas": (0.5, 1.3), "step_sizes": (0.018, 0.08)}),
    (optim.Rprop, {"maximize": True}, {"lr": 0.03, "etas": (0.5, 1.3), "step_sizes": (0.018, 0.08)}),
]
each_case = pytest.mark.parametrize(("kind", "flags", "values"), CASES, ids=name_of)
each_kind = pytest.mark.parametrize("kind", [optim.RAdam, optim.Rprop], ids=name_of)


def first_values(kind: Any) -> dict[str, Any]:
    return next(values for other, _, values in CASES if other is kind)


def sign_of(flags: Mapping[str, Any]) -> float:
    return -1.0 if flags.get("maximize") else 1.0


def gradients(loss: Tensor, hyper: Any, start: Mapping[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*tensors(hyper), *start.values()], retain_graph=True))


def assert_equal_slopes(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert bool(ours.isfinite().all())
        assert distance(ours, theirs) <= tolerance


def unroll(
    kind: Any, flags: Mapping[str, Any], hyper: Mapping[str, Any], start: Mapping[str, Tensor], **more: Any
) -> dict[str, Tensor]:
    """By the drop-in."""
    params = {name: p.clone() for name, p in start.items()}
    optimizer = kind(params.values(), **flags, **hyper, differentiable=True)
    differentiable_steps(optimizer, params, sign=sign_of(flags), **more)
    return params


def unroll_functional(
    kind: Any, flags: Mapping[str, Any], hyper: Mapping[str, Any], start: Mapping[str, Tensor], **more: Any
) -> dict[str, Tensor]:
    return functional_steps(FUNCTIONAL[kind](**flags), start, hyper, sign=sign_of(flags), **more)


def train_torch(kind: Any, flags: Mapping[str, Any], values: Mapping[str, Any], start: Mapping[str, Tensor]) -> Any:
    params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    plain_steps(TORCH[kind](params.values(), **flags, **values), params, sign=sign_of(flags))
    return params


def difference(f: Any, x: float) -> tuple[float, float]:
    """The derivative of f at x by central differences of fourth order, and the rounding error to expect of it."""
    h = 1e-3 * min(x, abs(1 - x)) or 1e-5
    values = [float(f(x + k * h)) for k in (1, -1, 2, -2)]
    slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
    return slope, 2.0**-50 * abs(values[0]) / h


# Numbers.


@each_case
def test_trajectory_equals_the_one_that_is_not_differentiable(kind: Any, flags: Any, values: Any) -> None:
    start = leaves()
    expected = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    reference = kind(expected.values(), **flags, **values)
    params = {name: p.clone() for name, p in start.items()}
    optimizer = kind(params.values(), **flags, **values, differentiable=True)
    for _ in range(30):
        differentiable_steps(optimizer, params, 1, sign=sign_of(flags))
        plain_steps(reference, expected, 1, sign=sign_of(flags))
        for name, p in expected.items():
            assert distance(params[name], p) <= TOLERANCE
    for p, q in zip(params.values(), expected.values(), strict=True):
        assert list(optimizer.state[p]) == list(reference.state[q])
        for field, value in reference.state[q].items():
            assert distance(optimizer.state[p][field], value) <= TOLERANCE


@each_case
def test_gradients_equal_those_of_the_functional_optimizer(kind: Any, flags: Any, values: Any) -> None:
    start, hyper = leaves(), learned(values)
    params = unroll(kind, flags, hyper, start)
    expected = unroll_functional(kind, flags, hyper, start)
    for name, p in expected.items():
        assert distance(params[name], p) <= TOLERANCE
    slopes = [gradients(PROBLEM.meta_loss(end), hyper, start) for end in (params, expected)]
    assert_equal_slopes(*slopes)


@each_case
def test_gradients_equal_finite_differences_of_torch(kind: Any, flags: Any, values: Any) -> None:
    start, hyper = leaves(), learned(values)
    slopes = gradients(PROBLEM.meta_loss(unroll(kind, flags, hyper, start)), hyper, start)
    flat = [float(value.detach()) for value in tensors(hyper)]

    def pack(numbers: list[float]) -> dict[str, Any]:
        rest = iter(numbers)
        return {
            name: tuple(next(rest) for _ in value) if isinstance(value, tuple) else next(rest)
            for name, value in values.items()
        }

    for index, value in enumerate(flat):

        def f(x: float, index: int = index) -> Tensor:
            changed = pack([*flat[:index], x, *flat[index + 1 :]])
            return PROBLEM.meta_loss(train_torch(kind, flags, changed, start)).detach()

        expected, rounding = difference(f, value)
        assert abs(float(slopes[index]) - expected) <= 1e-8 * abs(expected) + rounding

    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, dtype=F64, generator=generator) for name, p in start.items()}

    def along(t: float) -> Tensor:
        moved = {name: p.detach() + t * direction[name] for name, p in start.items()}
        return PROBLEM.meta_loss(train_torch(kind, flags, values, moved)).detach()

    expected, rounding = difference(along, 0.0)
    slope = sum(float((s * d).sum()) for s, d in zip(slopes[len(flat) :], direction.values(), strict=True))
    assert abs(slope - expected) <= 1e-8 * abs(expected) + rounding


@pytest.mark.parametrize("decoupled", [False, True])
def test_dead_coordinates_and_values_at_0_have_finite_gradients(decoupled: bool) -> None:
    """Weights whose gradients are exactly 0, a weight decay and a beta1 of exactly 0, also as tensors."""
    flags = {"decoupled_weight_decay": decoupled}
    values = {"lr": 0.05, "betas": (0.0, 0.95), "eps": 1e-3, "weight_decay": 0.0}
    start, hyper = leaves(), learned(values)
    params = unroll(optim.RAdam, flags, hyper, start)
    slopes = gradients(PROBLEM.meta_loss(params), hyper, start)
    expected = unroll_functional(optim.RAdam, flags, hyper, start)
    assert_equal_slopes(slopes, gradients(PROBLEM.meta_loss(expected), hyper, start))
    assert all(bool((slope != 0).any()) for slope in slopes)
    assert torch.equal(params["hidden"][:, 3], start["hidden"][:, 3])


@each_kind
def test_numbers_and_tensors_give_the_same_to_the_last_bit(kind: Any) -> None:
    values = first_values(kind)
    by_numbers, by_tensors = (unroll(kind, {}, hyper, leaves()) for hyper in (values, learned(values)))
    for name, p in by_numbers.items():
        assert torch.equal(p, by_tensors[name])


@each_kind
def test_initial_parameters_get_a_gradient_where_all_values_are_numbers(kind: Any) -> None:
    start, values = leaves(), first_values(kind)
    slopes = gradients(PROBLEM.meta_loss(unroll(kind, {}, values, start)), {}, start)
    expected = gradients(PROBLEM.meta_loss(unroll_functional(kind, {}, values, start)), {}, start)
    assert_equal_slopes(slopes, expected)
    assert all(bool(slope.any()) for slope in slopes)


def test_rprop_needs_no_graph_of_the_gradients() -> None:
    results = []
    for create_graph in (True, False):
        start, hyper = leaves(), learned(first_values(optim.Rprop))
        params = unroll(optim.Rprop, {}, hyper, start, create_graph=create_graph)
        results.append(gradients(PROBLEM.meta_loss(params), hyper, start))
    assert_equal_slopes(*results, tolerance=0.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, where it is None
@each_kind
def test_a_parameter_without_gradient_is_left_alone_at_that_step(kind: Any) -> None:
    absent = {0: ["bias"], 1: ["bias", "hidden"], 7: ["hidden"], 8: ["bias", "hidden", "out", "shift"]}
    start, hyper = leaves(), learned(first_values(kind))
    params = unroll(kind, {}, hyper, start, absent=absent)
    expected = unroll_functional(kind, {}, hyper, start, absent=absent)
    slopes = [gradients(PROBLEM.meta_loss(end), hyper, start) for end in (params, expected)]
    assert_equal_slopes(*slopes)
    optimizer = kind([start["bias"].clone()], differentiable=True)
    optimizer.step()
    assert not optimizer.state


@each_kind
def test_values_for_each_element(kind: Any) -> None:
    """Of the shape of the parameter, and of one that broadcasts against it."""
    generator = torch.Generator().manual_seed(0)

    def spread(value: Any, shape: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(spread(item, shape) for item in value)
        return value * (1 + 0.02 * torch.rand(shape, dtype=F64, generator=generator))

    values = first_values(kind)
    start = leaves()
    groups = {
        "hidden": learned({name: spread(value, (3, 1)) for name, value in values.items()}),
        "bias": learned({name: spread(value, (3,)) for name, value in values.items()}),
        "out": learned({name: spread(value, (1,)) for name, value in values.items()}),
        "shift": learned(values),
    }
    params = {name: p.clone() for name, p in start.items()}
    optimizer = kind([{"params": [params[name]], **hyper} for name, hyper in groups.items()], differentiable=True)
    differentiable_steps(optimizer, params)
    by_name = {
        name: tuple({p: groups[p][name][i] for p in groups} for i in (0, 1))
        if isinstance(values[name], tuple)
        else {p: groups[p][name] for p in groups}
        for name in values
    }
    expected = unroll_functional(kind, {}, by_name, start)
    slopes = [gradients(PROBLEM.meta_loss(end), groups, start) for end in (params, expected)]
    assert_equal_slopes(*slopes)
    for name, value in values.items():
        for index in range(len(value) if isinstance(value, tuple) else 1):
            elements = [group[name][index] if isinstance(value, tuple) else group[name] for group in groups.values()]
            assert any(bool(slope.any()) for slope in gradients(PROBLEM.meta_loss(params), elements, {}))


@each_kind
def test_a_default_that_is_a_tensor_serves_all_groups_that_give_none(kind: Any) -> None:
    start, hyper = leaves(), learned(first_values(kind))
    own = {"lr": learned(0.02)}
    params = {name: p.clone() for name, p in start.items()}
    groups = [{"params": [params["hidden"]], **own}, {"params": [params[name] for name in ("bias", "out", "shift")]}]
    differentiable_steps(kind(groups, **hyper, differentiable=True), params)
    lr = {name: own["lr"] if name == "hidden" else hyper["lr"] for name in params}
    expected = unroll_functional(kind, {}, {**hyper, "lr": lr}, start)
    slopes = [gradients(PROBLEM.meta_loss(end), [own, hyper], start) for end in (params, expected)]
    assert_equal_slopes(*slopes)
    assert all(bool((slope != 0).any()) for slope in slopes[0])


@each_kind
def test_complex_and_empty_parameters_step_as_in_torch(kind: Any) -> None:
    z = torch.tensor([1 + 2j, -0.5j, 0.3 + 0j], dtype=torch.complex128)
    plain, start = z.clone().requires_grad_(), z.clone().requires_grad_()
    p, empty = start.clone(), torch.zeros(0, 2, dtype=F64)
    reference = TORCH[kind]([plain], lr=0.05)
    optimizer = kind([p, empty], lr=0.05, differentiable=True)
    empty.grad = torch.zeros(0, 2, dtype=F64)
    for _ in range(STEPS):
        reference.zero_grad()
        ((plain - 0.4j).abs() ** 2).sum().backward()
        reference.step()
        (p.grad,) = torch.autograd.grad(((p.clone() - 0.4j).abs() ** 2).sum(), p, create_graph=True)
        optimizer.step()
    assert distance(torch.view_as_real(p), torch.view_as_real(plain)) <= TOLERANCE
    assert int(optimizer.state[empty]["step"]) == STEPS
    (slope,) = torch.autograd.grad((p.abs() ** 2).sum(), start)
    assert bool(slope.any())


@each_kind
def test_a_closure_computes_the_gradients(kind: Any) -> None:
    start, values = leaves(), first_values(kind)
    params = {name: p.clone() for name, p in start.items()}
    optimizer = kind(params.values(), **values, differentiable=True)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        read = {name: p.clone() for name, p in params.items()}
        loss = PROBLEM.loss(read)
        grads = torch.autograd.grad(loss, list(read.values()), create_graph=True)
        for p, grad in zip(params.values(), grads, strict=True):
            p.grad = grad
        return loss

    with torch.no_grad():  # torch's steps turn gradients on
        losses = [optimizer.step(closure) for _ in range(STEPS)]
    assert torch.equal(losses[0], PROBLEM.loss(start))
    expected = unroll(kind, {}, values, start)
    for name, p in expected.items():
        assert torch.equal(params[name], p)
    assert_equal_slopes(*(gradients(PROBLEM.meta_loss(end), {}, start) for end in (params, expected)))


@each_kind
def test_a_leaf_that_requires_grad_is_refused_and_unchanged(kind: Any) -> None:
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = kind([("weight", p)], differentiable=True)
    with pytest.raises(RuntimeError, match=r"refuses for the leaf 'weight': give .* p.clone\(\), or use metaopt.inner"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert not optimizer.state


@each_kind
def test_a_leaf_that_does_not_require_grad_may_be_stepped(kind: Any) -> None:
    """To learn hyperparameters alone."""
    start, hyper = leaves(), learned(first_values(kind))
    params = {name: p.detach().clone() for name, p in start.items()}
    optimizer = kind(params.values(), **hyper, differentiable=True)
    for _ in range(STEPS):
        grads = torch.func.grad(PROBLEM.loss)({name: p.clone() for name, p in params.items()})
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()
    expected = unroll_functional(kind, {}, hyper, start)
    assert_equal_slopes(*(gradients(PROBLEM.meta_loss(end), hyper, {}) for end in (params, expected)))


@each_kind
def test_a_value_that_leaves_its_domain_is_refused_at_the_step(kind: Any) -> None:
    p = torch.ones(2)
    p.grad = torch.ones(2)
    optimizer = kind([p], differentiable=True)
    optimizer.param_groups[0]["lr"] = torch.tensor(-0.5, requires_grad=True)
    with pytest.raises(ValueError, match=r"lr must be >= 0.0, got lr=-0.5"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))


@each_kind
def test_parameters_of_equal_names_are_all_stepped(kind: Any) -> None:
    """Two modules' named_parameters in one group."""
    named = [("weight", torch.ones(2)), ("weight", torch.ones(3)), ("bias", torch.ones(1))]
    for _, p in named:
        p.grad = torch.ones_like(p)
    kind(named, lr=0.5, differentiable=True).step()
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for _, p in named)


# State dicts.


@each_kind
@pytest.mark.parametrize("direction", ["from torch", "to torch", "ours"])
def test_a_state_dict_loads_in_mid_training(kind: Any, direction: str) -> None:
    """Trajectories go on as if there had been one optimizer."""
    values = first_values(kind)
    expected = {name: p.detach().clone().requires_grad_() for name, p in leaves().items()}
    plain_steps(TORCH[kind](expected.values(), **values), expected, STEPS + 5)

    def train(params: dict[str, Tensor], steps: int, state: Any, differentiable: bool) -> tuple[dict[str, Tensor], Any]:
        started = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        if not differentiable:
            optimizer = TORCH[kind](started.values(), **values)
        else:
            started = {name: p.clone() for name, p in started.items()}
            optimizer = kind(started.values(), **values, differentiable=True)
        if state is not None:
            optimizer.load_state_dict(state)
        (differentiable_steps if differentiable else plain_steps)(optimizer, started, steps)
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        return started, torch.load(saved)

    params, state = train(leaves(), STEPS, None, direction != "from torch")
    params, state = train(params, 5, state, direction != "to torch")
    for name, p in expected.items():
        assert distance(params[name], p) <= TOLERANCE
    assert [int(entry["step"]) for entry in state["state"].values()] == [STEPS + 5] * 4


@each_kind
def test_a_state_dict_loads_into_torch_without_a_file_between(kind: Any) -> None:
    """torch counts in place: the counters must not be one tensor."""
    params = {name: p.detach().clone() for name, p in leaves().items()}
    optimizer = kind(params.values(), differentiable=True)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    again = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    second = TORCH[kind](again.values())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain_steps(second, again, 3)
    assert [int(entry["step"]) for entry in second.state.values()] == [4, 4, 4, 4]


@each_kind
def test_gradients_after_loading_are_those_of_an_unroll_from_that_state(kind: Any) -> None:
    values = first_values(kind)
    warm = {name: p.detach().clone().requires_grad_() for name, p in leaves().items()}
    before = TORCH[kind](warm.values(), **values)
    plain_steps(before, warm, 4)
    saved = copy.deepcopy(before.state_dict())

    start = {name: p.detach().clone().requires_grad_() for name, p in warm.items()}
    # Rprop's lr was read at the first step
    hyper = learned({name: value for name, value in values.items() if name != "lr" or kind is optim.RAdam})
    params = {name: p.clone() for name, p in start.items()}
    optimizer = kind(params.values(), differentiable=True)
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update(hyper)  # a state dict brings its own
    differentiable_steps(optimizer, params)

    opt = FUNCTIONAL[kind]()
    state = opt.init(start, **hyper)
    for index, name in enumerate(start):
        for field, part in state._asdict().items():
            part[name] = saved["state"][index][field]
    end: Any = start
    for _ in range(STEPS):
        end, state = opt.step(end, torch.func.grad(PROBLEM.loss)(end), state, **hyper)
    assert_equal_slopes(*(gradients(PROBLEM.meta_loss(p), hyper, start) for p in (params, end)))
