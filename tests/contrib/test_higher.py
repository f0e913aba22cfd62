"""higher's inner loops with our optimizers: torch's trajectories, and the slopes of finite differences."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import metaopt
from tests.functional.cases import F64, pack

higher = pytest.importorskip("higher")
contrib = importlib.import_module("metaopt.contrib.higher")

STEPS = 8  # with beta2 = .9 and above, RAdam rectifies from the sixth on


@dataclass(frozen=True)
class Case:
    """An optimizer class with options; the second group has the options in ``other`` instead."""

    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    other: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.03})

    def __str__(self) -> str:
        return f"{self.kind.__module__.split('.')[0]}.{self.kind.__name__}({self.options})"

    def optimizer(self, model: Net) -> torch.optim.Optimizer:
        return self.kind([{"params": model.first()}, {"params": model.second(), **self.other}], **self.options)

    @property
    def sign(self) -> float:
        return -1.0 if self.options.get("maximize") else 1.0


MOMENTS = {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.1}
RPROP = {"lr": 0.03, "etas": (0.5, 1.3), "step_sizes": (0.018, 0.08)}
CASES = [
    Case(torch.optim.RAdam, {**MOMENTS, "betas": (0.9, 0.9)}),
    Case(torch.optim.RAdam, {**MOMENTS, "betas": (0.8, 0.999), "maximize": True}),
    Case(torch.optim.RAdam, {**MOMENTS, "betas": (0.9, 0.95), "decoupled_weight_decay": True}),
    Case(torch.optim.RAdam, {**MOMENTS, "betas": (0.9, 0.75)}),  # rectified from the eighth step on
    Case(metaopt.optim.RAdam, {**MOMENTS, "betas": (0.9, 0.99)}),
    Case(torch.optim.AdamW, {**MOMENTS, "betas": (0.9, 0.99)}),
    Case(torch.optim.Adam, {**MOMENTS, "betas": (0.9, 0.99)}),
    Case(torch.optim.Rprop, RPROP),
    Case(torch.optim.Rprop, {**RPROP, "maximize": True}),
    Case(metaopt.optim.Rprop, RPROP),
]


class Net(nn.Module):
    """5-8-1; the hidden layer's bias has no gradient at steps 0 and 4, and a fifth input is 0 in all training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(5, 8, dtype=F64), nn.Linear(8, 1, dtype=F64)

    def first(self) -> list[nn.Parameter]:
        return [self.hidden.weight]

    def second(self) -> list[nn.Parameter]:
        return [self.hidden.bias, *self.out.parameters()]

    def forward(self, x: Tensor, step: int) -> Tensor:
        bias = None if step in (0, 4) else self.hidden.bias
        return self.out(torch.tanh(nn.functional.linear(x, self.hidden.weight, bias)))


def data(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 5, dtype=F64, generator=torch.Generator().manual_seed(step))
    return (x if step == STEPS else x * torch.tensor([1, 1, 1, 1, 0])), x[:, :1].sin()


def loss(model: Callable[..., Tensor], step: int) -> Tensor:
    x, y = data(step)
    return (model(x, step) - y).square().mean()


def train(case: Case, model: Net, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    """The loop that is unrolled, live."""
    for step in range(steps):
        optimizer.zero_grad()
        (case.sign * loss(model, step)).backward()
        optimizer.step()


def unroll(case: Case, fmodel: Any, diffopt: Any) -> Tensor:
    """That loop by higher, or by `metaopt.inner_loop`; the meta-loss."""
    for step in range(STEPS):
        diffopt.step(case.sign * loss(fmodel, step))
    return loss(fmodel, STEPS)


@pytest.fixture(autouse=True)
def _adam_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the module's docstring says how; and whatever a test registers is undone."""
    monkeypatch.setattr(higher.optim, "_opt_mapping", dict(higher.optim._opt_mapping))
    higher.register_optim(torch.optim.Adam, contrib.DifferentiableAdam)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


every_case = pytest.mark.parametrize("case", CASES, ids=str, indirect=True)


def warmed(case: Case, steps: int) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = case.optimizer(model)
    train(case, model, optimizer, steps)
    return model, optimizer


@every_case
@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_the_trajectory_is_that_of_the_live_optimizer_from_where_it_stands(case: Case, steps_before: int) -> None:
    model, optimizer = warmed(case, steps_before)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fmodel, diffopt):
        unroll(case, fmodel, diffopt)
    train(case, model, optimizer)
    assert_close(list(fmodel.parameters()), list(model.parameters()), rtol=1e-11, atol=1e-13)
    for states, group in zip(diffopt.state, optimizer.param_groups, strict=True):
        for index, p in enumerate(group["params"]):
            expected = {key: value.to(states[index][key].dtype) for key, value in optimizer.state[p].items()}
            assert_close(states[index], expected, rtol=1e-11, atol=1e-13)


def elements(case: Case) -> dict[str, float]:
    """Every hyperparameter that can be overridden, pairs laid flat; the second group's lr is its own."""
    values = case.kind([torch.zeros(1)], **case.options).param_groups[0]
    flat: dict[str, float] = {"other lr": case.other["lr"]}
    for name in ("lr", "betas", "eps", "weight_decay", "etas", "step_sizes"):
        if isinstance(values.get(name), tuple):
            flat.update({f"{name}[{i}]": item for i, item in enumerate(values[name])})
        elif name in values:
            flat[name] = values[name]
    return flat


def override_of(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    packed = pack(values)
    return {"lr": [packed.pop("lr"), packed.pop("other lr")], **{name: [value] for name, value in packed.items()}}


def leaves(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=F64, requires_grad=True) for name, value in values.items()}


def by_torch(case: Case, values: Mapping[str, float], shift: float = 0.0) -> float:
    """The meta-loss of live training with other hyperparameters, and from another start."""
    options = pack(values)
    other = {"lr": options.pop("other lr")}
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(shift * p.cos())
    changed = Case(case.kind, {**case.options, **options}, other)
    train(changed, model, changed.optimizer(model))
    return loss(model, STEPS).item()


def slope_by_differences(case: Case, values: dict[str, float], name: str) -> float:
    value = values[name]
    h = 1e-5 * min(value, 1 - value if value < 1 else value)  # small beside 1 - beta, too
    ends = [by_torch(case, {**values, name: value + sign * h}) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * h)


@every_case
def test_every_hypergradient_equals_torchs_finite_differences(case: Case) -> None:
    values = elements(case)
    learned = leaves(values)
    model = Net()
    with higher.innerloop_ctx(model, case.optimizer(model), override=override_of(learned)) as (fmodel, diffopt):
        slopes = torch.autograd.grad(unroll(case, fmodel, diffopt), list(learned.values()))
    expected = {name: slope_by_differences(case, values, name) for name in values}
    assert len(expected) >= 6
    assert_close([slope.item() for slope in slopes], list(expected.values()), rtol=1e-5, atol=1e-9)
    assert all(abs(slope) > 1e-7 for slope in expected.values())


@every_case
def test_the_gradient_of_the_initial_weights_equals_torchs_finite_differences(case: Case) -> None:
    model = Net()
    with higher.innerloop_ctx(model, case.optimizer(model), copy_initial_weights=False) as (fmodel, diffopt):
        unroll(case, fmodel, diffopt).backward()
    slope = sum((p.grad * p.cos()).sum().item() for p in model.parameters() if p.grad is not None)
    ends = [by_torch(case, elements(case), shift) for shift in (1e-6, -1e-6)]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.RAdam, torch.optim.AdamW, torch.optim.Adam])
def test_at_a_dead_coordinate_and_a_weight_decay_of_0_hypergradients_are_finite_and_right(kind: Any) -> None:
    case = Case(kind, {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})
    values = elements(case)
    learned = leaves(values)
    model = Net()
    with higher.innerloop_ctx(model, case.optimizer(model), override=override_of(learned)) as (fmodel, diffopt):
        final = unroll(case, fmodel, diffopt)
        slopes = dict(zip(learned, torch.autograd.grad(final, list(learned.values())), strict=True))
    assert bool(torch.stack(list(slopes.values())).isfinite().all())
    assert slopes["weight_decay"] != 0
    for name in ("lr", "other lr", "betas[0]", "betas[1]"):
        assert slopes[name].item() == pytest.approx(slope_by_differences(case, values, name), rel=1e-4)


@every_case
def test_it_equals_inner_loop(case: Case) -> None:
    """From a warm state, in the meta-loss and in every gradient."""
    model, optimizer = warmed(case, 2)
    values = elements(case)
    if "step_sizes[0]" in values:
        del values["lr"], values["other lr"]  # a step size's start, which is past
    learned = leaves(values)
    override = override_of({"lr": 0.05, "other lr": 0.03, **learned})
    weights = list(model.parameters())
    with higher.innerloop_ctx(model, optimizer, override=override, copy_initial_weights=False) as (fmodel, diffopt):
        theirs = unroll(case, fmodel, diffopt)
        expected = torch.autograd.grad(theirs, [*learned.values(), *weights])
    hyper = [{name: value[i if len(value) > 1 else 0] for name, value in override.items()} for i in range(2)]
    with metaopt.inner_loop(model, optimizer, hyper) as (fmodel, fopt):
        ours = unroll(case, fmodel, fopt)
        slopes = torch.autograd.grad(ours, [*learned.values(), *weights])
    assert_close((ours, slopes), (theirs, expected), rtol=1e-12, atol=1e-14)


def test_a_callable_counts_the_steps_of_the_loop_as_in_inner_loop() -> None:
    model, optimizer = warmed(CASES[0], 2)
    rates = torch.linspace(0.02, 0.1, STEPS, dtype=F64).requires_grad_()
    beta = torch.tensor(0.1, dtype=F64, requires_grad=True)
    hyper = {"lr": metaopt.Schedule.of(rates), "betas": (lambda step: beta * step, 0.9)}
    override = {name: [value] for name, value in hyper.items()}
    with higher.innerloop_ctx(model, optimizer, override=override) as (fmodel, diffopt):
        theirs = torch.autograd.grad(unroll(CASES[0], fmodel, diffopt), [rates, beta])
    with metaopt.inner_loop(model, optimizer, hyper) as (fmodel, fopt):
        ours = torch.autograd.grad(unroll(CASES[0], fmodel, fopt), [rates, beta])
    assert_close(theirs, ours, rtol=1e-12, atol=1e-14)
    assert bool(theirs[0].all())


def test_an_override_of_one_step_is_learned_by_itself() -> None:
    case = CASES[0]
    rates = [torch.tensor(0.05, dtype=F64, requires_grad=True) for _ in range(STEPS)]

    def final(rates: list[Any]) -> Tensor:
        model = Net()
        with higher.innerloop_ctx(model, case.optimizer(model)) as (fmodel, diffopt):
            for step, rate in enumerate(rates):
                diffopt.step(loss(fmodel, step), override={"lr": [rate]})
            return loss(fmodel, STEPS)

    slopes = torch.autograd.grad(final(rates), rates)
    for step in (0, 4, 7):  # a step before the rectification, and one after it
        ends = [final([0.05 + sign * 1e-6 * (at == step) for at in range(STEPS)]).item() for sign in (1, -1)]
        assert slopes[step].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_a_rate_per_element_has_a_slope_per_element() -> None:
    model = nn.Linear(3, 1, bias=False, dtype=F64)
    rates = torch.tensor([0.1, 0.2, 0.0], dtype=F64, requires_grad=True)
    with higher.innerloop_ctx(model, torch.optim.Rprop(model.parameters()), override={"lr": [rates]}) as (
        fmodel,
        diffopt,
    ):
        for _ in range(2):
            diffopt.step(fmodel(torch.ones(3, dtype=F64)).sum())
        (slope,) = torch.autograd.grad(next(fmodel.parameters()).sum(), rates)
    assert_close(slope, torch.tensor([-2.2, -2.2, 0.0], dtype=F64))  # 1 + eta+; at 0 the lower bound holds


@every_case
def test_a_parameter_without_a_gradient_keeps_its_value_and_its_state(case: Case) -> None:
    model = Net()
    with higher.innerloop_ctx(model, case.optimizer(model)) as (fmodel, diffopt):
        diffopt.step(loss(fmodel, 0))
        bias = next(p for p in fmodel.parameters() if p.shape == (8,))
        assert torch.equal(bias, model.hidden.bias)
        assert not diffopt.state[1][0]
        assert diffopt.state[1][1]["step"] == 1
        for step in range(1, 5):
            diffopt.step(loss(fmodel, step))
        assert diffopt.state[1][0]["step"] == 3
        assert diffopt.state[1][1]["step"] == 5


def test_a_frozen_parameter_stays() -> None:
    model = Net()
    model.hidden.weight.requires_grad_(False)
    case = CASES[0]
    with higher.innerloop_ctx(model, case.optimizer(model)) as (fmodel, diffopt):
        unroll(case, fmodel, diffopt)
        assert torch.equal(next(fmodel.parameters()), model.hidden.weight)
        assert not diffopt.state[0][0]


@every_case
def test_without_higher_gradients_neither_parameters_nor_state_keep_a_graph(case: Case) -> None:
    learned = leaves(elements(case))
    model = Net()
    optimizer = case.optimizer(model)
    with higher.innerloop_ctx(model, optimizer, override=override_of(learned), track_higher_grads=False) as (
        fmodel,
        diffopt,
    ):
        unroll(case, fmodel, diffopt)
    assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
    kept = [value for states in diffopt.state for state in states.values() for value in state.values()]
    assert len(kept) == 12
    assert not any(value.requires_grad for value in kept)


@pytest.mark.parametrize("kind", [torch.optim.Rprop, metaopt.optim.Rprop])
def test_an_rprop_unroll_keeps_no_graph_of_its_gradients(kind: Any) -> None:
    model = Net()
    lr, scale = leaves({"lr": 0.03, "scale": 2.0}).values()
    with higher.innerloop_ctx(model, kind(model.parameters()), override={"lr": [lr]}) as (fmodel, diffopt):
        for step in range(STEPS):
            diffopt.step(scale * loss(fmodel, step))
        slopes = torch.autograd.grad(loss(fmodel, STEPS), [lr, scale], allow_unused=True)
    assert slopes[0] is not None
    assert slopes[1] is None


@every_case
def test_the_live_model_and_the_live_optimizer_are_untouched(case: Case) -> None:
    model, optimizer = warmed(case, 2)
    state = {key: {name: value.clone() for name, value in entry.items()} for key, entry in optimizer.state.items()}
    weights = [p.detach().clone() for p in model.parameters()]
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        unroll(case, fmodel, diffopt)
    assert_close([p.detach() for p in model.parameters()], weights, rtol=0, atol=0)
    for p, entry in optimizer.state.items():
        assert_close(dict(entry), state[p], rtol=0, atol=0)


@pytest.mark.parametrize("at_the_step", [False, True])
def test_grad_callback_changes_the_gradients_and_is_differentiated(at_the_step: bool) -> None:
    case = CASES[0]
    model = Net()
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def callback(gradients: list[Tensor | None]) -> list[Tensor | None]:
        return [None if g is None else scale * g for g in gradients]

    fmodel = higher.monkeypatch(model)
    at_construction = {} if at_the_step else {"grad_callback": callback}
    diffopt = higher.get_diff_optim(case.optimizer(model), model.parameters(), fmodel=fmodel, **at_construction)
    for step in range(STEPS):
        diffopt.step(loss(fmodel, step), **({"grad_callback": callback} if at_the_step else {}))
    (slope,) = torch.autograd.grad(loss(fmodel, STEPS), scale)

    def scaled(by: float) -> float:
        model = Net()
        optimizer = case.optimizer(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            (by * loss(model, step)).backward()
            optimizer.step()
        return loss(model, STEPS).item()

    assert slope.item() == pytest.approx((scaled(1 + 1e-6) - scaled(1 - 1e-6)) / 2e-6, rel=1e-5)


def test_create_diff_optim_makes_one_from_a_class() -> None:
    case = CASES[0]
    model = Net()
    fmodel = higher.monkeypatch(model, track_higher_grads=False)
    diffopt = higher.create_diff_optim(case.kind, dict(case.options), fmodel=fmodel, track_higher_grads=False)
    unroll(case, fmodel, diffopt)
    train(case, model, case.kind(model.parameters(), **case.options))
    assert_close(list(fmodel.parameters()), list(model.parameters()), rtol=1e-11, atol=1e-13)


@every_case
def test_highers_trainable_settings_can_be_learned_and_written_back(case: Case) -> None:
    """They are overrides for everything that is a number, the flags among it."""
    model = Net()
    optimizer = case.optimizer(model)
    override = higher.optim.get_trainable_opt_params(optimizer)
    assert "lr" in override
    assert "maximize" in override
    with higher.innerloop_ctx(model, optimizer, override=override) as (fmodel, diffopt):
        final = unroll(case, fmodel, diffopt)
    slopes = torch.autograd.grad(final, override["lr"])
    assert all(slope.isfinite() and slope != 0 for slope in slopes)
    before = [group["lr"] for group in optimizer.param_groups]
    higher.optim.apply_trainable_opt_params(optimizer, override)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(before)
    train(case, model, optimizer)
    plain = list(higher.patch.monkeypatch(model).parameters())
    assert_close(list(fmodel.parameters()), plain, rtol=1e-5, atol=1e-6)  # the overrides are float32


@pytest.mark.parametrize("at_the_step", [False, True])
def test_an_override_of_an_unknown_name_is_refused_before_anything_changes(at_the_step: bool) -> None:
    model = Net()
    optimizer = CASES[0].optimizer(model)
    bad = {"lr": [0.2], "beta": [0.9]}
    if not at_the_step:
        with pytest.raises(TypeError, match=r"RAdam has no hyperparameter 'beta' to override \(got beta=\[0.9\]\)"):
            higher.get_diff_optim(optimizer, model.parameters(), override=bad)
        return
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        with pytest.raises(TypeError, match=r"'beta'.*it has lr, betas, eps, weight_decay"):
            diffopt.step(loss(fmodel, 0), override=bad)
        assert diffopt.param_groups[0]["lr"] == 0.05
        assert not diffopt.state[0]


@pytest.mark.parametrize("value", [-0.1, torch.tensor(-0.1)])
def test_a_value_outside_its_domain_is_refused(value: Any) -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"lr must be >= 0\.0, got lr=-0\.1"):
        higher.get_diff_optim(CASES[0].optimizer(model), model.parameters(), override={"lr": [value]})


def test_a_step_that_is_refused_in_one_group_leaves_all_groups_as_they_were() -> None:
    model = Net()
    with higher.innerloop_ctx(model, CASES[0].optimizer(model)) as (fmodel, diffopt):
        before = list(fmodel.parameters())
        with pytest.raises(ValueError, match="weight_decay must be >= 0"):
            diffopt.step(loss(fmodel, 1), override={"weight_decay": [0.1, -1.0]})
        assert all(p is q for p, q in zip(before, fmodel.parameters(), strict=True))
        assert not any(diffopt.state)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_amsgrad_is_refused(kind: Any) -> None:
    model = Net()
    with pytest.raises(ValueError, match="has no amsgrad, got amsgrad=True"):
        higher.get_diff_optim(kind(model.parameters(), amsgrad=True), model.parameters())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """higher as it is before our module is imported, and the import."""
    own = {kind: diff for kind, diff in higher.optim._opt_mapping.items() if diff.__module__ == "higher.optim"}
    own |= {torch.optim.Adam: higher.optim.DifferentiableAdam, torch.optim.Rprop: higher.optim.DifferentiableRprop}
    monkeypatch.setattr(higher.optim, "_opt_mapping", own)
    monkeypatch.delitem(sys.modules, "metaopt.contrib.higher")
    monkeypatch.setattr(sys.modules["metaopt.contrib"], "higher", contrib)
    return lambda: importlib.import_module("metaopt.contrib.higher")


def test_importing_registers_what_the_docstring_says(fresh: Callable[[], Any]) -> None:
    before = dict(higher.optim._opt_mapping)
    assert not {torch.optim.RAdam, torch.optim.AdamW} & before.keys()
    module = fresh()
    changed = {kind: diff for kind, diff in higher.optim._opt_mapping.items() if before.get(kind) is not diff}
    assert changed == {
        torch.optim.RAdam: module.DifferentiableRAdam,
        torch.optim.AdamW: module.DifferentiableAdamW,
        torch.optim.Rprop: module.DifferentiableRprop,
        metaopt.optim.RAdam: module.DifferentiableRAdam,
        metaopt.optim.Rprop: module.DifferentiableRprop,
    }


def test_importing_again_changes_nothing(fresh: Callable[[], Any]) -> None:
    module = fresh()
    once = dict(higher.optim._opt_mapping)
    importlib.reload(module)
    assert higher.optim._opt_mapping == once


def test_what_the_user_registered_stays(fresh: Callable[[], Any]) -> None:
    class Mine(higher.optim.DifferentiableSGD):
        pass

    for kind in (torch.optim.RAdam, torch.optim.Rprop):
        higher.register_optim(kind, Mine)
    fresh()
    assert higher.optim._opt_mapping[torch.optim.RAdam] is Mine
    assert higher.optim._opt_mapping[torch.optim.Rprop] is Mine


def test_highers_own_rprop_ignores_maximize_and_agrees_where_it_is_right() -> None:
    """Why it is replaced, and that replacing it changes no number that was right."""
    finals = {}
    for diff_optim in (higher.optim.DifferentiableRprop, contrib.DifferentiableRprop):
        higher.register_optim(torch.optim.Rprop, diff_optim)
        for case in CASES[7:9]:
            model = Net()
            learned = leaves(elements(case))
            own = diff_optim is higher.optim.DifferentiableRprop
            with pytest.warns(UserWarning, match="Rprop") if own else nullcontext():
                context = higher.innerloop_ctx(model, case.optimizer(model), override=override_of(learned))
                fmodel, diffopt = context.__enter__()
            final = unroll(case, fmodel, diffopt)
            finals[own, case.sign] = (final, torch.autograd.grad(final, list(learned.values())))
    assert_close(finals[True, 1.0], finals[False, 1.0], rtol=1e-11, atol=1e-13)
    assert finals[True, -1.0][0] > 1.5 * finals[False, -1.0][0]


def test_without_higher_one_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, fresh: Callable[[], Any]) -> None:
    monkeypatch.setitem(sys.modules, "higher", None)
    with pytest.raises(ImportError, match=r"pip install 'metaopt\[higher\]'") as caught:
        fresh()
    assert caught.value.__suppress_context__
