"""Drop-ins with ``fused=True`` on a CPU, next to torch's classes, in all that one does with an optimizer.

With ``TRITON_INTERPRET=1`` the fused updates are the Triton kernels, in Triton's interpreter.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, OneCycleLR, SequentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel

from metaopt import optim
from metaopt.kernels.support import interpreted
from tests.optim.problem import F64, PAIRS, distance
from tests.optim.test_dropin import assert_same

pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["RAdam", "Rprop"])
every_fused = pytest.mark.parametrize("fused", [True, None, False])
HALF = 7  # steps before and after an interruption; RAdam rectifies from the sixth
ROUNDING = {torch.float32: 2e-6, torch.complex64: 2e-6, F64: 1e-9, torch.complex128: 1e-9}


def parameters() -> list[Tensor]:
    """Of several shapes and dtypes: 0-d, empty, complex, transposed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    made = [normal(3, 4), normal((), dtype=F64), normal(0, 2), normal(3, dtype=torch.complex64), normal(4, 3).t()]
    return [p.requires_grad_() for p in made]


def members(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: torch.optim.Optimizer, start: int = 0, steps: int = 2 * HALF) -> Any:
    """Pulls each parameter to a point that moves; the second has no gradient at every third step."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        for index, p in enumerate(members(optimizer)):
            if index != 1 or step % 3:
                (((p - 0.3 * (-1) ** step).abs() ** 2).sum() * (1 + index)).backward()
        optimizer.step()
    return optimizer


def assert_agree(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Parameters and state: the same for Rprop, the same but for rounding for RAdam."""
    tolerances = {dtype: 0.0 if isinstance(actual, optim.Rprop) else size for dtype, size in ROUNDING.items()}
    for p, right in zip(members(actual), members(expected), strict=True):
        assert distance(p, right) <= tolerances[p.dtype]
        state, right_state = actual.state[p], expected.state[right]
        assert list(state) == list(right_state)
        for key, value in right_state.items():
            assert_same(state[key].stride(), value.stride())
            assert distance(state[key], value) <= (0 if key == "step" else tolerances[value.dtype])


def copied(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def set_fused(optimizer: torch.optim.Optimizer, fused: bool | None) -> None:
    for group in optimizer.param_groups:
        group["fused"] = fused


# Going on in mid-training.


@pair
@pytest.mark.parametrize("source", ["torch", True, None, False], ids=lambda value: f"from {value}")
@pytest.mark.parametrize("target", ["torch", True, None, False], ids=lambda value: f"to {value}")
def test_a_state_dict_goes_on_with_any_other_setting(ours: Any, theirs: Any, source: Any, target: Any) -> None:
    def made(setting: Any, params: list[Tensor]) -> Any:
        return theirs(params) if setting == "torch" else ours(params, fused=setting)

    first = train(made(source, parameters()), 0, HALF)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = made(target, copied(members(first)))
    second.load_state_dict(torch.load(saved, weights_only=True))
    if target != "torch":
        set_fused(second, target)  # a state dict brings its own options
    assert_agree(train(second, HALF, HALF), train(theirs(parameters())))


@pair
def test_a_state_dict_brings_its_fused(ours: Any, theirs: Any) -> None:
    for saved in (True, False, None):
        for own in (True, False, None):
            optimizer = ours(parameters(), fused=own)
            optimizer.load_state_dict(ours(parameters(), fused=saved).state_dict())
            assert optimizer.param_groups[0]["fused"] is saved


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
    optimizer = train(ours(parameters(), fused=True), 0, HALF)
    again = duplicate(optimizer)
    before = snapshot(optimizer)
    train(again, HALF, HALF)
    assert_same(snapshot(optimizer), before)
    assert type(again) is ours
    assert again.param_groups[0]["fused"] is True
    assert_agree(again, train(theirs(parameters())))


@pair
def test_a_distributed_checkpoint_goes_on_alike(ours: Any, theirs: Any) -> None:
    """``torch.distributed.checkpoint`` steps a fresh optimizer with zero gradients before it loads."""

    def model_of(params: list[Tensor]) -> nn.Module:
        model = nn.Module()
        for index, p in enumerate(params):
            model.register_parameter(f"p{index}", nn.Parameter(p.detach()))
        return model

    first = model_of(parameters())
    optimizer = train(ours(first.parameters(), fused=True), 0, HALF)
    saved = copy.deepcopy(checkpoint.get_optimizer_state_dict(first, optimizer))
    assert set(saved["state"]) == {"p0", "p1", "p2", "p3", "p4"}
    second = model_of(copied(list(first.parameters())))
    again = ours(second.parameters(), fused=True)
    checkpoint.set_optimizer_state_dict(second, again, saved)
    for p, right in zip(second.parameters(), first.parameters(), strict=True):
        assert_same(p.detach(), right.detach())
        assert_same(again.state[p], optimizer.state[right])
    assert_agree(train(again, HALF, HALF), train(theirs(model_of(parameters()).parameters())))


# Groups.


@pair
def test_groups_have_their_own_options_and_their_own_fused(ours: Any, theirs: Any) -> None:
    own = {"betas": (0.5, 0.9), "weight_decay": 0.1} if ours is optim.RAdam else {"etas": (0.3, 1.5)}
    settings = iter([True, False, True, None])
    optimizers = []
    for kind in (ours, theirs):

        def fused(kind: Any = kind) -> dict[str, Any]:
            return {} if kind is theirs else {"fused": next(settings)}

        params = parameters()
        optimizer = kind([{"params": params[:1], **own, **fused()}, {"params": params[1:2], "lr": 0.3, **fused()}])
        train(optimizer, 0, HALF)
        optimizer.add_param_group({"params": params[2:4], "maximize": True, "lr": 1e-3, **fused()})
        optimizer.add_param_group({"params": params[4], **own, **fused()})
        optimizers.append(train(optimizer, HALF, HALF))
    assert [group["fused"] for group in optimizers[0].param_groups] == [True, False, True, None]
    assert_agree(*optimizers)
    assert [int(optimizers[0].state[p]["step"]) for p in members(optimizers[0])] == [14, 9, 7, 7, 7]


@pair
def test_an_added_group_is_fused_as_the_optimizer_is(ours: Any, theirs: Any) -> None:
    for fused in (True, None, False):
        optimizer = ours([torch.zeros(1)], fused=fused)
        optimizer.add_param_group({"params": [torch.zeros(1)]})
        assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]


@pair
def test_switching_fused_in_mid_training_changes_nothing_else(ours: Any, theirs: Any) -> None:
    optimizer = ours(parameters(), fused=True)
    for start, fused in ((0, True), (4, False), (8, None), (12, True)):
        set_fused(optimizer, fused)
        train(optimizer, start, 4)
    assert_agree(optimizer, train(theirs(parameters()), 0, 16))


@pair
def test_named_parameters_keep_their_names(ours: Any, theirs: Any) -> None:
    model = nn.Linear(2, 1)
    optimizer = ours(model.named_parameters(), fused=True)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert list(saved["state"]) == [0, 1]


# Around a step.


@pair
def test_a_closure_is_run_once_with_grad_and_its_loss_returned(ours: Any, theirs: Any) -> None:
    optimizers, losses = [], []
    for kind, options in ((ours, {"fused": True}), (theirs, {})):
        (p, *_) = parameters()
        optimizer = kind([p], lr=0.1, **options)
        calls: list[Tensor] = []

        def closure(optimizer: Any = optimizer, p: Tensor = p, calls: list[Tensor] = calls) -> Tensor:
            optimizer.zero_grad()
            calls.append(p.square().sum())
            calls[-1].backward()
            return calls[-1]

        returned = [optimizer.step(closure) for _ in range(HALF)]
        assert len(calls) == HALF
        assert all(loss is call for loss, call in zip(returned, calls, strict=True))
        losses.append(torch.stack(calls))
        optimizers.append(optimizer)
    assert_agree(*optimizers)
    assert distance(*losses) < 2e-6


@pair
@every_fused
def test_every_hook_runs_once(ours: Any, theirs: Any, fused: bool | None) -> None:
    theirs([torch.zeros(1)])  # torch wraps the step of a class when one is made
    p = torch.zeros(2)
    p.grad = torch.ones(2)
    optimizer = ours([{"params": [p]}, {"params": [torch.zeros(1)], "fused": not fused}], fused=fused)
    calls: list[str] = []
    handles = [
        register(lambda *args, name=name: calls.append(name))
        for name, register in (
            ("global pre", register_optimizer_step_pre_hook),
            ("pre", optimizer.register_step_pre_hook),
            ("post", optimizer.register_step_post_hook),
            ("global post", register_optimizer_step_post_hook),
            ("state dict pre", optimizer.register_state_dict_pre_hook),
            ("state dict post", optimizer.register_state_dict_post_hook),
            ("load pre", optimizer.register_load_state_dict_pre_hook),
            ("load post", optimizer.register_load_state_dict_post_hook),
        )
    ]
    try:
        optimizer.step()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
    finally:
        for handle in handles:
            handle.remove()
    step, load = ["global pre", "pre", "post", "global post"], ["load pre", "load post"]
    assert calls == [*step, "state dict pre", "state dict post", *load]
    assert int(optimizer.state[p]["step"]) == 1


@pair
@every_fused
def test_the_sequence_of_schedules_in_torchs_documentation_sets_lr(ours: Any, theirs: Any, fused: bool | None) -> None:
    optimizers = []
    for kind, options in ((ours, {"fused": fused}), (theirs, {})):
        (p, *_) = parameters()
        optimizer = kind([p], lr=0.05, **options)
        schedules = [ConstantLR(optimizer, factor=0.1, total_iters=6), ExponentialLR(optimizer, gamma=0.9)]
        scheduler = SequentialLR(optimizer, schedules, milestones=[6])
        for step in range(12):
            train(optimizer, step, 1)
            scheduler.step()
        optimizers.append(optimizer)
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.05 * 0.9**6] * 2)
    assert_agree(*optimizers)


@every_fused
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
def test_one_cycle_turns_lr_and_beta1_of_radam(fused: bool | None, lr: Any) -> None:
    optimizers, betas = [], []
    for kind, options in ((optim.RAdam, {"fused": fused}), (torch.optim.RAdam, {})):
        optimizer = kind(parameters(), lr=copy.deepcopy(lr), **options)
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=20)
        for step in range(12):
            train(optimizer, step, 1)
            scheduler.step()
            betas.append(optimizer.param_groups[0]["betas"][0])
        optimizers.append(optimizer)
    assert betas[:12] == betas[12:]
    assert len(set(betas)) > 6
    assert_agree(*optimizers)


@pair
def test_weights_averaged_under_swalr_are_those_of_torch(ours: Any, theirs: Any) -> None:
    averages, optimizers = [], []
    for kind, options in ((ours, {"fused": True}), (theirs, {})):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        average = AveragedModel(model)
        optimizer = kind(model.parameters(), lr=0.1, **options)
        scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        for step in range(10):
            train(optimizer, step, 1)
            average.update_parameters(model)
            scheduler.step()
        averages.append(average)
        optimizers.append(optimizer)
    assert_agree(*optimizers)
    for actual, expected in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        assert distance(actual, expected) <= (2e-6 if ours is optim.RAdam else 0)


def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    nn.utils.clip_grad_norm_(members(optimizer), 0.1)


@pair
def test_clipped_gradients_are_followed(ours: Any, theirs: Any) -> None:
    optimizers = []
    for kind, options in ((ours, {"fused": True}), (theirs, {})):
        params = parameters()
        optimizer = kind(params, lr=0.1, **options)
        optimizer.register_step_pre_hook(clip)
        optimizers.append(train(optimizer, 0, 10))
    assert_agree(*optimizers)


# Gradient scaling.


def scaled(kind: Any, unscale: bool, bad: int | None, **options: Any) -> tuple[Any, list[Any], list[Any]]:
    """A run under a GradScaler, with snapshots around the step ``bad``, whose gradients overflow."""
    params = parameters()[:2]
    optimizer = kind(params, lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    snapshots, grads = [], []
    for step in range(HALF + 3):
        optimizer.zero_grad()
        loss = sum(((p - 0.3 * (-1) ** step) ** 2).sum().to(F64) for p in params)
        scaler.scale(loss).backward()
        if step == bad:
            params[0].grad[1, 1] = float("inf")
            snapshots.append(snapshot(optimizer))
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step == bad:
            snapshots.append(snapshot(optimizer))
        else:
            grads += [p.grad.clone() for p in params]
    assert not hasattr(optimizer, "found_inf")
    return optimizer, snapshots, [*grads, torch.tensor(scaler.get_scale())]


@pair
@every_fused
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("bad", [None, 3])
def test_a_grad_scaler_unscales_and_skips_what_overflows(
    ours: Any, theirs: Any, fused: bool | None, unscale: bool, bad: int | None
) -> None:
    optimizer, snapshots, seen = scaled(ours, unscale, bad, fused=fused)
    expected, _, expected_seen = scaled(theirs, unscale, bad)
    if bad is not None:
        assert_same(*snapshots)
    assert int(optimizer.state[members(optimizer)[0]]["step"]) == HALF + 3 - (bad is not None)
    assert_agree(optimizer, expected)
    for actual, right in zip(seen, expected_seen, strict=True):
        assert distance(actual, right) < 1e-5


@pair
def test_a_first_step_that_overflows_is_as_if_it_had_not_been(ours: Any, theirs: Any) -> None:
    optimizers = [scaled(kind, False, 0, **options)[0] for kind, options in ((ours, {"fused": True}), (theirs, {}))]
    assert_agree(*optimizers)


@pair
def test_a_grad_scaler_steps_groups_of_which_one_is_fused(ours: Any, theirs: Any) -> None:
    optimizers = []
    for kind, fused in ((ours, ({"fused": True}, {"fused": False})), (theirs, ({}, {}))):
        params = parameters()[:2]
        optimizer = kind([{"params": [p], **options} for p, options in zip(params, fused, strict=True)], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(HALF):
            optimizer.zero_grad()
            loss = sum(((p - 0.3 * (-1) ** step) ** 2).sum().to(F64) for p in params)
            scaler.scale(loss).backward()
            if step == 3:
                params[1].grad.fill_(float("nan"))
            scaler.step(optimizer)
            scaler.update()
        optimizers.append(optimizer)
    assert_agree(*optimizers)
    assert [int(optimizers[0].state[p]["step"]) for p in members(optimizers[0])] == [HALF - 1] * 2


@pair
@every_fused
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it first traces
def test_a_compiled_step_is_that_of_torch(ours: Any, theirs: Any, fused: bool | None) -> None:
    """Torch's compiled one, whose bias corrections are float32, unless fused: then the eager one."""
    torch._dynamo.reset()
    optimizers = []
    for kind, options, compiled in ((ours, {"fused": fused}, True), (theirs, {}, not fused)):
        params = parameters()[:1]
        optimizer = kind(params, lr=0.1, **options)
        step = torch.compile(lambda o=optimizer: o.step(), backend="aot_eager") if compiled else optimizer.step
        for _ in range(HALF):
            params[0].grad = 2 * params[0].detach()
            step()
        optimizers.append(optimizer)
    assert int(optimizers[0].state[members(optimizers[0])[0]]["step"]) == HALF
    assert_agree(*optimizers)


# Parameters and gradients of all sorts.


@pair
def test_a_parameter_without_gradient_gets_no_state(ours: Any, theirs: Any) -> None:
    optimizer = ours([torch.zeros(2), torch.zeros(3)], fused=True)
    optimizer.step()
    assert not optimizer.state
    with_gradient = optimizer.param_groups[0]["params"][1]
    with_gradient.grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state) == [with_gradient]
    assert int(optimizer.state[with_gradient]["step"]) == 1


@pair
def test_under_a_default_of_float64_training_is_that_of_torch(ours: Any, theirs: Any) -> None:
    torch.set_default_dtype(F64)
    try:
        actual, expected = train(ours(parameters(), fused=True)), train(theirs(parameters()))
    finally:
        torch.set_default_dtype(torch.float32)
    for p, right in zip(members(actual), members(expected), strict=True):
        assert distance(p, right) <= (0 if ours is optim.Rprop else ROUNDING[p.dtype])
        assert float(actual.state[p]["step"]) == float(expected.state[right]["step"])


@pair
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "negated view", "conjugated"])
def test_a_gradient_may_lie_in_memory_in_any_way(ours: Any, theirs: Any, layout: str) -> None:
    """Many parameters at once, so that no gradient can stand in for another."""
    optimizers = []
    for kind, options in ((ours, {"fused": True}), (theirs, {})):
        torch.manual_seed(0)
        dtype = torch.complex64 if layout == "conjugated" else torch.float32
        params = [torch.randn(4, 3, dtype=dtype).requires_grad_() for _ in range(6)]
        optimizer = kind(params, lr=0.1, **options)
        for _ in range(3):
            for p in params:
                p.grad = {
                    "transposed": lambda: torch.randn(3, 4).t(),
                    "strided": lambda: torch.randn(8, 9)[::2, ::3],
                    "expanded": lambda: torch.randn(4, 1).expand(4, 3),
                    "negated view": lambda: torch.randn(4, 3, dtype=torch.complex64).conj().imag,
                    "conjugated": lambda: torch.randn(4, 3, dtype=torch.complex64).conj(),
                }[layout]()
                if kind is theirs:  # torch's refuses these
                    p.grad = p.grad.resolve_conj()
            optimizer.step()
        optimizers.append(optimizer)
    assert_agree(*optimizers)


# What is refused, before anything has changed.


def snapshot(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], dict[str, Any]]:
    """All that a step changes."""
    return copy.deepcopy(([p.detach() for p in members(optimizer) if p.device.type != "meta"], optimizer.state_dict()))


@contextmanager
def refused(optimizer: torch.optim.Optimizer, kind: type[Exception], *words: str) -> Iterator[None]:
    before = snapshot(optimizer)
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    assert_same(snapshot(optimizer), before)


def two_groups(ours: Any, bad: Tensor, named: bool, **options: Any) -> Any:
    """A group that has been stepped, and is ready for the next step, and one with the parameter that will be bad."""
    (good, *_) = parameters()
    first, second = ([("layer.good", good)], [("layer.bad", bad)]) if named else ([good], [bad])
    optimizer = ours([{"params": first}, {"params": second, **options}], fused=options.get("fused"))
    for _ in range(2):
        good.grad = torch.ones_like(good)
        optimizer.step()
    return optimizer


def _sparse() -> Tensor:
    p = torch.zeros(2, 2)
    p.grad = torch.eye(2).to_sparse()
    return p


def _with_gradient(p: Tensor) -> Tensor:
    p.grad = torch.ones_like(p)
    return p


def _mixed() -> Tensor:
    p = torch.zeros(2, requires_grad=True)
    p.grad_dtype = torch.bfloat16
    p.grad = torch.ones(2, dtype=torch.bfloat16)
    return p


_BAD: dict[str, tuple[Callable[[], Tensor], dict[str, Any], type[Exception], str]] = {
    "sparse": (_sparse, {}, RuntimeError, "does not support sparse gradients"),
    "capturable": (lambda: _with_gradient(torch.zeros(2)), {"capturable": True}, AssertionError, "If capturable=True"),
}
_BAD_FUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: _with_gradient(torch.zeros(2, device="meta")), "it lies on meta"),
    "integer": (lambda: _with_gradient(torch.zeros(2, dtype=torch.int64)), "its dtype is torch.int64"),
    "bfloat16": (lambda: _with_gradient(torch.zeros(2, dtype=torch.bfloat16)), "its dtype is torch.bfloat16"),
    "conjugated": (lambda: _with_gradient(torch.zeros(2, dtype=torch.complex64).conj()), "a lazy conjugate"),
    "gradient of another dtype": (_mixed, "that of its gradient torch.bfloat16"),
}


@pair
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("case", _BAD)
def test_a_step_that_is_refused_names_the_parameter_and_changes_nothing(
    ours: Any, theirs: Any, case: str, fused: bool | None, named: bool
) -> None:
    make, options, kind, words = _BAD[case]
    bad = make()
    grad, bad.grad = bad.grad, None
    optimizer = two_groups(ours, bad, named, fused=fused, **options)
    bad.grad = grad
    with refused(optimizer, kind, words, "'layer.bad'" if named else "parameter 0 of group 1"):
        optimizer.step()


@pair
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("case", _BAD_FUSED)
def test_what_cannot_be_fused_is_named_and_nothing_changes(ours: Any, theirs: Any, case: str, named: bool) -> None:
    if interpreted() and case in ("bfloat16", "gradient of another dtype"):
        pytest.skip("Triton's kernels take it")
    make, words = _BAD_FUSED[case]
    bad = make()
    grad, bad.grad = bad.grad, None
    optimizer = two_groups(ours, bad, named, fused=True)
    bad.grad = grad
    name = "'layer.bad'" if named else "parameter 0 of group 1"
    with refused(optimizer, RuntimeError, f"fused=True cannot update {name}: ", words):
        optimizer.step()


@pair
@pytest.mark.parametrize("change", ["dtype", "size"])
def test_states_that_no_longer_fit_are_named_and_nothing_changes(ours: Any, theirs: Any, change: str) -> None:
    """As after ``model.double()``, or when somebody has replaced them: a kernel would leave their memory."""
    bad = torch.zeros(3, dtype=torch.complex64)
    optimizer = two_groups(ours, bad, True, fused=True)
    bad.grad = torch.ones_like(bad)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq") if ours is optim.RAdam else ("prev", "step_size"):
        state = optimizer.state[bad][key]
        optimizer.state[bad][key] = state.real.clone() if change == "dtype" else state[:2].clone()
    fresh = torch.zeros(2)
    fresh.grad = torch.ones(2)
    optimizer.add_param_group({"params": [("layer.fresh", fresh)]})
    with refused(optimizer, RuntimeError, "'layer.bad'", "do not fit each other", "(3,) complex64"):
        optimizer.step()


@pair
@every_fused
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("key", ["step", "first", "second"])
@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_changes(
    ours: Any, theirs: Any, fused: bool | None, named: bool, key: str, fault: str
) -> None:
    first, second = ("exp_avg", "exp_avg_sq") if ours is optim.RAdam else ("prev", "step_size")
    key = {"step": "step", "first": first, "second": second}[key]
    bad = torch.zeros(2)
    optimizer = two_groups(ours, bad, named, fused=fused)
    bad.grad = torch.ones(2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"][0][first] += 1
    if fault == "missing":
        del saved["state"][1][key]
    else:
        saved["state"][1][key] = torch.zeros(3)
    word = f"lacks {key} " if fault == "missing" else f"{key} of shape (3,)"
    with refused(optimizer, ValueError, word, "'layer.bad'" if named else "parameter 0 of group 1"):
        optimizer.load_state_dict(saved)
    train(optimizer, 0, 1)
