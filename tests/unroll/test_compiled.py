"""Compiled unrolls: the numbers of the eager ones, one compilation for all of them, and a way on without a compiler."""

from __future__ import annotations

import functools
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn
from torch._dynamo.utils import counters
from torch.distributions import constraints

from metaopt import Hyperparameters, PerParameter, Schedule
from metaopt.compilation import inductor
from metaopt.compilation.trusted import observed
from metaopt.functional import REGISTRY, radam, rprop, sgd
from metaopt.metagrad import Estimator, Forward, Unrolled
from metaopt.tasks import NoisyQuadratic, Replicas
from tests.metagrad.reference import STARTS, Regression, seeded
from tests.unroll.test_modes import (
    CASES,
    IGNORED,
    NORMALIZED,
    NORMALIZED_STARTS,
    Raw,
    assert_close,
    assert_refused,
    f64,
    measured,
)

F64 = torch.float64
STEPS = 8  # RAdam rectifies from the sixth on
NAMES = ("in.weight", "in.bias", "out.weight")

MODES: dict[str, Callable[..., Estimator]] = {
    "recorded": functools.partial(Unrolled, compile=True),
    "segments": functools.partial(Unrolled, segments="sqrt", compile=True),
    "forward": functools.partial(Forward, compile=True),
}


def mode_or_all(chosen: str) -> pytest.MarkDecorator:
    """One mode, and the others in the long profile: compiling takes seconds."""
    modes = [pytest.param(mode, marks=[] if mode == chosen else pytest.mark.long) for mode in MODES]
    return pytest.mark.parametrize("mode", modes)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled is left from another test, nor for one."""
    counters.clear()
    yield
    inductor._REMEMBERED.clear()
    inductor._warn_once.cache_clear()
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without code generation: traced by dynamo and AOT autograd, and run as it is. A tenth of the time."""
    whole, trace = torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: Any, inputs: Any) -> Any:
        return observed(trace(graph, inputs))

    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, **{**options, "backend": backend}))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Single(Regression):
    """The network in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = self.x.float(), self.y.float()

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {name: p.float() for name, p in super().init(generator).items()}


def gradient(
    estimator: Estimator, task: Any, opt: Any, learn: Mapping[str, Any], seed: int = 0
) -> tuple[Tensor, Tensor]:
    hyper = Hyperparameters(opt, learn)
    loss = estimator.backward(task, opt, hyper, seeded(seed))
    return loss, torch.cat([p.grad.flatten() for p in hyper.parameters() if p.grad is not None])


# With inductor


@mode_or_all("segments")
def test_radam_compiles_once_and_gives_the_eager_hypergradient_at_every_horizon_and_seed(mode: str) -> None:
    """Twenty meta-steps, the hyperparameters changing, on either side of the first rectified step; float64."""
    task, opt = Regression(), radam()
    hyper = Hyperparameters(opt, STARTS["radam"])
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=0.01)
    after_first = None
    for meta_step in range(20):
        steps = (8, 12, 4)[meta_step % 3]
        meta_optimizer.zero_grad()
        loss = MODES[mode](steps).backward(task, opt, hyper, seeded(meta_step))
        got = {key: p.grad for key, p in hyper.named_parameters()}
        meta_optimizer.zero_grad()
        want = Unrolled(steps).backward(task, opt, hyper, seeded(meta_step))
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=0.0)
        for key, p in hyper.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(got[key], p.grad, rtol=1e-9, atol=1e-15)
        meta_optimizer.step()
        after_first = after_first or graphs()
        assert graphs() == after_first, f"meta-step {meta_step} compiled anew"
    assert after_first


@mode_or_all("segments")
def test_rprop_in_single_precision_gives_the_eager_hypergradient(mode: str) -> None:
    task, opt = Single(), rprop()
    loss, got = gradient(MODES[mode](STEPS, "mean"), task, opt, STARTS["rprop"])
    want_loss, want = gradient(Unrolled(STEPS, "mean"), task, opt, STARTS["rprop"])
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0.0)
    assert bool((want != 0).all())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0.0)


def test_replicas_of_radam_in_single_precision_with_schedules_and_a_penalty_give_the_eager_hypergradient() -> None:
    task, opt = Replicas(Single(), 3), radam(eps=0.01)
    learn = {
        "lr": PerParameter(NAMES, Schedule(STEPS, 0.05)),
        "betas": (0.8, 0.97),
        "penalty": (0.02, constraints.positive),
    }
    _, got = gradient(MODES["segments"](STEPS, "inner"), task, opt, learn)
    _, want = gradient(Unrolled(STEPS, "inner"), task, opt, learn)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# Traced


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("case", "objective", "mode"),
    [
        ("rprop", "inner", "segments"),
        ("adamw", "mean", "recorded"),
        ("sgd, nesterov", "final", "forward"),
        pytest.param(*("a penalty, radam", "inner", "segments"), marks=pytest.mark.long),
        ("per parameter and step, sgd", "mean", "recorded"),
        pytest.param(*("per element, radam", "final", "recorded"), marks=pytest.mark.long),
        ("dead coordinates, radam", "mean", "segments"),
        ("dead coordinates, rprop", "final", "recorded"),
        ("not elementwise", "mean", "recorded"),
        pytest.param(*("replicas, radam", "mean", "segments"), marks=pytest.mark.long),
        pytest.param(*("replicas, not elementwise", "inner", "recorded"), marks=pytest.mark.long),
        pytest.param(*("example weights, sgd", "inner", "forward"), marks=pytest.mark.long),
        pytest.param(*("two precisions, adam", "mean", "recorded"), marks=pytest.mark.long),
        ("sgd, in another order than the optimizer's", "mean", "recorded"),
    ],
)
def test_every_program_gives_the_eager_hypergradient_when_traced(case: str, objective: Any, mode: str) -> None:
    want = measured(Unrolled(STEPS, objective), case)
    assert graphs() == 0
    assert_close(measured(MODES[mode](STEPS, objective), case), want, CASES[case].accuracy)
    assert graphs() > 0


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("segments", [None, 2])
@pytest.mark.parametrize("objective", ["inner"])
@pytest.mark.parametrize("name", ["radam", "rprop"])
def test_truncated_windows_share_what_was_compiled(name: str, objective: Any, segments: int | None) -> None:
    task, opt = Regression(), REGISTRY[name](**STARTS[name])
    learn = {key: start for key, start in STARTS[name].items() if key != "lr"}
    arguments = (STEPS, objective, 3, segments)
    want_loss, want = gradient(Unrolled(*arguments), task, opt, learn)
    loss, got = gradient(Unrolled(*arguments, compile=True), task, opt, learn)
    torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)
    before = graphs()
    gradient(Unrolled(12, objective, 4, segments, compile=True), task, opt, learn, seed=1)
    assert graphs() == before


@pytest.mark.usefixtures("traced")
@mode_or_all("forward")
@pytest.mark.parametrize("objective", ["inner"])
@pytest.mark.parametrize("name", ["rprop", pytest.param("sgd", marks=pytest.mark.long)])
def test_twenty_meta_steps_of_two_horizons_compile_what_the_first_did(name: str, objective: Any, mode: str) -> None:
    task, opt = Regression(), REGISTRY[name]()
    hyper = Hyperparameters(opt, STARTS[name])
    for meta_step in range(20):
        estimator = MODES[mode]((8, 12)[meta_step % 2], objective)
        estimator.backward(task, opt, hyper, seeded(meta_step))
        if meta_step == 0:
            first = graphs()
        assert graphs() == first


@pytest.mark.usefixtures("traced")
@mode_or_all("segments")
def test_what_is_learned_of_an_optimizer_and_on_what_is_told_apart(mode: str) -> None:
    """A step compiled for one set of learned values, flags, numbers or tasks is not used for another."""
    plain, nesterov, other = sgd(momentum=0.8), sgd(momentum=0.8, nesterov=True), sgd(momentum=0.5)
    steep, flat = NoisyQuadratic(dimension=3, dtype=F64), NoisyQuadratic(dimension=3, condition=2.0, dtype=F64)
    runs = [
        (plain, steep, {"lr": 0.1}),
        (nesterov, steep, {"lr": 0.1}),
        (other, steep, {"lr": 0.1}),
        (plain, flat, {"lr": 0.1}),
        (plain, steep, {"lr": 0.1, "momentum": 0.7}),
        (plain, steep, {"lr": PerParameter([""], 0.1)}),
        (plain, steep, {"lr": Schedule(STEPS, 0.1)}),
        (plain, steep, {"lr": 0.1}),
    ]
    wants = []
    for opt, task, learn in runs:
        names = [*_names(task)]
        learn = {**learn, "lr": PerParameter(names, 0.1)} if isinstance(learn["lr"], PerParameter) else learn
        _, got = gradient(MODES[mode](STEPS), task, opt, learn)
        _, want = gradient(Unrolled(STEPS), task, opt, learn)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)
        wants.append(want.sum().item())
    assert wants[0] == wants[-1]
    assert len({round(want, 9) for want in wants}) >= 5


def _names(task: Any) -> list[str]:
    from metaopt.functional.tree import Tree

    return list(Tree(task.init(seeded())).names)


@pytest.mark.usefixtures("traced")
@mode_or_all("recorded")
def test_frozen_and_learned_values_are_told_apart(mode: str) -> None:
    task, opt = Regression(), radam()
    hyper = Hyperparameters(opt, STARTS["radam"])
    for frozen in (None, "lr", "eps", None):
        hyper.requires_grad_(True)
        if frozen:
            hyper.get_parameter(frozen).requires_grad_(False)
        grads = []
        for estimator in (MODES[mode](STEPS), Unrolled(STEPS)):
            hyper.zero_grad()
            estimator.backward(task, opt, hyper, seeded())
            grads.append([p.grad for p in hyper.parameters()])
        assert [g is None for g in grads[0]] == [key == frozen for key, _ in hyper.named_parameters()]
        for got, want in zip(*grads, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)


@pytest.mark.usefixtures("traced")
@mode_or_all("segments")
def test_a_task_that_changes_is_seen(mode: str) -> None:
    """Its tensors are read anew in every unroll."""
    task, opt = Regression(), sgd()
    first, _ = gradient(MODES[mode](STEPS), task, opt, STARTS["sgd"])
    task.x = task.x.flip(1)
    loss, got = gradient(MODES[mode](STEPS), task, opt, STARTS["sgd"])
    want_loss, want = gradient(Unrolled(STEPS), task, opt, STARTS["sgd"])
    assert loss != first
    torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)


@pytest.mark.usefixtures("traced")
@mode_or_all("recorded")
def test_gradients_add_up_in_grad(mode: str) -> None:
    task, opt = Regression(), sgd()
    hyper = Hyperparameters(opt, STARTS["sgd"])
    parts = [gradient(Unrolled(STEPS), task, opt, STARTS["sgd"], seed)[1] for seed in (0, 1)]
    for p in hyper.parameters():
        p.grad = torch.full_like(p, 0.5)
    for seed in (0, 1):
        MODES[mode](STEPS).backward(task, opt, hyper, seeded(seed))
    got = torch.stack([p.grad for p in hyper.parameters() if p.grad is not None])
    torch.testing.assert_close(got, 0.5 + parts[0] + parts[1], rtol=1e-9, atol=0.0)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("why", "mode"), [*zip(IGNORED, itertools.cycle(MODES), strict=False)])
def test_a_learned_value_without_effect_is_named_before_any_grad_is_touched(why: str, mode: str) -> None:
    make, task, named = IGNORED[why]
    opt, hyper = make()
    for p in hyper.parameters():
        p.grad = torch.full_like(p, 0.25)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"does not depend on the learned {named}"):
            MODES[mode](3).backward(task, opt, hyper, seeded())
        assert all(bool((p.grad == 0.25).all()) for p in hyper.parameters())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("segments", [None, 2])
def test_a_value_that_only_a_truncation_cuts_off_is_named(segments: int | None) -> None:
    opt = rprop(lr=0.03)
    hyper = Raw({"lr": f64(0.03)})
    with pytest.raises(ValueError, match=r"does not depend on the learned 'lr'.*truncation"):
        Unrolled(9, "final", 5, segments, compile=True).backward(Regression(), opt, hyper, seeded())
    assert hyper.flat[0].grad is None


@pytest.mark.usefixtures("traced")
@mode_or_all("forward")
def test_a_loss_that_cannot_be_compiled_is_an_error_and_no_silent_fallback(mode: str) -> None:
    class Impure(Regression):
        def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
            torch._dynamo.graph_break()
            return super().loss(params, batch, hyper)

    hyper = Raw({"lr": f64(0.1)})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        MODES[mode](3).backward(Impure(), sgd(), hyper, seeded())
    assert hyper.flat[0].grad is None


# Without a compiler


@mode_or_all("segments")
@pytest.mark.parametrize("opt", [sgd(momentum=0.5), NORMALIZED], ids=["flat", "general"])
def test_without_a_compiler_it_warns_once_and_gives_the_right_numbers(mode: str, opt: Any) -> None:
    from torch._inductor import config

    task = Regression()
    results = []
    broken = config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})
    with broken, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for meta_step in range(3):
            hyper: nn.Module = Raw({"lr": f64(0.1)})
            MODES[mode](STEPS, "mean").backward(task, opt, hyper, seeded(meta_step))
            results.append(hyper.flat[0].grad.item())
    for meta_step, got in enumerate(results):
        want = Raw({"lr": f64(0.1)})
        Unrolled(STEPS, "mean").backward(task, opt, want, seeded(meta_step))
        assert got == pytest.approx(want.flat[0].grad.item(), rel=1e-9)
    messages = [str(warning.message) for warning in caught if warning.category is not DeprecationWarning]
    assert len([m for m in messages if "compile=True has no effect" in m]) == 1, messages
    assert len(messages) == 1, messages


@mode_or_all("segments")
def test_a_batch_may_hold_a_tensor_twice_at_some_steps_only(mode: str, traced: None) -> None:
    class Denoising(Regression):
        def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
            x, noisy = torch.randn(2, 6, 3, generator=generator, dtype=F64)
            return x, x if step % 2 else x + 0.1 * noisy

        def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
            return self.error(params, batch[0], batch[1].sum(1))

    hyper, want = Raw({"lr": f64(0.1)}), Raw({"lr": f64(0.1)})
    opt, task = sgd(), Denoising()
    MODES[mode](STEPS, "mean").backward(task, opt, hyper, seeded())
    Unrolled(STEPS, "mean").backward(task, opt, want, seeded())
    assert hyper.flat[0].grad.item() == pytest.approx(want.flat[0].grad.item(), rel=1e-9)


@pytest.mark.parametrize("segments", [None, 1])
def test_a_learning_rate_that_comes_after_every_windows_only_loss_is_named(segments: Any, traced: None) -> None:
    estimator = Unrolled(STEPS, "inner", 1, segments, compile=True)
    assert_refused(estimator, Regression(), sgd(), Raw({"lr": f64(0.1)}), "'lr'")


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    ("opt", "starts"),
    [(sgd(), {"lr": 0.05, "momentum": 0.5}), (NORMALIZED, NORMALIZED_STARTS)],
    ids=["flat", "general"],
)
def test_forward_mode_writes_over_nothing_of_the_tasks(
    opt: Any, starts: Mapping[str, Any], count: int, traced: None
) -> None:
    """The compiled step writes over the carry before it, but not over parameters that the task hands out again."""

    class Same(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.first = super().init(seeded())

        def init(self, generator: Generator | None) -> dict[str, Tensor]:
            return self.first

    task, learn = Same(), dict(itertools.islice(starts.items(), count))
    before = {name: p.clone() for name, p in task.first.items()}
    want = gradient(Unrolled(STEPS, "inner"), task, opt, learn)
    for _ in range(2):
        got = gradient(Forward(STEPS, "inner", compile=True), task, opt, learn)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)
        assert all(torch.equal(p, before[name]) for name, p in task.first.items())


class Remembering:
    """p <- p - lr g - .1 (p - the p before): the state is the old carry itself."""

    hyperparameters = ("lr",)
    defaults: ClassVar[dict[str, Any]] = {"lr": 0.05}

    def init(self, params: dict[str, Tensor], **hyper: Any) -> dict[str, Tensor]:
        return dict(params)

    def step(self, params: dict[str, Tensor], grads: dict[str, Tensor], state: Any, **hyper: Any) -> Any:
        return {name: p - hyper["lr"] * grads[name] - 0.1 * (p - state[name]) for name, p in params.items()}, params


@pytest.mark.parametrize("objective", ["final", "inner"])
def test_forward_mode_of_a_state_that_is_the_carry_before(objective: Any, traced: None) -> None:
    task, opt, learn = Regression(), Remembering(), {"lr": (0.05, constraints.positive)}
    want = gradient(Unrolled(STEPS, objective), task, opt, learn)
    got = gradient(Forward(STEPS, objective, compile=True), task, opt, learn)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)


def test_forward_mode_of_a_loss_that_is_a_parameter(traced: None) -> None:
    class Linear(Regression):
        def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
            return params["out.weight"][0]

    want = gradient(Unrolled(STEPS, "inner"), Linear(), sgd(), {"lr": 0.05})
    got = gradient(Forward(STEPS, "inner", compile=True), Linear(), sgd(), {"lr": 0.05})
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)


def test_tasks_of_uncompiled_unrolls_are_not_kept() -> None:
    tasks = [Regression() for _ in range(3)]
    gone = [weakref.ref(task) for task in tasks]
    for task in tasks:
        gradient(Unrolled(STEPS), task, sgd(), {"lr": 0.05})
    del task, tasks
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
