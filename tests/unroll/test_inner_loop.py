"""`inner_loop` against the loop that it stands for, written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt.tracking import JSONL
from tests.unroll.inner_loop_by_hand import (
    CASES,
    F64,
    RULES,
    SCENARIOS,
    ByHand,
    Case,
    Scenario,
    distance,
    mse,
    tensors,
)

TOLERANCE = 1e-11


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("make", SCENARIOS, ids=lambda make: make.__name__)
def test_meta_loss_and_gradients_equal_those_of_an_unroll_by_hand(case: Case, make: Callable[[], Scenario]) -> None:
    scenario = make()
    model, optimizer = scenario.model, scenario.optimizer(case)
    hyper = [case.values(0.9**index) for index in range(len(scenario.groups))]
    learned = list(tensors(hyper))

    by_hand = ByHand(model, optimizer, hyper)
    torch.manual_seed(1)  # of dropout
    for x, y in scenario.training:
        by_hand.step(case.sign * mse(by_hand(x), y))
    expected = mse(by_hand(scenario.validation[0]), scenario.validation[1])
    trainable = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(expected, [*learned, *trainable], allow_unused=True)
    assert all(slope is not None and slope != 0 for slope in slopes[: len(learned)])

    torch.manual_seed(1)
    with metaopt.inner_loop(model, optimizer, hyper if len(hyper) > 1 else hyper[0]) as (fmodel, fopt):
        for x, y in scenario.training:
            fopt.step(case.sign * mse(fmodel(x), y))
        actual = mse(fmodel(scenario.validation[0]), scenario.validation[1])
        actual.backward()

    assert distance(actual, expected) < TOLERANCE
    assert fmodel.params.keys() == by_hand.params.keys()
    for name, p in by_hand.params.items():
        assert distance(fmodel.params[name], p) < TOLERANCE, name
    for leaf, slope in zip([*learned, *trainable], slopes, strict=True):
        assert (leaf.grad is None) == (slope is None)
        if slope is not None:
            assert leaf.grad is not None
            assert distance(leaf.grad, slope) < TOLERANCE
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert fmodel.buffers.keys() == by_hand.buffers.keys()
    for name, buffer in by_hand.buffers.items():
        assert distance(fmodel.buffers[name], buffer) < TOLERANCE, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_hyper_the_values_of_each_group_are_used(case: Case) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    other = {"lr": 0.02, "etas": (0.4, 1.4)} if RULES[case.kind].__name__ == "rprop" else {"weight_decay": 0.03}
    optimizer = case.optimizer([{"params": model[0].parameters()}, {"params": model[2].parameters(), **other}])
    by_hand = ByHand(model, optimizer, [{}, {}])
    batches = [(torch.randn(6, 3, dtype=F64), torch.randn(6, dtype=F64)) for _ in range(8)]
    for x, y in batches:
        by_hand.step(case.sign * mse(by_hand(x).squeeze(1), y))
    slopes = torch.autograd.grad(by_hand(x).sum(), list(model.parameters()))

    with metaopt.inner_loop(model, optimizer) as (fmodel, fopt):
        for x, y in batches:
            fopt.step(case.sign * mse(fmodel(x).squeeze(1), y))
        fmodel(x).sum().backward()
    for name, p in by_hand.params.items():
        assert distance(fmodel.params[name], p) < TOLERANCE
    for p, slope in zip(model.parameters(), slopes, strict=True):
        assert p.grad is not None
        assert distance(p.grad, slope) < TOLERANCE


class Leaky(nn.Module):
    """``h <- a h + w x``, h being a buffer that the forward pass replaces: part of the graph."""

    def __init__(self, a: float, w: float) -> None:
        super().__init__()
        self.a, self.w = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (a, w))
        self.register_buffer("h", torch.tensor(0.5, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.a * self.h + self.w * x
        return self.h


def test_a_buffer_that_depends_on_the_parameters_carries_its_derivative() -> None:
    model = Leaky(0.5, 2.0)
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5), {"lr": lr}) as (fmodel, fopt):
        fopt.step(fmodel(torch.tensor(3.0, dtype=F64)))
        fmodel(torch.tensor(4.0, dtype=F64)).backward()

    # h1 = a h0 + 3 w, so that a' = a - lr h0 and w' = w - 3 lr; h2 = a' h1 + 4 w'
    a, w, h = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.5, 2.0, 0.5))
    first = a * h + 3 * w
    second = (a - lr * h) * first + 4 * (w - 3 * lr)
    expected = torch.autograd.grad(second, [lr, a, w])
    for leaf, slope in zip([lr, model.a, model.w], expected, strict=True):
        assert leaf.grad is not None
        assert distance(leaf.grad, slope) < 1e-14
    assert distance(fmodel.buffers["h"], second) < 1e-14
    assert model.h == 0.5


def test_a_buffer_that_is_updated_in_place_does_not_spoil_the_graph_of_earlier_calls() -> None:
    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0, dtype=F64))
            self.register_buffer("h", torch.tensor(0.0, dtype=F64))

        def forward(self) -> Tensor:
            self.h += 1
            return 0.5 * (self.h * self.w) ** 2

    model = Count()
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5), {"lr": lr}) as (fmodel, fopt):
        fopt.step(fmodel())
        fopt.step(fmodel())
        fmodel().backward()
    # the gradients are w0 and 4 w1, the loss is (3 w2)^2 / 2
    w2 = (1 - lr) * (1 - 4 * lr)
    (expected,) = torch.autograd.grad(4.5 * w2**2, lr)
    assert distance(lr.grad, expected) < 1e-14
    assert model.h == 0


def test_a_call_takes_what_the_model_takes_and_returns_what_it_returns() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor, *, scale: float) -> dict[str, Tensor]:
            return {"scaled": scale * self.w * x}

    model = Model()
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (fmodel, fopt):
        fopt.step(fmodel(torch.ones(2), scale=3.0)["scaled"].sum())
        assert torch.equal(fmodel.params["w"], torch.full((2,), -0.5))
        assert torch.equal(fmodel(torch.ones(2), scale=2.0)["scaled"], torch.full((2,), -1.0))


def test_params_are_the_unrolled_parameters_as_they_stand() -> None:
    model = nn.Linear(2, 1)
    with metaopt.inner_loop(model, torch.optim.SGD([model.weight], lr=0.5)) as (fmodel, fopt):
        assert fmodel.params.keys() == {"weight"}
        assert torch.equal(fmodel.params["weight"], model.weight)
        fopt.step(fmodel(torch.ones(1, 2)).sum())
        assert torch.equal(fmodel.params["weight"], model.weight - 0.5)


@pytest.mark.parametrize("live", [True, False])
def test_train_and_eval_override_the_live_mode_and_leave_it_alone(live: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5))).train(live)
    model[2].train(not live)  # a mode of its own
    modes = [module.training for module in model.modules()]
    x = torch.randn(5, 3)

    def reference(mode: bool | None) -> Tensor:
        copy = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5)))
        copy.load_state_dict(state)
        for module, training in zip(copy.modules(), modes, strict=True):
            module.training = training if mode is None else mode
        torch.manual_seed(1)
        return copy(x)

    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, _):
        for set_mode, mode in ((lambda: fmodel, None), (fmodel.eval, False), (fmodel.train, True)):
            assert set_mode() is fmodel
            state = {**model.state_dict(), **{name: b.clone() for name, b in fmodel.buffers.items()}}
            expected = reference(mode)
            torch.manual_seed(1)
            assert torch.equal(fmodel(x), expected)
            assert [module.training for module in model.modules()] == modes


def test_the_mode_is_restored_when_a_call_raises() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, _):
        fmodel.eval()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fmodel(torch.ones(1, 4))
        assert all(module.training for module in model.modules())


def test_a_tracker_gets_the_loss_of_each_step(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    record = tmp_path / "record.jsonl"
    losses = []
    with metaopt.inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), tracker=JSONL(record)) as (
        fmodel,
        fopt,
    ):
        for _ in range(3):
            losses.append(fmodel(torch.ones(4, 2)).square().mean())
            fopt.step(losses[-1])
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert rows == [{"step": step, "train": {"loss": loss.item()}} for step, loss in enumerate(losses)]
