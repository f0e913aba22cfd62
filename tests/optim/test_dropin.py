"""The drop-ins without ``differentiable``: torch's classes, to the last bit, in all that one does with an optimizer."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from metaopt import optim
from tests.optim.problem import F64, PAIRS, PROBLEM, name_of

pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["RAdam", "Rprop"])


def combinations(**options: list[Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


RADAM = [
    *combinations(
        foreach=[None, True, False],
        maximize=[False, True],
        decoupled_weight_decay=[False, True],
        weight_decay=[0, 0.1],
        betas=[(0.9, 0.999), (0.5, 0.9)],
    ),
    *combinations(foreach=[True, False], lr=[torch.tensor(0.03)], eps=[1e-3, 0.1], betas=[(0.0, 0.6), (0.9, 0.95)]),
]
RPROP = [
    *combinations(
        foreach=[None, True, False],
        maximize=[False, True],
        etas=[(0.5, 1.2), (0.3, 1.7)],
        step_sizes=[(1e-6, 50), (0.01, 0.05)],
    ),
    *combinations(foreach=[True, False], lr=[torch.tensor(0.03), 0.3]),
]
OPTIONS = [(*PAIRS[0], options) for options in RADAM] + [(*PAIRS[1], options) for options in RPROP]


def parameters() -> list[Tensor]:
    """Of several shapes and dtypes: 0-d, empty, complex, transposed, half precision."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    made = [
        normal(3, 4),
        normal(()),
        normal(0, 2),
        normal(5, dtype=F64),
        normal(3, dtype=torch.complex64),
        normal(4, 3).t(),
        normal(6).to(torch.bfloat16),
    ]
    return [p.requires_grad_() for p in made]


def error(params: list[Tensor], step: int) -> Tensor:
    """Pulls each parameter to a point that moves; one parameter has no gradient at every third step."""
    total = torch.zeros((), dtype=F64)
    for index, p in enumerate(params):
        if index != 3 or step % 3:
            total = total + ((p - 0.3 * (-1) ** step).abs() ** 2).sum().to(F64) * (1 + index)
    return total


def closure(optimizer: torch.optim.Optimizer, params: list[Tensor], step: int, sign: float) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sign * error(params, step)
        loss.backward()
        return loss

    return evaluate


def assert_same(actual: Any, expected: Any) -> None:
    """To the last bit, in any nest of mappings and sequences."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert actual == expected


def without_fused(state_dict: dict[str, Any]) -> dict[str, Any]:
    for group in state_dict["param_groups"]:
        assert group.pop("fused", None) is None
    return state_dict


def assert_same_optimizers(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    for ours, theirs in zip(actual.param_groups, expected.param_groups, strict=True):
        assert_same(ours["params"], theirs["params"])
    assert_same(without_fused(actual.state_dict()), without_fused(expected.state_dict()))


@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIONS, ids=name_of)
def test_fifty_steps_equal_those_of_torch_to_the_last_bit(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    sign = -1.0 if options.get("maximize") else 1.0
    optimizers, losses = [], []
    for kind in (ours, theirs):
        params = parameters()
        optimizer = kind(params, **options)
        losses.append([optimizer.step(closure(optimizer, params, step, sign)) for step in range(50)])
        optimizers.append(optimizer)
    assert_same(*losses)
    assert_same_optimizers(*optimizers)


@pair
def test_signature_is_torchs_and_fused(ours: Any, theirs: Any) -> None:
    signature = inspect.signature(ours).parameters
    expected = inspect.signature(theirs).parameters
    assert set(signature) == {*expected, "fused"}
    assert [name for name in signature if name != "fused"] == list(expected)
    for name, parameter in expected.items():
        assert signature[name].default == parameter.default
        assert signature[name].kind == parameter.kind
    assert issubclass(ours, theirs)


@pair
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("differentiable", [False, True])
def test_fused_may_be_none_or_false(ours: Any, theirs: Any, fused: bool | None, differentiable: bool) -> None:
    optimizer = ours([torch.zeros(2)], fused=fused, differentiable=differentiable)
    optimizer.add_param_group({"params": [torch.ones(2)]})
    assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
    assert optimizer.defaults["fused"] is fused
    assert optimizer.state_dict()["param_groups"][0]["fused"] is fused


@pair
@pytest.mark.parametrize("other", ["differentiable", "foreach"])
def test_fused_true_excludes_what_it_excludes_in_torchs_adam(ours: Any, theirs: Any, other: str) -> None:
    errors = []
    for kind in (torch.optim.Adam, ours):
        with pytest.raises(RuntimeError) as caught:
            kind([torch.zeros(2)], fused=True, **{other: True})
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


_BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    (*PAIRS[0], {"lr": -0.5}, "lr=-0.5"),
    (*PAIRS[0], {"lr": torch.tensor(-0.5)}, "lr=-0.5"),
    (*PAIRS[0], {"betas": (1.0, 0.9)}, "betas[0]=1.0"),
    (*PAIRS[0], {"betas": (0.9, -0.1)}, "betas[1]=-0.1"),
    (*PAIRS[0], {"eps": -1e-8}, "eps=-1e-08"),
    (*PAIRS[0], {"weight_decay": -0.1}, "weight_decay=-0.1"),
    (*PAIRS[1], {"lr": -0.5}, "lr=-0.5"),
    (*PAIRS[1], {"etas": (0.0, 1.2)}, "etas[0]=0.0"),
    (*PAIRS[1], {"etas": (0.5, 1.0)}, "etas[1]=1.0"),
    (*PAIRS[1], {"etas": (1.2, 0.5)}, "etas[0]=1.2"),
]


@pytest.mark.parametrize(("ours", "theirs", "options", "named"), _BAD, ids=name_of)
def test_a_value_that_torch_refuses_is_refused(ours: Any, theirs: Any, options: dict[str, Any], named: str) -> None:
    errors = []
    for kind, more in ((theirs, {}), (ours, {}), (ours, {"differentiable": True})):
        with pytest.raises(ValueError) as caught:
            kind([torch.zeros(2)], **options, **more)
        errors.append(str(caught.value))
    assert errors[1] == errors[0]
    assert errors[2].endswith(f"got {named}")


@pytest.mark.parametrize("differentiable", [False, True])
def test_step_sizes_in_the_wrong_order_are_refused(differentiable: bool) -> None:
    with pytest.raises(ValueError, match=r"step_sizes\[1\] must be >= 0.5, got step_sizes\[1\]=0.1"):
        optim.Rprop([torch.zeros(2)], step_sizes=(0.5, 0.1), differentiable=differentiable)
    with pytest.raises(ValueError, match=r"step_sizes\[0\] must be >= 0.0, got step_sizes\[0\]=-0.5"):
        optim.Rprop([torch.zeros(2)], step_sizes=(-0.5, 0.1), differentiable=differentiable)


@pair
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        lambda: [],
        lambda: torch.zeros(2),
        lambda: [1.0],
        lambda: [{"params": {torch.zeros(1)}}],
        lambda: [("a", torch.zeros(1)), torch.zeros(1)],
        lambda: [{"params": [torch.zeros(1)]}, {"params": [("a", torch.zeros(1))]}],
    ],
    ids=["none", "tensor", "number", "set", "some named", "some groups named"],
)
def test_parameters_that_torch_refuses_are_refused(ours: Any, theirs: Any, differentiable: bool, params: Any) -> None:
    errors = []
    for kind in (theirs, ours):
        with pytest.raises((TypeError, ValueError)) as caught:
            kind(params(), differentiable=differentiable)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pair
def test_a_non_leaf_is_refused_unless_differentiable(ours: Any, theirs: Any) -> None:
    p = torch.zeros(2, requires_grad=True).clone()
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        ours([p])
    ours([p], differentiable=True)


@pair
def test_a_sparse_gradient_is_refused(ours: Any, theirs: Any) -> None:
    sparse = torch.eye(2).to_sparse()
    errors = []
    for kind, differentiable in ((theirs, False), (ours, False), (ours, True)):
        p = torch.zeros(2, 2).requires_grad_()
        p = p.clone() if differentiable else p
        p.grad = sparse
        with pytest.raises(RuntimeError, match=f"{ours.__name__} does not support sparse gradients") as caught:
            kind([p], differentiable=differentiable).step()
        errors.append(str(caught.value))
        assert not p.any()
    assert errors[1] == f"{errors[0]}: parameter 0 of group 0 has one"


# Groups, names, zero_grad.


@pair
def test_groups_keep_their_options(ours: Any, theirs: Any) -> None:
    own = {"betas": (0.5, 0.9), "weight_decay": 0.1} if ours is optim.RAdam else {"etas": (0.3, 1.5)}
    optimizers = []
    for kind in (ours, theirs):
        params = parameters()
        optimizer = kind([{"params": params[:2], **own}, {"params": iter(params[2:5]), "lr": 0.3}], lr=0.02)
        for step in range(5):
            optimizer.step(closure(optimizer, params, step, 1.0))
        optimizer.add_param_group({"params": params[5], "maximize": True})
        optimizer.add_param_group({"params": params[6], "foreach": False, **own})
        for step in range(5, 20):
            optimizer.step(closure(optimizer, params, step, 1.0))
        optimizers.append(optimizer)
    assert len(optimizers[0].param_groups) == 4
    assert_same_optimizers(*optimizers)


@pair
@pytest.mark.parametrize("differentiable", [False, True])
def test_named_parameters_keep_their_names_in_the_state_dict(ours: Any, theirs: Any, differentiable: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    named = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    optimizer = ours(named, differentiable=differentiable)
    optimizer.add_param_group({"params": [("more", torch.zeros(1))]})
    names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    assert names == [[name for name, _ in model.named_parameters()], ["more"]]
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sorted(optimizer.state_dict()["state"]) == [0, 1, 2, 3]
    assert repr(optimizer).startswith(f"{theirs.__name__} (\nParameter Group 0\n")


@pair
def test_zero_grad_clears_gradients(ours: Any, theirs: Any) -> None:
    p = torch.zeros(2, requires_grad=True)
    for foreach in (None, True, False):
        optimizer = ours([p], foreach=foreach)
        p.grad = torch.ones(2)
        optimizer.zero_grad(set_to_none=False)
        assert p.grad is not None
        assert not p.grad.any()
        optimizer.zero_grad()
        assert p.grad is None


# Hooks.


@pytest.fixture
def never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh interpreter: torch wraps the step of a class when one is first made."""
    for ours, theirs in PAIRS:
        step = theirs.step
        monkeypatch.setattr(theirs, "step", step.__wrapped__ if getattr(step, "hooked", False) else step)
        if "step" in vars(ours):
            monkeypatch.delattr(ours, "step")


@pair
@pytest.mark.usefixtures("never_made")
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("order", ["ours", "ours, theirs", "theirs, ours", "theirs, ours, subclass", "subclass, ours"])
def test_hooks_run_once_a_step(ours: Any, theirs: Any, differentiable: bool, order: str) -> None:
    subclass = type("Subclass", (ours,), {})
    kinds = {"ours": ours, "theirs": theirs, "subclass": subclass}
    optimizers = [kinds[name]([torch.zeros(2)], differentiable=differentiable) for name in order.split(", ")]
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *args: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *args: calls.append("global post")),
    ]
    try:
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
            optimizer.register_step_post_hook(lambda *args: calls.append("post"))
            p = optimizer.param_groups[0]["params"][0]
            p.grad = torch.ones(2)
            optimizer.step()
            assert calls == ["global pre", "pre", "post", "global post"]
            assert int(optimizer.state[p]["step"]) == 1
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()


@pair
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_hook_may_replace_the_closure(ours: Any, theirs: Any, differentiable: bool) -> None:
    theirs([torch.zeros(1)])
    optimizer = ours([torch.zeros(1)], differentiable=differentiable)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((args[0], lambda: 7.0), {}))
    assert optimizer.step(lambda: 3.0) == 7.0


# Schedules.


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 20),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=40),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
def test_schedules_of_torch_drive_radam(schedule: str, lr: Any) -> None:
    """One cycle also turns betas; Rprop has no learning rate to schedule."""
    optimizers = []
    for kind in PAIRS[0]:
        params = parameters()
        optimizer = kind(params, lr=copy.deepcopy(lr))
        scheduler = SCHEDULES[schedule](optimizer)
        for step in range(30):
            loss = optimizer.step(closure(optimizer, params, step, 1.0))
            scheduler.step(*([loss.detach()] if schedule == "plateau" else []))
        optimizers.append(optimizer)
    assert float(optimizers[0].param_groups[0]["lr"]) != 0.05
    assert_same_optimizers(*optimizers)


# Copies and checkpoints, in mid-training.


def continued(optimizer: torch.optim.Optimizer, start: int, steps: int = 10) -> torch.optim.Optimizer:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, start + steps):
        optimizer.step(closure(optimizer, params, step, 1.0))
    return optimizer


def _by_torch_save(optimizer: torch.optim.Optimizer) -> Any:
    saved = io.BytesIO()
    torch.save(optimizer, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


@pair
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer)), _by_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_in_mid_training_goes_on_alike(ours: Any, theirs: Any, duplicate: Callable[[Any], Any]) -> None:
    optimizer = continued(ours(parameters(), lr=0.02), 0)
    again = duplicate(optimizer)
    assert type(again) is ours
    before = copy.deepcopy(optimizer.state_dict())
    continued(again, 10)
    assert_same(optimizer.state_dict(), before)
    assert_same_optimizers(again, continued(optimizer, 10))
    assert_same_optimizers(again, continued(theirs(parameters(), lr=0.02), 0, 20))
    calls: list[int] = []
    again.register_step_pre_hook(lambda *args: calls.append(1))
    again.step()
    assert calls == [1]


@pair
@pytest.mark.parametrize("direction", ["from torch", "to torch", "ours"])
@pytest.mark.parametrize("foreach", [True, False])
def test_a_state_dict_loads_in_mid_training(ours: Any, theirs: Any, direction: str, foreach: bool) -> None:
    source, target = {"from torch": (theirs, ours), "to torch": (ours, theirs), "ours": (ours, ours)}[direction]
    first = continued(source(parameters(), lr=0.02, foreach=foreach), 0)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    params = [p.detach().clone().requires_grad_() for p in first.param_groups[0]["params"]]
    second = target(params)
    second.load_state_dict(torch.load(saved))  # weights_only
    assert second.param_groups[0]["lr"] == 0.02
    assert second.param_groups[0]["fused"] is None  # loaded, or filled in
    assert_same_optimizers(continued(second, 10), continued(theirs(parameters(), lr=0.02, foreach=foreach), 0, 20))


@pair
def test_a_state_dict_whose_steps_are_numbers_loads(ours: Any, theirs: Any) -> None:
    """Those of torch before 1.12."""
    first = continued(theirs(parameters()), 0)
    old = copy.deepcopy(first.state_dict())
    for entry in old["state"].values():
        entry["step"] = int(entry["step"])
    second = ours([p.detach().clone().requires_grad_() for p in first.param_groups[0]["params"]])
    second.load_state_dict(old)
    assert_same_optimizers(continued(second, 10), continued(first, 10))


def test_a_closure_that_raises_changes_nothing() -> None:
    for ours, _ in PAIRS:
        for differentiable in (False, True):
            p = torch.zeros(2)
            p.grad = torch.ones(2)
            optimizer = ours([p], differentiable=differentiable)
            with pytest.raises(KeyError):
                optimizer.step(lambda: {}["none"])
            assert not p.any()
            assert not optimizer.state


def test_problem_has_weights_without_gradient() -> None:
    params = {name: p.clone().requires_grad_() for name, p in PROBLEM.start.items()}
    PROBLEM.loss(params).backward()
    assert params["hidden"].grad is not None
    assert not params["hidden"].grad[:, 3].any()
