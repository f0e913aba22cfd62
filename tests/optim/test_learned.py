"""A learned optimizer as a torch.optim class: the functional step, in place and in bounded memory."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from metaopt import functional, memory
from metaopt.learned import AdafactorMLPOptimizer, LSTMOptimizer, MLPOptimizer
from metaopt.optim import Learned, chunked
from metaopt.tasks.digits import convnet, load_digits

DESIGNS = [MLPOptimizer, LSTMOptimizer, AdafactorMLPOptimizer]
SHAPES: list[tuple[int, ...]] = [(5, 7), (), (0, 3), (40, 30), (150,), (8, 3, 3, 3), (64,)]

designs = pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.__name__)


def learned(design: Any = MLPOptimizer, **options: Any) -> Any:
    torch.manual_seed(1)
    scale = {} if design is LSTMOptimizer else {"step_scale": 0.1}
    return design(**{**scale, **options})


def parameters(*more: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    return [p.requires_grad_() for p in (*(torch.randn(shape) for shape in SHAPES), *more)]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    torch.manual_seed(100 + step)
    for number, p in enumerate(params):
        p.grad = torch.randn_like(p) * 10.0 ** (number % 3 - 1)  # so that tensors need different normalisers


def functional_steps(opt: Any, params: Sequence[Tensor], steps: int, sign: float = 1.0, **hyper: Any) -> list[Tensor]:
    tree = {str(number): p.detach().clone() for number, p in enumerate(params)}
    clones = [p.detach().clone() for p in params]
    state = opt.init(tree)
    with torch.no_grad():
        for step in range(steps):
            set_grads(clones, step)
            grads = {str(number): None if p.grad is None else sign * p.grad for number, p in enumerate(clones)}
            tree, state = opt.step(tree, grads, state, **hyper)
    return list(tree.values())


def steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        set_grads(params, step)
        optimizer.step()


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 2e-6) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.detach(), theirs, rtol=tolerance, atol=tolerance)


def assert_equal_states(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for index, state in theirs["state"].items():
        assert list(ours["state"][index]) == list(state)
        for field, part in state.items():
            torch.testing.assert_close(ours["state"][index][field], part, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [None, 100], ids=["one chunk", "many chunks"])
@designs
def test_steps_are_those_of_the_functional_optimizer(
    design: Any, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size is not None:
        monkeypatch.setitem(chunked.SIZES, "cpu", size)
    params = parameters(torch.randn(30, 20).t(), torch.randn(6, 5, 4, 9).permute(3, 1, 0, 2))
    opt = learned(design)
    expected = functional_steps(opt, params, 6, lr=0.5)
    start = [p.detach().clone() for p in params]
    steps(Learned(params, opt, lr=0.5), params, 6)
    assert_close(params, expected)
    assert all(not torch.equal(p, q) for p, q in zip(params, start, strict=True) if p.numel())


@designs
def test_maximize_turns_the_gradient_round(design: Any) -> None:
    params, opt = parameters(), learned(design)
    expected = functional_steps(opt, params, 4, sign=-1.0)
    steps(Learned(params, opt, maximize=True), params, 4)
    assert_close(params, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@designs
def test_each_dtype_is_computed_as_by_the_functional_optimizer(
    design: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.SIZES, "cpu", 100)
    params, opt = parameters(torch.ones(3, dtype=dtype), torch.ones(20, 10, dtype=dtype)), learned(design)
    expected = functional_steps(opt, params, 3)
    optimizer = Learned(params, opt)
    steps(optimizer, params, 3)
    assert_close(params[:-2], expected[:-2])
    assert_close(params[-2:], expected[-2:], 1e-12 if dtype == torch.float64 else 1e-2)
    kept = {part.dtype for field, part in optimizer.state[params[-1]].items() if field != "step"}
    assert kept == {torch.float64 if dtype == torch.float64 else torch.float32}


@designs
def test_a_nan_stays_in_its_tensor(design: Any) -> None:
    params = [torch.ones(5).requires_grad_() for _ in range(3)]
    set_grads(params, 0)
    assert params[1].grad is not None
    params[1].grad[2] = torch.nan
    Learned(params, learned(design)).step()
    assert params[0].isfinite().all()
    assert params[2].isfinite().all()
    assert params[1].isnan().any()


def test_weights_that_change_are_used_at_once() -> None:
    params, opt = parameters(torch.ones(2, dtype=torch.float64)), learned()
    optimizer = Learned(params, opt)
    steps(optimizer, params, 1)
    with torch.no_grad():
        for weight in opt.parameters():
            weight.data.zero_()
    before = [p.detach().clone() for p in params]
    steps(optimizer, params, 1, first=1)
    assert_close(params, before, 0.0)


def test_groups_have_their_own_lr_and_a_scheduler_changes_it() -> None:
    params, opt = parameters(), learned()
    optimizer = Learned([{"params": params[:2]}, {"params": params[2:4], "lr": 0.25}], opt, lr=0.5)
    optimizer.add_param_group({"params": (p for p in params[4:]), "lr": torch.tensor(0.125)})
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def expected(lr: float) -> list[Tensor]:
        return functional_steps(opt, params, 3, lr=lambda step: lr / (1 + step))

    wanted = [*expected(0.5)[:2], *expected(0.25)[2:4], *expected(0.125)[4:]]
    for step in range(3):
        steps(optimizer, params, 1, first=step)
        scheduler.step()
    assert_close(params, wanted)


def test_a_parameter_without_a_gradient_is_left_alone_with_its_state() -> None:
    params, opt = parameters(), learned()
    expected = functional_steps(opt, params[:1], 1)
    optimizer = Learned(params, opt)
    start = [p.detach().clone() for p in params]
    set_grads(params[:1], 0)
    optimizer.step()
    assert_close(params, [*expected, *start[1:]])
    assert list(optimizer.state) == params[:1]
    steps(optimizer, params, 1)  # counters now differ
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0] + [1.0] * (len(params) - 1)
    assert_close(params[1:], functional_steps(opt, start, 1)[1:])


def test_closure_and_hooks() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = Learned([("weight", p)], learned())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        seen.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert seen == ["before", "closure", "after"]
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    optimizer.zero_grad()
    assert p.grad is None


@designs
def test_no_graph_is_kept(design: Any) -> None:
    params, opt = parameters(), learned(design)
    optimizer = Learned(params, opt)
    steps(optimizer, params, 2)
    assert all(p.is_leaf and p.grad_fn is None and p.requires_grad for p in params)
    assert not any(part.requires_grad for state in optimizer.state.values() for part in state.values())
    assert all(weight.grad is None for weight in opt.parameters())


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@designs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_bit_for_bit_from_its_state_dict(design: Any, dtype: torch.dtype) -> None:
    params = parameters(torch.ones(9, dtype=dtype))
    opt = learned(design)
    optimizer = Learned(params, opt, lr=0.5)
    steps(optimizer, params, 3)
    copies = [p.detach().clone().requires_grad_() for p in params]
    resumed = Learned(copies, opt)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal_states(resumed, optimizer)
    steps(optimizer, params, 3, first=3)
    steps(resumed, copies, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert_equal_states(resumed, optimizer)


@designs
def test_copies_go_on_bit_for_bit(design: Any) -> None:
    params = parameters()
    optimizer = Learned(params, learned(design), lr=0.5)
    steps(optimizer, params, 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        ours = other.param_groups[0]["params"]
        theirs = [p.detach().clone() for p in params]
        resumed = Learned(theirs, optimizer.optimizer)
        resumed.load_state_dict(optimizer.state_dict())
        for _ in range(2):
            steps(other, ours, 1, first=2)
            steps(resumed, theirs, 1, first=2)
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_loaded_state_is_not_shared() -> None:
    params = parameters()
    optimizer = Learned(params, learned())
    steps(optimizer, params, 1)
    saved = optimizer.state_dict()
    before = saved["state"][0]["momenta"].clone()
    copies = [p.detach().clone() for p in params]
    resumed = Learned(copies, optimizer.optimizer)
    resumed.load_state_dict(saved)
    steps(resumed, copies, 1)
    assert torch.equal(optimizer.state[params[0]]["momenta"], before)


def test_state_of_another_design_is_refused_and_nothing_changes() -> None:
    params = [torch.ones(3, requires_grad=True)]
    other = Learned(params, learned(LSTMOptimizer, units=4))
    steps(other, params, 1)
    optimizer = Learned(params, learned())
    steps(optimizer, params, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"has step, hidden, cell for .*; a MLPOptimizer keeps step, momenta"):
        optimizer.load_state_dict(other.state_dict())
    larger = Learned([torch.ones(3)], learned(LSTMOptimizer, units=5))
    with pytest.raises(ValueError, match=r"has hidden of shape \(2, 4, 3\) .* keeps \(2, 5, 3\)"):
        larger.load_state_dict(other.state_dict())
    assert not larger.state
    assert torch.equal(optimizer.state[params[0]]["momenta"], before["state"][0]["momenta"])


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ([torch.zeros(2, dtype=torch.complex64)], {}, TypeError, "parameter 0 of group 0 of dtype torch.complex64"),
        ([("w", torch.zeros(2, dtype=torch.int64))], {}, TypeError, "'w' of dtype torch.int64"),
        ([torch.zeros(2)], {"lr": -0.5}, ValueError, "lr must be >= 0.*, got lr=-0.5"),
        ([torch.zeros(2)], {"lr": "fast"}, TypeError, "got lr='fast'"),
        ([torch.zeros(2)], {"optimizer": functional.adam()}, TypeError, "optimizer must be a learned .*adam"),
        ([torch.zeros(2)], {"optimizer": nn.Linear(1, 1)}, TypeError, "optimizer must be a learned .*Linear"),
        ([torch.zeros(2)], {"optimizer": MLPOptimizer}, TypeError, "optimizer must be a learned .*class"),
    ],
)
def test_bad_arguments_are_named(params: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Learned(params, **{"optimizer": learned(), **options})


def test_a_bad_group_is_not_added_and_a_bad_step_changes_nothing() -> None:
    params = parameters()
    optimizer = Learned(params, learned())
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [torch.zeros(1)], "lr": -1})
    assert len(optimizer.param_groups) == 1
    set_grads(params, 0)
    params[-1].grad = torch.zeros(64).to_sparse()
    start = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="sparse gradients: parameter 6 of group 0"):
        optimizer.step()
    assert_close(params, start, 0.0)
    assert not optimizer.state


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.__name__)
def test_temporaries_are_bounded(design: Any) -> None:
    options: dict[str, Any] = {"units": 1} if design is LSTMOptimizer else {}
    params = [torch.randn(shape).requires_grad_() for shape in (*[(100,)] * 2000, (2400, 2000))]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = Learned(params, learned(design, **options))
    with torch.no_grad():
        for p in params:  # state, which is no temporary
            optimizer.state[p] = optimizer._fresh(p)
    assert memory.peak(optimizer.step) < 20e6


def test_compiled_chunks_give_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.SIZES, "cpu", 64)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what it would be given
    for design in DESIGNS:
        params, opt = parameters(), learned(design)
        expected = functional_steps(opt, params, 3)
        steps(Learned(params, opt, compile=True), params, 3)
        assert_close(params, expected)


@pytest.mark.parametrize("design", [MLPOptimizer, LSTMOptimizer], ids=lambda design: design.__name__)
def test_nothing_is_compiled_twice(design: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setitem(chunked.SIZES, "cpu", 64)
    torch._dynamo.reset()
    params, opt = [p for p in parameters() if p.numel() != 1], learned(design)
    expected = functional_steps(opt, params, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps(Learned(params, opt, compile=True), params, 3)
    assert_close(params, expected)


@designs
def test_a_convnet_is_trained(design: Any) -> None:
    """Weights set by hand: a step against the sign of the gradient or its average."""
    pytest.importorskip("sklearn")
    images, labels = load_digits().train
    images, labels = images[:300], labels[:300]
    torch.manual_seed(0)
    model, opt = convnet(4), by_hand(design)
    optimizer = Learned(model.named_parameters(), opt)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def by_hand(design: Any) -> Any:
    opt = design(output_scale=1.0) if design is LSTMOptimizer else design(step_scale=0.01)
    with torch.no_grad():
        for weight in opt.parameters():
            weight.zero_()
        if design is LSTMOptimizer:  # the second input is the sign; gates open at a bias
            units = opt.units
            opt.gates1[2 * units, 1] = opt.gates2[2 * units, 0] = 10.0
            opt.gates1_bias[:units] = opt.gates1_bias[3 * units :] = 10.0
            opt.gates2_bias[:units] = opt.gates2_bias[3 * units :] = 10.0
            opt.output[0, 0] = -0.02
            opt.gates1_bias[units : 2 * units] = opt.gates2_bias[units : 2 * units] = -10.0
        else:  # relu(x) - relu(-x) of the normalised gradient
            opt.weight1[0, 0], opt.weight1[1, 0] = 1.0, -1.0
            opt.weight2[0, 0] = opt.weight2[1, 1] = 1.0
            opt.weight3[0, 0], opt.weight3[0, 1] = 1.0, -1.0
    return opt
