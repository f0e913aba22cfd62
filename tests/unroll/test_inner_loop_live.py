"""What `inner_loop` leaves alone, what it starts from, and what ``apply`` writes back."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt import optim
from tests.unroll.inner_loop_by_hand import (
    CASES,
    F64,
    SCENARIOS,
    Case,
    Recurrent,
    Scenario,
    convolutional,
    count_kept,
    distance,
    layered,
    mse,
    recurrent,
    tensors,
)

KINDS = [torch.optim.RAdam, torch.optim.Rprop, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """All that can be seen of a model and an optimizer: which objects they hold, their values, how often written to."""

    def see(value: Any) -> Any:
        if isinstance(value, Tensor):
            grad = see(value.grad) if value.is_leaf else None
            return id(value), value._version, value.tolist(), value.requires_grad, value.is_leaf, grad
        if isinstance(value, Mapping):
            return id(value), [(see(key), see(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return type(value), [see(item) for item in value]
        return id(value()) if isinstance(value, weakref.ref) else value

    modules = [(id(module), see(vars(module))) for module in model.modules()]
    return modules, see(optimizer.param_groups), see(optimizer.state), see(optimizer.defaults)


class Refused(Exception):
    """Raised in the middle of a block."""


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("make", SCENARIOS, ids=lambda make: make.__name__)
def test_model_and_optimizer_are_untouched(case: Case, make: Callable[[], Scenario], raises: bool) -> None:
    scenario = make()
    model, optimizer = scenario.model, scenario.optimizer(case)
    (x, y), (x_val, y_val) = scenario.training[0], scenario.validation
    (case.sign * mse(model(x), y)).backward()
    optimizer.step()
    before = snapshot(model, optimizer)

    hyper = [case.values() for _ in scenario.groups]
    try:
        with metaopt.inner_loop(model, optimizer, hyper) as (fmodel, fopt):
            fmodel.eval()
            fopt.step(case.sign * mse(fmodel(x), y))
            fmodel.train()
            fopt.step(case.sign * mse(fmodel(x), y))
            if raises:
                raise Refused
            slopes = torch.autograd.grad(mse(fmodel(x_val), y_val), list(tensors(hyper)), allow_unused=True)
            assert any(slope is not None and slope != 0 for slope in slopes)
    except Refused:
        assert raises
    assert snapshot(model, optimizer) == before


def test_backward_touches_the_gradients_of_what_it_differentiates_and_nothing_else() -> None:
    scenario = layered()
    model, optimizer = scenario.model, torch.optim.RAdam(scenario.model.a.parameters(), lr=0.1)
    x, y = scenario.validation
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with metaopt.inner_loop(model, optimizer) as (fmodel, fopt):
        fopt.step(mse(fmodel(x), y))
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
        mse(fmodel(x), y).backward()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.grad, torch.ones_like(p))}
    # also those that are not the optimizer's, but not the frozen ones, nor those that the loss does not depend on
    assert changed == {"a.weight", "b.weight", "b.bias", "c.weight", "d.weight", "d.bias"}


def test_the_live_model_runs_with_its_own_weights_inside_the_block() -> None:
    scenario = recurrent()
    model, x = scenario.model, scenario.validation[0]
    expected = model(x)
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, fopt):
        fopt.step(fmodel(x).sum())
        assert torch.equal(model(x), expected)
        assert not torch.equal(fmodel(x), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_the_live_model_inside_the_block_does_not_change_the_loop(case: Case) -> None:
    """Parameters, buffers and state are read at the start."""
    results = []
    for interfere in (False, True):
        torch.manual_seed(0)
        scenario = convolutional()
        model, optimizer = scenario.model, scenario.optimizer(case)
        model.drop.eval()
        x, y = scenario.training[0]
        (case.sign * mse(model(x), y)).backward()
        optimizer.step()
        values = case.values()
        with metaopt.inner_loop(model, optimizer, values) as (fmodel, fopt):
            for _ in range(3):
                if interfere:
                    model(x)
                    optimizer.step()
                fopt.step(case.sign * mse(fmodel(x), y))
            loss = mse(fmodel(x), y)
            slopes = torch.autograd.grad(loss, list(tensors(values)), allow_unused=True)
        results.append([loss, *(slope for slope in slopes if slope is not None), *fmodel.buffers.values()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_an_lstm_is_a_plain_module_again_afterwards(raises: bool) -> None:
    scenario = recurrent()
    model, (x, y) = scenario.model, scenario.validation
    expected = model(x)
    try:
        with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, fopt):
            fopt.step(mse(fmodel(x), y))
            fmodel(x)
            if raises:
                raise Refused
    except Refused:
        assert raises
    for weight, name in zip(model.lstm._flat_weights, model.lstm._flat_weights_names, strict=True):
        assert weight is getattr(model.lstm, name)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for again in [model, *copies]:
        assert torch.equal(again(x), expected)
    # the weights that it uses are those that an optimizer steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)


class Normalized(nn.Module):
    """Keeps its normalized weight as a plain attribute, and what it has computed as another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.spectral_norm(nn.Linear(2, 1).double())

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.layer(x)
        return self.seen.squeeze(1)


@pytest.mark.parametrize("make", [Recurrent, Normalized])
def test_no_graph_is_kept_alive_through_the_model(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    x = torch.randn(5, 3, 2, dtype=F64) if make is Recurrent else torch.randn(5, 2, dtype=F64)
    kept, counted = count_kept()
    with counted, metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, fopt):
        fopt.step(fmodel(x).square().mean())
        fmodel(x)
        assert kept
    del fmodel, fopt
    assert not kept


def test_plain_tensor_attributes_are_as_before() -> None:
    model = Normalized()
    normalized = model.layer.weight
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, fopt):
        fopt.step(fmodel(torch.ones(3, 2, dtype=F64)).square().mean())
    assert model.layer.weight is normalized
    assert not hasattr(model, "seen")


# Starting in mid-training, and writing back.


class Late(nn.Module):
    """A parameter that gets its first gradient at some call, and one that never gets any."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 1)
        self.late, self.never = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, late: bool) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.hidden(x))
        return self.out(x * self.late if late else x).squeeze(1)


_ADAMS = [
    {"lr": 0.02},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.02, "weight_decay": 0.1, "maximize": True},
]
_DECOUPLED = [{"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}]
_RPROPS = [{"lr": 0.02}, {"etas": (0.4, 1.3), "step_sizes": (5e-3, 2e-2)}, {"lr": 0.02, "maximize": True}]
CONTINUED: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    *((torch.optim.RAdam, options) for options in [*_ADAMS, *_DECOUPLED]),
    *((optim.RAdam, options) for options in [*_ADAMS, *_DECOUPLED]),
    *((torch.optim.Adam, options) for options in [*_ADAMS, *_DECOUPLED]),
    *((torch.optim.AdamW, options) for options in _ADAMS),
    *((torch.optim.Rprop, options) for options in _RPROPS),
    *((optim.Rprop, options) for options in _RPROPS),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "dampening": 0.3}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
]


def name_of(value: Any) -> str:
    if isinstance(value, type):
        return f"{value.__module__.split('.')[0]}.{value.__name__}"
    return ",".join(f"{key}={item}" for key, item in value.items())


def assert_same_state(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer, tolerance: float) -> None:
    actual_state, expected_state = actual.state_dict()["state"], expected.state_dict()["state"]
    assert actual_state.keys() == expected_state.keys()
    for index, entry in expected_state.items():
        assert list(actual_state[index]) == list(entry)
        for name, value in entry.items():
            assert distance(actual_state[index][name], value) <= tolerance, (index, name)


@pytest.mark.parametrize("before", [0, 3], ids=["fresh", "mid-training"])
@pytest.mark.parametrize(("kind", "options"), CONTINUED, ids=name_of)
def test_plain_steps_inner_steps_plain_steps_equal_plain_steps(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], before: int
) -> None:
    expected = Late().double()
    actual = copy.deepcopy(expected)
    groups = lambda model: [  # noqa: E731
        {"params": [*model.hidden.parameters(), model.late, model.never]},
        {"params": model.out.parameters(), **({"etas": (0.5, 1.1)} if "Rprop" in kind.__name__ else {"lr": 0.01})},
    ]
    expected_optimizer, optimizer = kind(groups(expected), **options), kind(groups(actual), **options)
    sign = -1.0 if options.get("maximize") else 1.0
    batches = [(torch.randn(6, 3, dtype=F64), torch.randn(6, dtype=F64)) for _ in range(before + 10)]

    def loss(model: Any, index: int) -> Tensor:
        x, y = batches[index]
        return sign * mse(model(x, index >= before + 2), y)

    def train(model: nn.Module, live: torch.optim.Optimizer, steps: range) -> None:
        for index in steps:
            live.zero_grad()
            loss(model, index).backward()
            live.step()

    train(expected, expected_optimizer, range(before + 10))
    train(actual, optimizer, range(before))
    with torch.no_grad(), metaopt.inner_loop(actual, optimizer) as (fmodel, fopt):
        for index in range(before, before + 7):
            fopt.step(loss(fmodel, index))
        fopt.apply()
    middle = copy.deepcopy(optimizer.state_dict()["state"])
    train(actual, optimizer, range(before + 7, before + 10))

    for (name, p), q in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert distance(p, q) < 5e-12, name
    assert_same_state(optimizer, expected_optimizer, 5e-12)
    assert actual.calls == expected.calls == before + 10
    # hidden.weight, hidden.bias, late, never, out.weight, out.bias
    assert 3 not in middle
    if "step" in middle.get(0, {}):
        steps = {index: int(entry["step"]) for index, entry in middle.items()}
        assert steps == {index: 5 if index == 2 else before + 7 for index in (0, 1, 2, 4, 5)}


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_applied_values_of_hyper_equal_torch_with_these_values(kind: type[torch.optim.Optimizer]) -> None:
    """Also of momentum, which the live optimizer has not got."""
    changed: dict[str, Any] = {
        torch.optim.SGD: {"lr": 0.3, "momentum": 0.8, "dampening": 0.3},
        torch.optim.Rprop: {"etas": (0.4, 1.5), "step_sizes": (1e-3, 0.02)},
    }.get(kind, {"lr": 0.03, "betas": (0.7, 0.9), "weight_decay": 0.2})
    model = nn.Linear(3, 1).double()
    reference = copy.deepcopy(model)
    optimizer, expected = kind(model.parameters()), kind(reference.parameters())
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 1, dtype=F64)

    def train(live: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            mse(live(x), y).backward()
            optimizer.step()

    train(model, optimizer, 2)
    with metaopt.inner_loop(model, optimizer, changed) as (fmodel, fopt):
        for _ in range(8):
            fopt.step(mse(fmodel(x), y))
        fopt.apply()
    train(reference, expected, 2)
    expected.param_groups[0].update(changed)
    train(reference, expected, 8)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert distance(p, q) < 1e-12
    defaults = kind([torch.zeros(1)]).param_groups[0]
    assert all(optimizer.param_groups[0][name] == defaults[name] for name in changed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_after_apply_gives_the_same_gradients(case: Case) -> None:
    def gradients(apply: bool) -> list[Tensor]:
        torch.manual_seed(0)
        scenario = layered()
        hyper = case.values()
        (x, y), (x_val, y_val) = scenario.training[0], scenario.validation
        with metaopt.inner_loop(scenario.model, scenario.optimizer(case), hyper) as (fmodel, fopt):
            for _ in range(3):
                fopt.step(case.sign * mse(fmodel(x), y))
            if apply:
                fopt.apply()
            mse(fmodel(x_val), y_val).backward()
        leaves = [*tensors(hyper), *scenario.model.parameters()]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(actual, expected)


def test_steps_after_apply_go_on_from_there_and_leave_the_live_model_alone() -> None:
    model = nn.Linear(2, 1)
    weight = model.weight.detach().clone()
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, fopt):
        fopt.step(fmodel(torch.ones(1, 2)).sum())
        fopt.apply()
        fopt.step(fmodel(torch.ones(1, 2)).sum())
        assert torch.equal(model.weight, weight - 0.5)
        assert torch.equal(fmodel.params["weight"], weight - 0.5 - 0.5)
    assert model.weight.is_leaf
    assert isinstance(model.weight, nn.Parameter)


def test_applied_state_is_the_live_optimizers_own() -> None:
    """torch steps its state in place: the inner loop's must not follow, nor one counter serve two parameters."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.RAdam(model.parameters(), lr=0.5)
    with metaopt.inner_loop(model, optimizer) as (fmodel, fopt):
        fopt.step(fmodel(torch.ones(1, 2)).sum())
        fopt.apply()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        fopt.step(fmodel(torch.ones(1, 2)).sum())
        assert [int(entry["step"]) for entry in optimizer.state.values()] == [2, 2]
        fopt.apply()
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [2, 2]
    reference = nn.Linear(2, 1)
    loaded = torch.optim.RAdam(reference.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    assert_same_state(loaded, optimizer, 0.0)


def test_a_learning_rate_schedule_of_torch_goes_on_after_apply() -> None:
    model = nn.Linear(2, 1).double()
    reference = copy.deepcopy(model)
    x = torch.randn(4, 2, dtype=F64)

    def prepare(live: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(live.parameters(), lr=0.5, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def train(live: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        optimizer.zero_grad()
        live(x).square().mean().backward()
        optimizer.step()
        schedule.step()

    expected, expected_schedule = prepare(reference)
    for _ in range(3):
        train(reference, expected, expected_schedule)
    optimizer, schedule = prepare(model)
    train(model, optimizer, schedule)
    with torch.no_grad(), metaopt.inner_loop(model, optimizer) as (fmodel, fopt):
        fopt.step(fmodel(x).square().mean())
        fopt.apply()
    schedule.step()
    train(model, optimizer, schedule)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert distance(p, q) < 1e-14
