"""Every way to differentiate an unroll gives the hypergradient of the same unroll written as a plain loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints
from torch.utils import _pytree as pytree

from metaopt import Hyperparameters, PerParameter, Schedule
from metaopt.functional import REGISTRY, adam, radam, rprop, sgd
from metaopt.metagrad import Estimator, Forward, Unrolled
from metaopt.tasks import Replicas
from metaopt.unroll.flat import FlatProgram
from metaopt.unroll.general import GeneralProgram
from metaopt.unroll.make import make_program
from tests.metagrad.reference import STARTS, Regression, finite_difference, learn_all, seeded

F64 = torch.float64
STEPS = 12  # RAdam rectifies from the sixth on
COUNT = 3
TASK = Regression()
NAMES = ("in.weight", "in.bias", "out.weight")
OBJECTIVES = ("final", "mean", "inner")


# The plain loop


def by_hand(
    opt: Any,
    task: Any,
    values: Mapping[str, Any],
    steps: int,
    objective: str,
    truncation: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """The meta-loss with its graph: the task's own tree, `autograd.grad`, and ``opt.step`` for each run in turn."""
    single, count = (task.task, task.count) if isinstance(task, Replicas) else (task, 1)
    everything = {**opt.defaults, **values}
    mine = {name: everything[name] for name in opt.hyperparameters}
    runs = [{name: p.requires_grad_() for name, p in single.init(generator).items()} for _ in range(count)]
    states = [opt.init(params, **_at(mine, 0)) for params in runs]
    terms: list[Tensor] = []
    for step in range(steps):
        if truncation and step and step % truncation == 0:
            cut = lambda x: x.detach().requires_grad_(x.is_floating_point() or x.is_complex())  # noqa: E731
            runs, states = pytree.tree_map(cut, (runs, states))
        for run, (params, state) in enumerate(zip(runs, states, strict=True)):
            loss = single.loss(params, single.batch(step, generator), everything)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            new, states[run] = opt.step(params, dict(zip(params, grads, strict=True)), state, **_at(mine, step))
            runs[run] = new
            if objective == "inner":
                terms.append(loss / steps)
            if objective == "mean":
                terms.append(single.meta_loss(new, everything) / steps)
    if objective == "final":
        terms = [single.meta_loss(params, everything) for params in runs]
    return torch.stack(terms).sum() / count


def _at(value: Any, step: int) -> Any:
    """Schedules by their number of the step: neither the optimizer's look-up nor the unroll's."""
    if isinstance(value, dict):
        return {key: _at(item, step) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_at(item, step) for item in value)
    return value.values[min(step, len(value.values) - 1)] if isinstance(value, Schedule) else value


# What is learned, and on what


class Raw(nn.Module):
    """Values that are parameters as they are, in the order and the dtypes that they come in."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        flat, self._spec = pytree.tree_flatten(dict(values))
        self.flat = nn.ParameterList([nn.Parameter(torch.as_tensor(leaf)) for leaf in flat])

    def forward(self) -> dict[str, Any]:
        values: dict[str, Any] = pytree.tree_unflatten(list(self.flat), self._spec)
        return values


def f64(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=F64)


class Dead(Regression):
    """The third input is 0 in training and not in validation: three gradients are always exactly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.x[:20, 2] = 0.0


class Weighted(Regression):
    """Every example has a weight in the inner loss."""

    def batch(self, step: int, generator: Generator | None) -> Tensor:  # type: ignore[override]
        return torch.randint(20, (6,), generator=generator)

    def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
        hidden = torch.tanh(self.x[batch] @ params["in.weight"].T + params["in.bias"])
        return (hyper["weights"][batch] * (hidden @ params["out.weight"] - self.y[batch]).square()).mean()


class Phases(Regression):
    """Its hidden layer is turned in the complex plane: parameters of two dtypes."""

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        params = super().init(generator)
        params["out.weight"] = torch.complex(params["out.weight"], params["in.bias"].flip(0))
        return params

    @staticmethod
    def error(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(x @ params["in.weight"].T + params["in.bias"])
        out = hidden.to(torch.complex128) @ params["out.weight"]
        return (out.real + 0.3 * out.imag * out.real - y).square().mean()

    @staticmethod
    def norm(params: Mapping[str, Tensor]) -> Tensor:
        return sum((p.abs().square().sum() for p in params.values()), torch.zeros((), dtype=F64))


class Halves(Regression):
    """Its last layer is in single precision."""

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        params = super().init(generator)
        return {**params, "out.weight": params["out.weight"].float()}

    @staticmethod
    def error(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return Regression.error({**params, "out.weight": params["out.weight"].double()}, x, y)


class Shifted(Regression):
    """One of its parameters is a single number, without a dimension."""

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {**super().init(generator), "shift": torch.randn((), generator=generator, dtype=F64)}

    @staticmethod
    def error(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return Regression.error(params, x, y - params["shift"])


class NormalizedDescent:
    """p <- p - lr g / (norm of g, averaged with a decay, of the whole tensor): not elementwise."""

    hyperparameters = ("lr", "decay")
    defaults: Mapping[str, Any] = {"lr": 0.1, "decay": 0.5}

    def init(self, params: dict[str, Tensor], **hyper: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros((), dtype=torch.int64), {name: p.norm() for name, p in params.items()}

    def step(self, params: dict[str, Tensor], grads: dict[str, Tensor], state: Any, **hyper: Any) -> Any:
        decay = hyper["decay"]
        norm = {name: decay * state[1][name] + (1 - decay) * g.norm() for name, g in grads.items()}
        new = {name: p - hyper["lr"] * grads[name] / norm[name] for name, p in params.items()}
        return new, (state[0] + 1, norm)


class Case(NamedTuple):
    make: Callable[[], tuple[Any, nn.Module]]
    task: Any = TASK
    program: type = FlatProgram
    flat: tuple[str, ...] = ()  # parameters of which the gradient is 0
    objectives: tuple[str, ...] = OBJECTIVES
    accuracy: float = 1e-9


def learn(opt: Any, **starts: Any) -> Callable[[], tuple[Any, nn.Module]]:
    return lambda: (opt, Hyperparameters(opt, starts))


def raw(opt: Any, **starts: Any) -> Callable[[], tuple[Any, nn.Module]]:
    return lambda: (opt, Raw(starts))


NESTEROV = sgd(momentum=0.8, nesterov=True)
DECOUPLED = radam(decoupled_weight_decay=True)
NORMALIZED = NormalizedDescent()
PENALTY = {"penalty": (0.02, constraints.positive)}
OUTER = {"outer": (0.03, constraints.positive)}
RISING = torch.linspace(0.7, 0.9, STEPS, dtype=F64)
NORMALIZED_STARTS = {"lr": (0.1, constraints.positive), "decay": (0.5, constraints.unit_interval)}
PER_ELEMENT = {
    "in.weight": torch.linspace(0.02, 0.08, 12, dtype=F64).reshape(4, 3),
    "in.bias": f64([[0.03], [0.05]])[0],
    "out.weight": f64([0.02, 0.04, 0.06, 0.08]),
}

CASES: dict[str, Case] = {
    **{name: Case(lambda name=name: learn_all(name)) for name in REGISTRY},
    "radam, decoupled": Case(learn(DECOUPLED, **STARTS["radam"])),
    "sgd, nesterov": Case(learn(NESTEROV, lr=0.05, momentum=0.8, weight_decay=0.05)),
    "sgd, in another order than the optimizer's": Case(
        raw(sgd(), weight_decay=f64(0.05), momentum=f64(0.8), lr=f64(0.1))
    ),
    "radam, in another order than the optimizer's": Case(
        learn(radam(), eps=0.01, weight_decay=0.05, betas=(0.8, 0.97), lr=0.05)
    ),
    "a value of the task's before the optimizer's": Case(raw(sgd(), penalty=f64(0.02), lr=f64(0.1))),
    "radam, some numbers": Case(learn(radam(lr=0.05, betas=(0.8, 0.97), eps=0.01), betas=(0.8, 0.97))),
    "schedules, radam": Case(
        learn(
            radam(eps=0.01),
            lr=Schedule(STEPS, RISING / 10),
            betas=(Schedule(STEPS, RISING), Schedule(STEPS, 0.97)),
            weight_decay=Schedule(3, 0.05),
        )
    ),
    "schedules, rprop": Case(
        learn(
            rprop(lr=0.03), etas=(Schedule(STEPS, 0.5), 1.3), step_sizes=(Schedule(STEPS, 0.018), Schedule(STEPS, 0.08))
        )
    ),
    "per parameter, radam": Case(
        learn(radam(eps=0.01), lr=PerParameter(NAMES, 0.05), betas=(0.8, PerParameter(NAMES, 0.97)))
    ),
    "per parameter, rprop": Case(learn(rprop(), lr=PerParameter(NAMES, 0.03), etas=(PerParameter(NAMES, 0.5), 1.3))),
    "per parameter and step, sgd": Case(
        learn(sgd(), lr=PerParameter(NAMES, Schedule(STEPS, 0.1)), momentum=Schedule(STEPS, 0.8))
    ),
    "per parameter and step, adam": Case(
        learn(adam(eps=0.01), betas=(0.8, PerParameter(NAMES, Schedule(STEPS, 0.97))), lr=0.05)
    ),
    "per element, radam": Case(
        raw(radam(betas=(0.8, 0.97), eps=0.01), lr=PER_ELEMENT, betas=(f64(0.8), f64(0.97))), program=GeneralProgram
    ),
    "per element, rprop": Case(raw(rprop(), lr=PER_ELEMENT, etas=(f64(0.5), f64(1.3))), program=GeneralProgram),
    "per element and step, sgd": Case(
        raw(sgd(), lr=PER_ELEMENT, momentum=Schedule.of(0.9 * RISING)), program=GeneralProgram
    ),
    "a penalty, radam": Case(lambda: learn_all("radam", **PENALTY)),
    "a penalty of the meta-loss, rprop": Case(lambda: learn_all("rprop", **OUTER), objectives=("final", "mean")),
    "a penalty of the inner objective, rprop": Case(lambda: learn_all("rprop", **PENALTY), objectives=("inner",)),
    "a penalty, not elementwise": Case(learn(NORMALIZED, **NORMALIZED_STARTS, **PENALTY), program=GeneralProgram),
    "example weights, sgd": Case(raw(sgd(), lr=f64(0.1), weights=torch.linspace(0.5, 1.5, 20, dtype=F64)), Weighted()),
    "dead coordinates, radam": Case(learn(radam(), lr=0.05, betas=(0.8, 0.97), eps=1e-8), Dead()),
    "dead coordinates, adam": Case(learn(adam(), lr=0.05, betas=(0.8, 0.97), eps=1e-8), Dead()),
    "dead coordinates, decaying": Case(lambda: learn_all("radam"), Dead()),
    "dead coordinates, rprop": Case(lambda: learn_all("rprop"), Dead()),
    "complex, radam": Case(lambda: learn_all("radam"), Phases(), program=GeneralProgram),
    "complex, rprop": Case(lambda: learn_all("rprop"), Phases(), program=GeneralProgram),
    "a number among the parameters, radam": Case(lambda: learn_all("radam"), Shifted()),
    "replicas, a number among the parameters": Case(lambda: learn_all("radam"), Replicas(Shifted(), COUNT)),
    "two precisions, adam": Case(lambda: learn_all("adam"), Halves(), program=GeneralProgram, accuracy=1e-4),
    "not elementwise": Case(learn(NORMALIZED, **NORMALIZED_STARTS), program=GeneralProgram),
    "not elementwise, per step": Case(
        learn(NORMALIZED, lr=(Schedule(STEPS, 0.1), constraints.positive)), program=GeneralProgram
    ),
    "replicas, radam": Case(lambda: learn_all("radam", **PENALTY), Replicas(TASK, COUNT)),
    "replicas, rprop": Case(lambda: learn_all("rprop"), Replicas(TASK, COUNT)),
    "replicas, per parameter": Case(
        learn(sgd(), lr=PerParameter(NAMES, Schedule(STEPS, 0.1)), momentum=0.8), Replicas(TASK, COUNT)
    ),
    "replicas, not elementwise": Case(
        learn(NORMALIZED, **NORMALIZED_STARTS), Replicas(TASK, COUNT), program=GeneralProgram
    ),
}

MODES: dict[str, Callable[..., Estimator]] = {
    "recorded": Unrolled,
    "segments of 1": lambda steps, objective: Unrolled(steps, objective, segments=1),
    "segments of 4": lambda steps, objective: Unrolled(steps, objective, segments=4),
    "segments of 5, not a divisor": lambda steps, objective: Unrolled(steps, objective, segments=5),
    "segments of a root": lambda steps, objective: Unrolled(steps, objective, segments="sqrt"),
    "a segment longer than the horizon": lambda steps, objective: Unrolled(steps, objective, segments=50),
    "forward": Forward,
}
MOST = ("recorded", "segments of 5, not a divisor", "segments of a root", "forward")


class Result(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]


@cache
def expected(case: str, objective: str, steps: int, truncation: int | None = None) -> Result:
    opt, hyper = CASES[case].make()
    loss = by_hand(opt, CASES[case].task, hyper(), steps, objective, truncation, seeded())
    slopes = torch.autograd.grad(loss, list(hyper.parameters()))
    return Result(loss.detach(), dict(zip(dict(hyper.named_parameters()), slopes, strict=True)))


def measured(estimator: Estimator, case: str) -> Result:
    opt, hyper = CASES[case].make()
    loss = estimator.backward(CASES[case].task, opt, hyper, seeded())
    assert loss.shape == ()
    assert not loss.requires_grad
    grads = {key: p.grad for key, p in hyper.named_parameters()}
    for key, p in hyper.named_parameters():
        assert p.grad is not None, key
        assert p.grad.dtype == p.dtype
    return Result(loss, grads)  # type: ignore[arg-type]


def assert_close(got: Result, want: Result, accuracy: float = 1e-9) -> None:
    torch.testing.assert_close(
        got.loss, want.loss, rtol=min(accuracy, 1e-12) if accuracy < 1e-6 else accuracy, atol=0.0
    )
    assert got.grads.keys() == want.grads.keys()
    for key, slope in want.grads.items():
        atol = accuracy * slope.abs().max().item() + 1e-16  # where it is 0 but for rounding
        torch.testing.assert_close(got.grads[key], slope, rtol=0.0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


EACH = [(case, objective) for case in CASES for objective in CASES[case].objectives]


def a_third(*options: Sequence[Any]) -> list[Any]:
    """All combinations, of which two in three are for the long profile: each option is among those that are not."""
    combinations = itertools.product(*(enumerate(values) for values in options))
    return [
        pytest.param(*(value for _, value in chosen), marks=[pytest.mark.long] * bool(sum(i for i, _ in chosen) % 3))
        for chosen in combinations
    ]


@pytest.mark.parametrize(("each", "mode"), a_third(EACH, MOST), ids=str)
def test_every_mode_gives_the_hypergradient_of_the_loop_by_hand(each: tuple[str, str], mode: str) -> None:
    case, objective = each
    assert_close(measured(MODES[mode](STEPS, objective), case), expected(case, objective, STEPS), CASES[case].accuracy)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in MOST])
@pytest.mark.parametrize("case", ["radam", "rprop", "schedules, rprop", "not elementwise", "replicas, radam"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_length_of_segments_gives_the_hypergradient_of_the_loop_by_hand(
    case: str, objective: str, mode: str
) -> None:
    assert_close(measured(MODES[mode](STEPS, objective), case), expected(case, objective, STEPS))


@pytest.mark.parametrize(("case", "objective"), EACH)
def test_every_learned_value_matters_in_the_comparison(case: str, objective: str) -> None:
    """Or the test above would compare 0 with 0."""
    for key, slope in expected(case, objective, STEPS).grads.items():
        assert slope.isfinite().all(), key
        assert slope.abs().max() > 0, key


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_is_about_the_program_that_it_is_meant_for(case: str) -> None:
    opt, hyper = CASES[case].make()
    assert (
        type(make_program(CASES[case].task, opt, CASES[case].task.init(seeded()), hyper(), STEPS))
        is CASES[case].program
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["radam", "rprop", "sgd"])
def test_the_hypergradient_of_every_mode_is_that_of_finite_differences(case: str, mode: str) -> None:
    opt, hyper = CASES[case].make()
    estimator = MODES[mode](STEPS, "mean")
    estimator.backward(TASK, opt, hyper, seeded())
    for p in hyper.parameters():
        assert p.grad is not None
        grad = p.grad.item()
        difference = finite_difference(lambda: by_hand(opt, TASK, hyper(), STEPS, "mean", None, seeded()).item(), p)
        assert grad == pytest.approx(difference, rel=1e-8, abs=3e-12)


def test_rprops_step_sizes_lie_at_both_bounds_and_between_them_in_the_comparison() -> None:
    opt, hyper = learn_all("rprop")
    generator = seeded()
    params = TASK.init(generator)
    values = dict(hyper())
    state = opt.init(params, **values)
    every: list[Tensor] = []
    for t in range(STEPS - 1):  # the last one has an effect on the parameters alone
        grads = torch.func.grad(TASK.loss)(params, TASK.batch(t, generator), values)
        params, state = opt.step(params, grads, state, **values)
        every.extend(size.flatten() for size in state.step_size.values())
    sizes = torch.cat(every).detach()
    smallest, largest = (bound.item() for bound in values["step_sizes"])
    assert (sizes == smallest).any()
    assert (sizes == largest).any()
    assert ((sizes > smallest) & (sizes < largest)).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 5, 6])
def test_radam_on_either_side_of_its_first_rectified_step(steps: int, objective: str, mode: str) -> None:
    """With five steps, beta2 and eps have a derivative of exactly 0; with six they have another one."""
    if steps == 1 and objective == "inner":
        pytest.skip("the only loss comes before the only step")
    want = expected("radam", objective, steps)
    unused = objective == "inner" and steps == 6  # its last loss comes before the sixth step
    assert (want.grads["eps"] == 0) == (want.grads["betas[1]"] == 0) == (steps < 6 or unused)
    assert_close(measured(MODES[mode](steps, objective), "radam"), want)


@pytest.mark.parametrize(
    ("case", "objective", "truncation", "segments"),
    a_third(
        ["radam", "rprop", "per parameter and step, sgd", "replicas, radam", "not elementwise"],
        OBJECTIVES,
        [3, 5, STEPS],
        [1, 2, 4, "sqrt", 50],
    ),
)
def test_segments_within_truncated_windows_give_the_truncated_hypergradient(
    case: str, objective: Any, truncation: int, segments: Any
) -> None:
    estimator = Unrolled(STEPS, objective, truncation, segments)
    if case == "rprop" and objective == "final" and truncation < STEPS:
        with pytest.raises(ValueError, match=r"'lr'.*truncation"):
            estimator.backward(TASK, *CASES[case].make(), seeded())
        return
    want = truncated_by_hand(case, objective, truncation)
    assert_close(measured(estimator, case), want)


@cache
def truncated_by_hand(case: str, objective: str, truncation: int) -> Result:
    opt, hyper = CASES[case].make()
    loss = by_hand(opt, CASES[case].task, hyper(), STEPS, objective, truncation, seeded())
    named = dict(hyper.named_parameters())
    slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return Result(loss.detach(), dict(zip(named, slopes, strict=True)))


@pytest.mark.parametrize("mode", MODES)
def test_a_callable_that_is_no_schedule_and_is_not_learned_is_asked_for_each_step(mode: str) -> None:
    opt = sgd(lr=lambda step: 0.1 / (1 + step), momentum=0.5)
    hyper = Hyperparameters(opt, {"momentum": 0.8})
    MODES[mode](STEPS, "final").backward(TASK, opt, hyper, seeded())
    reference = sgd(lr=Schedule(STEPS, [0.1 / (1 + step) for step in range(STEPS)]))
    want = Hyperparameters(reference, {"momentum": 0.8})
    by_hand(reference, TASK, want(), STEPS, "final", None, seeded()).backward()
    assert hyper.momentum.grad.item() == pytest.approx(want.momentum.grad.item(), rel=1e-9)


class Single(Regression):
    """Everything in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = self.x.float(), self.y.float()

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {name: p.float() for name, p in super().init(generator).items()}

    @staticmethod
    def norm(params: Mapping[str, Tensor]) -> Tensor:
        return sum((p.square().sum() for p in params.values()), torch.zeros(()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ["radam", "rprop", "sgd"])
def test_parameters_and_values_in_single_precision_give_the_gradient_to_single_precision(
    name: str, dtype: torch.dtype, mode: str
) -> None:
    """.grad has the dtype of the module's parameter, which may be single as well."""
    starts = pytree.tree_map(lambda x: torch.tensor(x, dtype=dtype), STARTS[name])
    opt, hyper = REGISTRY[name](), Raw({**starts})
    MODES[mode](STEPS, "mean").backward(Single(), opt, hyper, seeded())
    exact = Raw(pytree.tree_map(lambda x: torch.tensor(x, dtype=F64), STARTS[name]))
    by_hand(opt, TASK, exact(), STEPS, "mean", None, seeded()).backward()
    for p, q in zip(hyper.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.dtype == dtype
        assert p.grad.item() == pytest.approx(q.grad.item(), rel=3e-4)


# Like loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_two_calls_add_up_to_what_was_there(mode: str) -> None:
    estimator = MODES[mode](STEPS, "mean")
    separate = []
    for seed in (0, 1):
        opt, hyper = learn_all("radam")
        estimator.backward(TASK, opt, hyper, seeded(seed))
        separate.append([p.grad.item() for p in hyper.parameters() if p.grad is not None])
    assert separate[0] != separate[1]
    opt, hyper = learn_all("radam")
    for p in hyper.parameters():
        p.grad = torch.full_like(p, 0.5)
    for seed in (0, 1):
        estimator.backward(TASK, opt, hyper, seeded(seed))
    for p, a, b in zip(hyper.parameters(), *separate, strict=True):
        assert p.grad.item() == pytest.approx(0.5 + a + b, rel=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_the_surrounding_grad_mode_makes_no_difference_and_stays(mode: str) -> None:
    grads = []
    for enabled in (True, False):
        opt, hyper = learn_all("radam")
        with torch.set_grad_enabled(enabled):
            MODES[mode](STEPS, "mean").backward(TASK, opt, hyper, seeded())
            assert torch.is_grad_enabled() == enabled
        grads.append([p.grad.item() for p in hyper.parameters() if p.grad is not None])
    assert len(grads[0]) == 5
    assert grads[0] == grads[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_value_under_two_names_gets_both_gradients(mode: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(f64(0.05))

        def forward(self) -> dict[str, Any]:
            return {"penalty": self.both, "lr": self.both, "momentum": 0.5}

    opt, hyper, want = sgd(), Tied(), Tied()
    MODES[mode](STEPS, "final").backward(TASK, opt, hyper, seeded())
    by_hand(opt, TASK, want(), STEPS, "final", None, seeded()).backward()
    assert hyper.both.grad.item() == pytest.approx(want.both.grad.item(), rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_parameter_gets_no_gradient_and_changes_none_of_the_others(mode: str) -> None:
    opt, hyper = learn_all("radam")
    hyper.lr.requires_grad_(False)
    MODES[mode](STEPS, "final").backward(TASK, opt, hyper, seeded())
    assert hyper.lr.grad is None
    for key, slope in expected("radam", "final", STEPS).grads.items():
        if key != "lr":
            assert hyper.get_parameter(key).grad.item() == pytest.approx(slope.item(), rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizers_own_tensor_that_requires_grad_is_no_learned_value(mode: str) -> None:
    """Autograd may reach it elsewhere; ``hyper`` does not hold it."""
    own = f64(0.05).requires_grad_()
    opt = sgd(lr=own)
    hyper = Hyperparameters(opt, {"momentum": 0.8})
    MODES[mode](STEPS, "final").backward(TASK, opt, hyper, seeded())
    want = Hyperparameters(opt, {"momentum": 0.8})
    (slope,) = torch.autograd.grad(by_hand(opt, TASK, want(), STEPS, "final", None, seeded()), want.momentum)
    assert hyper.momentum.grad.item() == pytest.approx(slope.item(), rel=1e-9)
    assert own.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_values_of_integers_and_flags_are_handed_to_the_task(mode: str) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lr = nn.Parameter(f64(0.1))

        def forward(self) -> dict[str, Any]:
            return {"lr": self.lr, "rows": torch.arange(4), "on": torch.tensor(True), "name": "x"}

    class Reads(Regression):
        def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
            return self.error(params, batch[0][hyper["rows"]], batch[1][hyper["rows"]]) * hyper["on"]

    opt, hyper, want = sgd(), Rows(), Rows()
    MODES[mode](STEPS, "final").backward(Reads(), opt, hyper, seeded())
    by_hand(opt, Reads(), want(), STEPS, "final", None, seeded()).backward()
    assert hyper.lr.grad.item() == pytest.approx(want.lr.grad.item(), rel=1e-9)


class FromTheThirdOn(Regression):
    """The first batches say that there is no penalty yet."""

    def batch(self, step: int, generator: Generator | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        batch = super().batch(step, generator)
        return batch if step < 3 else (*batch, f64(1.5))

    def loss(self, params: Mapping[str, Tensor], batch: Any, hyper: Mapping[str, Any]) -> Tensor:
        late = batch[2] * hyper["penalty"] * self.norm(params) if len(batch) == 3 else 0.0
        return self.error(params, *batch[:2]) + late


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_value_that_only_a_late_step_reads_is_learned(objective: str, mode: str) -> None:
    opt, task, want = sgd(), FromTheThirdOn(), Raw({"lr": f64(0.1), "penalty": f64(0.02)})
    hyper = Raw({"lr": f64(0.1), "penalty": f64(0.02)})
    MODES[mode](STEPS, objective).backward(task, opt, hyper, seeded())
    by_hand(opt, task, want(), STEPS, objective, None, seeded()).backward()
    for p, q in zip(hyper.parameters(), want.parameters(), strict=True):
        assert p.grad.item() == pytest.approx(q.grad.item(), rel=1e-9)


class Counting(NormalizedDescent):
    """Its state holds the number of the step, in Python's terms."""

    def init(self, params: dict[str, Tensor], **hyper: Any) -> Any:
        return 0, super().init(params, **hyper)[1]


class Lazy(NormalizedDescent):
    """Its state is made by the first step."""

    def init(self, params: dict[str, Tensor], **hyper: Any) -> Any:
        return torch.zeros(()), {}

    def step(self, params: dict[str, Tensor], grads: dict[str, Tensor], state: Any, **hyper: Any) -> Any:
        norms = state[1] or {name: p.norm() for name, p in params.items()}
        return super().step(params, grads, (state[0], norms), **hyper)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Counting, Lazy])
def test_a_state_that_changes_in_more_than_its_tensors_is_refused(kind: type[NormalizedDescent], mode: str) -> None:
    """Or the count would stand still, and the gradient be that of another unroll."""
    with pytest.raises(TypeError, match=f"the state of {kind.__name__} cannot be unrolled"):
        MODES[mode](STEPS, "final").backward(TASK, kind(), Raw({"lr": f64(0.1)}), seeded())


# What does not matter is an error, in every mode


IGNORED: dict[str, tuple[Callable[[], tuple[Any, nn.Module]], Any, str]] = {
    "ignored by the task": (raw(sgd(), lr=f64(0.1), ignored=f64(0.2)), TASK, "'ignored'"),
    "ignored by the task, not elementwise": (raw(NORMALIZED, lr=f64(0.1), ignored=f64(0.2)), TASK, "'ignored'"),
    "lost in a sign": (raw(rprop(lr=0.03), etas=(f64(0.5), f64(1.2)), penalty=f64(0.2)), TASK, "'penalty'"),
    "no momentum": (raw(sgd(), dampening=f64(0.2), lr=f64(0.1)), TASK, "'dampening'"),
    "no such parameter": (learn(sgd(), lr=PerParameter((*NAMES, "in.typo"), 0.1)), TASK, r"'lr\.in\.typo'"),
    "all of them": (raw(sgd(), ignored=f64(0.2)), TASK, "'ignored'"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad", [None, 0.25])
@pytest.mark.parametrize("why", IGNORED)
def test_a_learned_value_without_effect_is_named_before_any_grad_is_touched(
    why: str, grad: float | None, mode: str
) -> None:
    make, task, named = IGNORED[why]
    opt, hyper = make()
    assert_refused(MODES[mode](STEPS, "final"), task, opt, hyper, named, grad)


def assert_refused(
    estimator: Estimator, task: Any, opt: Any, hyper: nn.Module, named: str, grad: float | None = 0.25
) -> None:
    for p in hyper.parameters():
        p.grad = None if grad is None else torch.full_like(p, grad)
    for _ in range(2):  # what is remembered says the same
        with pytest.raises(ValueError, match=f"does not depend on the learned {named}"):
            estimator.backward(task, opt, hyper, seeded())
        for p in hyper.parameters():
            assert p.grad is None if grad is None else bool((p.grad == grad).all())


@pytest.mark.parametrize("mode", MODES)
def test_a_learning_rate_that_comes_after_the_only_loss_is_named(mode: str) -> None:
    hyper = Raw({"lr": f64(0.1)})
    opt = sgd()
    MODES[mode](2, "inner").backward(TASK, opt, hyper, seeded())  # with two steps it matters
    assert_refused(MODES[mode](1, "inner"), TASK, opt, Raw({"lr": f64(0.1)}), "'lr'")


@pytest.mark.parametrize("segments", [None, 1, "sqrt"])
def test_a_learning_rate_that_comes_after_every_windows_only_loss_is_named(segments: Any) -> None:
    assert_refused(Unrolled(STEPS, "inner", 1, segments), TASK, sgd(), Raw({"lr": f64(0.1)}), "'lr'")


@pytest.mark.parametrize("mode", MODES)
def test_a_meta_loss_without_any_derivative_names_what_was_to_be_learned(mode: str) -> None:
    class Accuracy(Regression):
        def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
            return (super().meta_loss(params, hyper) > 0.5).double()

    assert_refused(MODES[mode](STEPS, "final"), Accuracy(), sgd(), Raw({"lr": f64(0.1)}), "'lr'")


@pytest.mark.parametrize("mode", MODES)
def test_a_meta_loss_of_something_else_names_what_was_to_be_learned(mode: str) -> None:
    class Elsewhere(Regression):
        def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
            return f64(2.0).requires_grad_() ** 2

    assert_refused(MODES[mode](STEPS, "final"), Elsewhere(), sgd(), Raw({"lr": f64(0.1)}), "'lr'")


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_is_in_no_value_is_named(mode: str) -> None:
    class Unread(Raw):
        def __init__(self) -> None:
            super().__init__({"lr": f64(0.1)})
            self.forgotten = nn.Parameter(f64(0.1))

    assert_refused(MODES[mode](STEPS, "final"), TASK, sgd(), Unread(), "'forgotten'")


# Arguments


@pytest.mark.parametrize("segments", [0, -1, "log", 2.5])
def test_segments_that_are_no_length_are_refused(segments: Any) -> None:
    with pytest.raises(ValueError, match=f"segments must be None, 'sqrt' or a length >= 1, got segments={segments!r}"):
        Unrolled(STEPS, segments=segments)


@pytest.mark.parametrize("truncation", [0, -1, STEPS + 1])
def test_a_truncation_outside_the_horizon_is_refused_with_segments_too(truncation: int) -> None:
    with pytest.raises(ValueError, match=rf"truncation must be in 1\.\.steps \({STEPS}\), got truncation={truncation}"):
        Unrolled(STEPS, truncation=truncation, segments="sqrt")
