"""`InnerStep`: one step of an optimizer on a task as a pure function, and what its graph holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.functional import REGISTRY, radam, rprop, sgd
from metaopt.tasks import NoisyQuadratic, Replicas
from metaopt.unroll.plain import Carry, InnerStep, cut

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Squares(NoisyQuadratic):
    """loss = |tanh(x) - c|^2 / 2 + penalty |x|^2 / 2 over a dict of two parameters."""

    def init(self, generator: torch.Generator | None) -> Any:
        return {"a": super().init(generator), "b": super().init(generator)}

    def loss(self, params: Any, batch: Tensor, hyper: Any) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for p in params.values():
            total = total + 0.5 * (p.tanh() - batch).square().sum() + 0.5 * hyper.get("penalty", 0.0) * p.square().sum()
        return total

    def meta_loss(self, params: Any, hyper: Any) -> Tensor:
        return sum((p.square().sum() for p in params.values()), torch.zeros((), dtype=F64))


TASK = Squares(dimension=3, dtype=F64)


def gradient_by_hand(p: Tensor, batch: Tensor, penalty: float = 0.0) -> Tensor:
    return (p.tanh() - batch) * (1 - p.tanh() ** 2) + penalty * p


def nodes(*tensors: Tensor) -> Iterator[Any]:
    """All nodes of the graphs behind some tensors."""
    stack, seen = [t.grad_fn for t in tensors], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_step_is_the_optimizers_step_on_the_tasks_gradient(name: str) -> None:
    opt = REGISTRY[name]()
    step = InnerStep(TASK, opt)
    values = {"lr": torch.tensor(0.2, dtype=F64), "penalty": 0.3}
    carry = step.init(values, seeded())
    params = TASK.init(seeded())
    state = opt.init(params, lr=0.2)
    generator = seeded(1)
    for t in range(7):
        batch = TASK.batch(t, generator)
        loss = TASK.loss(params, batch, values)
        grads = {key: gradient_by_hand(p, batch, 0.3) for key, p in params.items()}
        params, state = opt.step(params, grads, state, lr=0.2)
        carry, got = step(carry, batch, values, t)
        assert got.item() == pytest.approx(loss.item(), rel=1e-14)
        for key, p in params.items():
            torch.testing.assert_close(carry.params[key], p, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "rprop"])
def test_the_loss_is_a_constant_unless_it_is_asked_for_with_its_graph(name: str) -> None:
    lr = torch.tensor(0.2, dtype=F64, requires_grad=True)
    penalty = torch.tensor(0.3, dtype=F64, requires_grad=True)
    values = {"lr": lr, "penalty": penalty}
    step = InnerStep(TASK, REGISTRY[name]())
    batch = TASK.batch(0, seeded())
    carry = step.init(values, seeded())
    after, loss = step(carry, batch, values, 0)
    assert not loss.requires_grad
    again, with_graph = step.with_loss(carry, batch, values, 0)
    assert with_graph.item() == loss.item()
    assert all(torch.equal(after.params[key], again.params[key]) for key in after.params)
    (slope,) = torch.autograd.grad(with_graph, penalty)
    assert slope.item() == pytest.approx(TASK.meta_loss(carry.params, {}).item() / 2, rel=1e-13)


def test_values_come_before_the_optimizers_defaults_and_those_of_the_task_stay() -> None:
    step = InnerStep(TASK, sgd(lr=0.1, momentum=0.5))
    assert step.complete({"lr": 0.2, "penalty": 0.3}) == {
        "lr": 0.2,
        "momentum": 0.5,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "penalty": 0.3,
    }


def test_a_learned_lr_of_rprop_reaches_the_initial_step_size() -> None:
    lr = torch.tensor(0.2, dtype=F64, requires_grad=True)
    carry = InnerStep(TASK, rprop()).init({"lr": lr}, seeded())
    (slope,) = torch.autograd.grad(carry.state.step_size["a"].sum(), lr)
    assert slope.item() == 3.0


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize("elementwise", [False, True])
def test_a_callable_value_is_asked_for_the_step_as_an_int(replicas: bool, elementwise: bool) -> None:
    asked: list[Any] = []

    def lr(step: Any) -> float:
        asked.append(step)
        return 0.1 * (step + 1)

    opt = sgd() if elementwise else ByNorm()
    task = Replicas(NoisyQuadratic(), 2) if replicas else NoisyQuadratic()
    step = InnerStep(task, opt)
    carry = step.init({"lr": lr}, seeded())
    for t in range(3):
        carry, _ = step(carry, task.batch(t, seeded()), {"lr": lr}, t)
    assert asked == [0, 0, 1, 2]
    assert {type(item) for item in asked} == {int}


class ByNorm:
    """Steps of length lr: not elementwise."""

    hyperparameters = ("lr",)
    defaults: dict[str, Any] = {"lr": 0.1}  # noqa: RUF012

    def init(self, params: Tensor, **hyper: Any) -> Tensor:
        return params.norm()

    def step(self, params: Tensor, grads: Tensor, state: Tensor, lr: Any) -> tuple[Tensor, Tensor]:
        return params - lr * grads / grads.norm(), state


def test_an_optimizer_that_is_not_elementwise_sees_one_replica_at_a_time() -> None:
    task = Replicas(NoisyQuadratic(dimension=4, dtype=F64), 3)
    step = InnerStep(task, ByNorm())
    carry = step.init({}, seeded())
    torch.testing.assert_close(carry.state, carry.params.norm(dim=1), rtol=1e-15, atol=0.0)
    after, _ = step(carry, task.batch(0, seeded()), {"lr": 0.25}, 0)
    lengths = (after.params - carry.params).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((3,), 0.25, dtype=F64), rtol=1e-14, atol=0.0)


def test_replicas_each_take_a_full_step_although_their_loss_is_a_mean() -> None:
    task = Replicas(NoisyQuadratic(dimension=4, noise=0.0, dtype=F64), 3)
    step = InnerStep(task, sgd(lr=0.5))
    carry = step.init({}, seeded())
    after, _ = step(carry, task.batch(0, seeded()), {}, 0)
    torch.testing.assert_close(after.params, (1 - 0.5 * task.task.curvature) * carry.params, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize(("opt", "second_order"), [(rprop(lr=0.1), False), (radam(lr=0.1), True), (sgd(lr=0.1), True)])
@pytest.mark.parametrize("replicas", [False, True])
def test_rprop_alone_keeps_no_graph_of_the_gradient(opt: Any, second_order: bool, replicas: bool) -> None:
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    task = Replicas(TASK, 2) if replicas else TASK
    step = InnerStep(task, opt)
    carry = step.init({"lr": lr}, seeded())
    for t in range(4):
        carry, _ = step(carry, task.batch(t, seeded(t)), {"lr": lr}, t)
    names = {node.name() for node in nodes(*carry.params.values())}
    assert names
    assert any("Tanh" in name for name in names) == second_order


def test_rprop_keeps_a_few_tensors_a_step_however_deep_the_loss_is() -> None:
    """What autograd saves in eight steps on a loss of one layer, and on one of thirty."""

    class Deep(Squares):
        layers = 1

        def loss(self, params: Any, batch: Tensor, hyper: Any) -> Tensor:
            x = params["a"]
            for _ in range(self.layers):
                x = x.tanh()
            return (x - batch).square().sum() + params["b"].square().sum()

    def saved(opt: Any, layers: int) -> int:
        task = Deep(dimension=1000, dtype=F64)
        task.layers = layers
        step = InnerStep(task, opt)
        lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
        carry = step.init({"lr": lr}, seeded())
        for t in range(8):
            carry, _ = step(carry, task.batch(t, seeded(t)), {"lr": lr}, t)
        storages = {}
        for node in nodes(*carry.params.values()):
            held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            for tensor in (*held, *getattr(node, "saved_tensors", ())):  # those of a function of our own
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    assert saved(rprop(), layers=30) == saved(rprop(), layers=1) > 0
    per_element_and_step = saved(rprop(), layers=1) / (8 * 2000)
    assert per_element_and_step < 60  # float64: seven numbers and a half
    assert saved(sgd(), layers=30) > 5 * saved(sgd(), layers=1)  # or the comparison would say nothing


def test_a_cut_detaches_what_is_in_the_graph_and_keeps_the_rest_as_the_same_objects() -> None:
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    step = InnerStep(TASK, radam())
    carry = step.init({"lr": lr}, seeded())
    carry, _ = step(carry, TASK.batch(0, seeded()), {"lr": lr}, 0)
    after = cut(carry)
    assert isinstance(after, Carry)
    assert type(after.state) is type(carry.state)
    for key, p in carry.params.items():
        assert p.requires_grad
        assert not after.params[key].requires_grad
        assert torch.equal(after.params[key], p)
        assert after.state.step[key] is carry.state.step[key]
    # One counter for all parameters, so that what depends on it is computed once.
    assert after.state.step["a"] is after.state.step["b"]


def test_a_step_vmaps_over_values_and_differentiates_forward() -> None:
    """Over three learning rates: SGD by hand, and its derivative in lr."""
    step = InnerStep(TASK, sgd())
    batch = TASK.batch(0, seeded())

    def one_step(lr: Tensor) -> Tensor:
        carry = Carry(start.params, step.opt.init(start.params))
        return step(carry, batch, {"lr": lr}, 0)[0].params["a"]

    start = step.init({}, seeded())
    a = start.params["a"]
    lrs = torch.tensor([0.1, 0.2, 0.4], dtype=F64)
    expected = torch.stack([a - lr * gradient_by_hand(a, batch) for lr in lrs])
    torch.testing.assert_close(torch.vmap(one_step)(lrs), expected, rtol=1e-13, atol=1e-15)
    _, slope = torch.func.jvp(one_step, (lrs[0],), (torch.ones((), dtype=F64),))
    torch.testing.assert_close(slope, -gradient_by_hand(a, batch), rtol=1e-13, atol=1e-15)
