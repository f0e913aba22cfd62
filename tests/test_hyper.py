"""`Hyperparameters`: values in their domains, from the right starts, with the right derivatives."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from metaopt import Hyperparameters, PerParameter, Schedule
from metaopt.functional import REGISTRY, radam, rprop, sgd

F64 = torch.float64
INF = math.inf

# Where each hyperparameter may be learned, (lower, upper) exclusive; step_sizes[1] has step_sizes[0] for its lower end.
ENDS = {
    "lr": (0.0, INF),
    "betas[0]": (0.0, 1.0),
    "betas[1]": (0.0, 1.0),
    "eps": (0.0, INF),
    "weight_decay": (0.0, INF),
    "momentum": (0.0, 1.0),
    "dampening": (-INF, INF),
    "etas[0]": (0.0, 1.0),
    "etas[1]": (1.0, INF),
    "step_sizes[0]": (0.0, INF),
    "step_sizes[1]": (None, INF),
}
STARTS = {
    "lr": 0.0123,
    "betas": (0.85, 0.997),
    "eps": 3e-7,
    "weight_decay": 0.02,
    "momentum": 0.7,
    "dampening": -0.3,
    "etas": (0.4, 1.3),
    "step_sizes": (2e-5, 3.0),
}
TORCH = {
    "radam": torch.optim.RAdam,
    "rprop": torch.optim.Rprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
each_optimizer = pytest.mark.parametrize("name", REGISTRY)


def ends(name: str, key: str, values: dict[str, float]) -> tuple[float, float]:
    if (name, key) == ("radam", "betas[1]"):
        return 2 / 3, 1.0
    lower, upper = ENDS[key]
    return (values["step_sizes[0]"] if lower is None else lower), upper


def learn_all(name: str) -> Hyperparameters:
    opt = REGISTRY[name]()
    return Hyperparameters(opt, {key: STARTS[key] for key in opt.hyperparameters})


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Pairs laid flat, under the names of the module's parameters."""
    flat = {}
    for name, value in values.items():
        flat.update({f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value})
    return flat


def randomize(hyper: nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in hyper.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=F64))


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if b else abs(a)


# Domains


@each_optimizer
@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0, 200.0])
def test_whatever_its_parameters_a_value_lies_strictly_in_its_domain(name: str, scale: float) -> None:
    hyper = learn_all(name)
    for seed in range(25):
        randomize(hyper, scale, seed)
        numbers = hyper.numbers()
        flat = flatten(numbers)
        for key, value in flat.items():
            lower, upper = ends(name, key, flat)
            assert lower < value < upper, (key, value)
        REGISTRY[name](**numbers)  # and the optimizer accepts it


@each_optimizer
@pytest.mark.parametrize("end", [-60.0, 60.0])
def test_a_value_that_rounds_to_the_end_of_its_domain_stays_inside(name: str, end: float) -> None:
    hyper = learn_all(name)
    with torch.no_grad():
        for p in hyper.parameters():
            p.fill_(end)
    flat = flatten(hyper.numbers())
    for key, value in flat.items():
        lower, upper = ends(name, key, flat)
        assert lower < value < upper, (key, value)


def test_the_derivative_does_not_jump_where_a_value_rounds_to_the_end_of_its_domain() -> None:
    hyper = learn_all("rprop")
    with torch.no_grad():
        hyper.get_parameter("etas[1]").fill_(-40.0)
    (slope,) = torch.autograd.grad(hyper()["etas"][1], hyper.get_parameter("etas[1]"))
    assert hyper.numbers()["etas"][1] == 1.0 + 2.0**-52
    assert relative(slope.item(), math.exp(-40.0)) < 1e-14


# Starts


@each_optimizer
def test_learning_by_name_starts_at_the_optimizers_defaults(name: str) -> None:
    opt = REGISTRY[name]()
    at_zero = {key for key in ("weight_decay", "momentum") if opt.defaults.get(key) == 0}
    hyper = Hyperparameters(opt, [key for key in opt.hyperparameters if key not in at_zero])
    values, defaults = flatten(hyper.numbers()), flatten(dict(opt.defaults))
    assert set(values) == set(defaults) - at_zero
    for key, value in values.items():
        assert relative(value, defaults[key]) < 1e-12, key


@each_optimizer
def test_learning_from_a_mapping_starts_there(name: str) -> None:
    values = flatten(learn_all(name).numbers())
    for key, start in flatten({key: STARTS[key] for key in REGISTRY[name]().hyperparameters}).items():
        assert relative(values[key], start) < 1e-12, key


def test_learning_by_name_starts_at_what_the_optimizer_was_made_with() -> None:
    opt = radam(lr=torch.tensor(0.3), betas=[0.5, 0.8], weight_decay=Schedule(2, [0.1, 0.2]))
    numbers = Hyperparameters(opt, ("lr", "betas", "weight_decay")).numbers()
    assert relative(numbers["lr"], torch.tensor(0.3).item()) < 1e-12
    assert numbers["betas"] == pytest.approx((0.5, 0.8), rel=1e-12)
    assert numbers["weight_decay"] == pytest.approx([0.1, 0.2], rel=1e-12)


def test_one_name_may_stand_alone_and_names_may_come_from_any_iterable() -> None:
    opt = radam()
    assert list(Hyperparameters(opt, "lr")()) == ["lr"]
    assert list(Hyperparameters(opt, (name for name in ("eps", "lr")))()) == ["eps", "lr"]


def test_the_smallest_and_largest_sensible_starts_are_kept() -> None:
    hyper = Hyperparameters(radam(), {"lr": 1e-12, "betas": (1e-9, 1 - 1e-9), "eps": 1e-30, "weight_decay": 1e6})
    numbers = hyper.numbers()
    assert relative(numbers["lr"], 1e-12) < 1e-12
    assert relative(numbers["betas"][0], 1e-9) < 1e-12
    assert abs(numbers["betas"][1] - (1 - 1e-9)) < 1e-15
    assert relative(numbers["eps"], 1e-30) < 1e-12
    assert relative(numbers["weight_decay"], 1e6) < 1e-12


# Derivatives


@each_optimizer
@pytest.mark.parametrize("seed", range(3))
def test_the_derivative_of_every_value_is_that_of_its_bijection(name: str, seed: int) -> None:
    """Exponentials: v - lower. Scaled sigmoids: (v - lower) (upper - v) / (upper - lower). hi moves with lo."""
    hyper = learn_all(name)
    randomize(hyper, 1.0, seed)
    flat = flatten(hyper.numbers())
    parameters = dict(hyper.named_parameters())
    for key, value in flatten(hyper()).items():
        lower, upper = ends(name, key, flat)
        v = value.item()
        slopes = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
        got = {other: 0.0 if slope is None else slope.item() for other, slope in zip(parameters, slopes, strict=True)}
        expected = dict.fromkeys(parameters, 0.0)
        if lower == -INF:
            expected[key] = 1.0
        elif upper == INF:
            expected[key] = v - lower
        else:
            expected[key] = (v - lower) * (upper - v) / (upper - lower)
        if key == "step_sizes[1]":
            expected["step_sizes[0]"] = flat["step_sizes[0]"]
        for other, slope in got.items():
            assert slope == pytest.approx(expected[other], rel=1e-12, abs=1e-15), (key, other)


@each_optimizer
def test_every_parameter_gets_the_gradient_of_finite_differences(name: str) -> None:
    hyper = learn_all(name)

    def objective() -> Tensor:
        # eps and the smaller step size are tiny: their logarithms weigh as much as the rest.
        return sum((i + 1) * v.abs().log() for i, v in enumerate(flatten(hyper()).values()))

    grads = torch.autograd.grad(objective(), list(hyper.parameters()))
    for (key, p), grad in zip(hyper.named_parameters(), grads, strict=True):
        origin, h, at = p.item(), 1e-3, {}
        for k in (-2, -1, 1, 2):
            with torch.no_grad():
                p.fill_(origin + k * h)
            at[k] = objective().item()
        with torch.no_grad():
            p.fill_(origin)
        difference = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
        assert abs(grad.item()) > 1e-6, key
        assert grad.item() == pytest.approx(difference, rel=1e-9, abs=1e-10), key


# A module like any other


@each_optimizer
def test_a_state_dict_restores_the_values_to_the_last_bit(name: str) -> None:
    hyper = learn_all(name)
    randomize(hyper, 2.0, 0)
    file = io.BytesIO()
    torch.save(hyper.state_dict(), file)
    file.seek(0)
    other = learn_all(name)
    assert other.numbers() != hyper.numbers()
    other.load_state_dict(torch.load(file))
    assert other.numbers() == hyper.numbers()
    assert list(hyper.state_dict()) == [key for key, _ in hyper.named_parameters()] == list(flatten(hyper()))


def full_house() -> Hyperparameters:
    """Every form that a value can have."""
    names = ("0.weight", "0.bias")
    return Hyperparameters(
        radam(),
        {
            "lr": PerParameter(names, Schedule(3, [0.1, 0.2, 0.3])),
            "betas": (Schedule(2, [0.8, 0.9]), 0.99),
            "eps": torch.tensor([1e-8, 1e-6]),
            "weight_decay": PerParameter(names, 0.01),
            "penalty": (0.5, constraints.interval(0.25, 4.0)),
        },
    )


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda hyper: pickle.loads(pickle.dumps(hyper))])
@pytest.mark.parametrize("make", [full_house, lambda: learn_all("rprop"), lambda: learn_all("sgd")])
def test_a_copy_has_the_same_values_and_parameters_of_its_own(copy_of: Any, make: Any) -> None:
    hyper = make()
    randomize(hyper, 1.0, 0)
    before = hyper.numbers()
    twin = copy_of(hyper)
    assert twin.numbers() == before
    assert repr(twin) == repr(hyper)
    randomize(twin, 1.0, 1)
    assert hyper.numbers() == before != twin.numbers()


def test_its_repr_shows_the_values_and_not_the_parameters() -> None:
    hyper = Hyperparameters(radam(), {"lr": 0.05, "betas": (0.9, 0.999)})
    assert repr(hyper) == "Hyperparameters(lr=0.05, betas=(0.9, 0.999))"
    with torch.no_grad():
        hyper.lr += math.log(2.0)
    assert repr(hyper) == "Hyperparameters(lr=0.1, betas=(0.9, 0.999))"
    assert repr(full_house()) == (
        "Hyperparameters(lr={0.weight: 0.1..0.3 over 3 steps, 0.bias: 0.1..0.3 over 3 steps}, "
        "betas=(0.8..0.9 over 2 steps, 0.99), eps=1e-08..1e-06 of shape (2,), "
        "weight_decay={0.weight: 0.01, 0.bias: 0.01}, penalty=0.5)"
    )


def test_it_shows_inside_another_module() -> None:
    assert "Hyperparameters(lr=0.001)" in repr(nn.ModuleDict({"hyper": Hyperparameters(radam(), "lr")}))


def plain(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        yield from plain(item)
    if not isinstance(value, list | tuple):
        yield value


def test_numbers_are_plain_floats_that_survive_json() -> None:
    numbers = full_house().numbers()
    assert all(type(item) is float for item in plain(numbers))
    restored = json.loads(json.dumps(numbers))
    assert list(plain(restored)) == list(plain(numbers))
    assert numbers["lr"]["0.bias"] == pytest.approx([0.1, 0.2, 0.3], rel=1e-12)
    assert isinstance(numbers["betas"], tuple)
    assert numbers["betas"][0] == pytest.approx([0.8, 0.9], rel=1e-12)


@each_optimizer
def test_numbers_are_arguments_of_torchs_class(name: str) -> None:
    numbers = learn_all(name).numbers()
    (group,) = TORCH[name]([nn.Parameter(torch.ones(2))], **numbers).param_groups
    assert {key: group[key] for key in numbers} == numbers


def test_values_are_arguments_of_the_optimizers_step() -> None:
    """One step of SGD from 2 at the start's values: 2 - lr (g + weight_decay 2)."""
    opt = sgd()
    hyper = Hyperparameters(opt, {"lr": 0.25, "weight_decay": 0.5})
    params = torch.tensor([2.0], dtype=F64)
    params, _ = opt.step(params, torch.tensor([3.0], dtype=F64), opt.init(params, **hyper()), **hyper())
    assert params.item() == pytest.approx(2 - 0.25 * (3 + 0.5 * 2), abs=1e-15)
    lr_slope, decay_slope = torch.autograd.grad(params.sum(), [hyper.lr, hyper.weight_decay])
    assert lr_slope.item() == pytest.approx(-4 * 0.25, abs=1e-14)
    assert decay_slope.item() == pytest.approx(-0.25 * 2 * 0.5, abs=1e-14)


# Schedules, per-parameter values, values of the task's


def test_a_schedule_has_a_parameter_per_step_and_each_step_reads_its_own() -> None:
    starts = [0.1, 0.2, 0.4]
    hyper = Hyperparameters(radam(), {"lr": Schedule(3, starts)})
    assert hyper.lr.shape == (3,)
    assert hyper.numbers()["lr"] == pytest.approx(starts, rel=1e-12)
    lr = hyper()["lr"]
    for step, held in ((0, 0), (1, 1), (2, 2), (7, 2)):
        (slope,) = torch.autograd.grad(lr(step), hyper.lr, retain_graph=True)
        expected = torch.zeros(3, dtype=F64)
        expected[held] = starts[held]
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("init", [0.3, Schedule(2, [0.3, 0.6])])
def test_a_per_parameter_value_has_one_for_each_name(init: float | Schedule) -> None:
    """SGD with a learning rate each: p - lr_p g, and each gradient reaches its own row only."""
    params = {"weight": torch.tensor([1.0], dtype=F64), "bias": torch.tensor([1.0], dtype=F64)}
    opt = sgd()
    hyper = Hyperparameters(opt, {"lr": PerParameter(params, init)})
    with torch.no_grad():
        hyper.lr[1] += math.log(2.0)
    steps = 2 if isinstance(init, Schedule) else 1
    first = {"weight": 0.3, "bias": 0.6}
    state = opt.init(params)
    new = params
    for _ in range(steps):
        new, state = opt.step(new, {"weight": torch.ones(1), "bias": torch.ones(1)}, state, **hyper())
    for row, name in enumerate(params):
        expected = 1 - first[name] * (3 if steps == 2 else 1)
        assert new[name].item() == pytest.approx(expected, abs=1e-14)
        (slope,) = torch.autograd.grad(new[name].sum(), hyper.lr, retain_graph=True)
        wanted = torch.zeros_like(hyper.lr)
        wanted[row] = -first[name] * (torch.tensor([1.0, 2.0], dtype=F64) if steps == 2 else 1.0)
        torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=0.0)


def test_the_elements_of_a_pair_have_forms_of_their_own() -> None:
    hyper = Hyperparameters(radam(), {"betas": (Schedule(2, [0.5, 0.6]), PerParameter(["a", "b"], 0.99))})
    first, second = hyper()["betas"]
    assert first(1).item() == pytest.approx(0.6, rel=1e-12)
    assert {name: value.item() for name, value in second.items()} == pytest.approx({"a": 0.99, "b": 0.99}, rel=1e-12)
    assert {key: tuple(p.shape) for key, p in hyper.named_parameters()} == {"betas[0]": (2,), "betas[1]": (2,)}


@pytest.mark.parametrize(
    "pair",
    [
        (1e-3, Schedule(2, [0.1, 0.2])),
        (Schedule(2, [1e-3, 0.01]), Schedule(2, [0.1, 0.02])),
        (PerParameter("ab", 1e-3), PerParameter("ab", 0.1)),
        (torch.tensor([1e-3, 1e-2]), torch.tensor([0.1, 0.011])),
    ],
)
def test_the_larger_step_size_stays_above_the_smaller_in_every_form(pair: tuple[Any, Any]) -> None:
    hyper = Hyperparameters(rprop(), {"step_sizes": pair})
    for got, start in zip(hyper.numbers()["step_sizes"], pair, strict=True):
        if isinstance(start, PerParameter):
            wanted = [start.init] * len(start.names)
        else:
            wanted = (
                start.values.tolist() if isinstance(start, Schedule) else torch.as_tensor(start, dtype=F64).tolist()
            )
        assert list(plain(got)) == pytest.approx(list(plain(wanted)), rel=1e-12)
    for seed in range(20):
        randomize(hyper, 20.0, seed)
        lower, upper = (torch.tensor(list(plain(number)), dtype=F64) for number in hyper.numbers()["step_sizes"])
        assert (lower < upper).all()


@pytest.mark.parametrize(
    ("start", "domain"),
    [
        (0.5, constraints.positive),
        (0.5, constraints.unit_interval),
        (-3.0, constraints.interval(-4.0, -2.0)),
        (7.0, constraints.greater_than(5.0)),
        (-7.0, constraints.less_than(5.0)),
        (-0.25, constraints.real),
        (0.5, constraints.half_open_interval(0.0, 2.0)),
    ],
)
def test_a_value_that_is_not_the_optimizers_lives_in_the_domain_it_comes_with(start: float, domain: Any) -> None:
    hyper = Hyperparameters(radam(), {"lr": 0.1, "penalty": (start, domain)})
    assert hyper.numbers()["penalty"] == pytest.approx(start, rel=1e-12)
    for seed in range(20):
        randomize(hyper, 30.0, seed)
        value = hyper()["penalty"]
        assert domain.check(value.detach())
        assert torch.autograd.grad(value, hyper.penalty)[0].isfinite()


def test_a_domain_may_be_narrowed_also_that_of_an_element_of_a_pair() -> None:
    hyper = Hyperparameters(
        radam(),
        {"lr": (0.01, constraints.interval(1e-3, 0.1)), "betas": ((0.9, constraints.interval(0.5, 0.95)), 0.99)},
    )
    assert hyper.numbers()["lr"] == pytest.approx(0.01, rel=1e-12)
    assert hyper.numbers()["betas"] == pytest.approx((0.9, 0.99), rel=1e-12)
    for seed in range(20):
        randomize(hyper, 30.0, seed)
        numbers = hyper.numbers()
        assert 1e-3 < numbers["lr"] < 0.1
        assert 0.5 < numbers["betas"][0] < 0.95


def test_example_weights_start_at_a_tensor_and_do_not_share_its_memory() -> None:
    start = torch.tensor([[0.5, 1.0, 2.0]], dtype=F64)
    for domain in (constraints.positive, constraints.real):
        hyper = Hyperparameters(radam(), {"weights": (start, domain)})
        torch.testing.assert_close(hyper()["weights"].detach(), start, rtol=1e-12, atol=0.0)
        with torch.no_grad():
            hyper.weights += 1.0
        assert start.tolist() == [[0.5, 1.0, 2.0]]


def test_example_weights_on_the_simplex_sum_to_one() -> None:
    start = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    hyper = Hyperparameters(radam(), {"weights": (start, constraints.simplex)})
    torch.testing.assert_close(hyper()["weights"].detach(), start, rtol=1e-12, atol=0.0)
    randomize(hyper, 2.0, 0)
    weights = hyper()["weights"]
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-15)
    assert bool((weights > 0).all())


def test_integer_and_half_precision_starts_are_learned_in_float64() -> None:
    hyper = Hyperparameters(radam(), {"lr": 1, "weights": (torch.tensor([1, 2]), constraints.positive)})
    assert {p.dtype for p in hyper.parameters()} == {F64}
    assert hyper()["weights"].tolist() == pytest.approx([1.0, 2.0], rel=1e-15)


# torch.func


def test_functional_call_gives_the_values_at_other_parameters() -> None:
    hyper = learn_all("rprop")
    given = {key: torch.tensor(0.1 * (i + 1), dtype=F64) for i, key in enumerate(dict(hyper.named_parameters()))}
    expected = learn_all("rprop")
    expected.load_state_dict(given)
    values = torch.func.functional_call(hyper, given, ())
    assert {key: v.item() for key, v in flatten(values).items()} == flatten(expected.numbers())
    assert flatten(hyper.numbers()) == flatten(learn_all("rprop").numbers())


def test_functional_call_composes_with_grad_vmap_and_jvp() -> None:
    hyper = Hyperparameters(radam(), {"lr": 0.5, "betas": (0.9, 0.99)})
    origin = {key: p.detach() for key, p in hyper.named_parameters()}

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        values = torch.func.functional_call(hyper, parameters, ())
        return values["lr"] ** 2 + values["betas"][0] * values["betas"][1]

    slopes = torch.func.grad(objective)(origin)
    assert slopes["lr"].item() == pytest.approx(2 * 0.5 * 0.5, rel=1e-12)
    assert slopes["betas[0]"].item() == pytest.approx(0.9 * 0.1 * 0.99, rel=1e-12)
    assert slopes["betas[1]"].item() == pytest.approx((0.99 - 2 / 3) * 0.01 * 3 * 0.9, rel=1e-12)

    candidates = {key: torch.stack([p - 1.0, p, p + 1.0]) for key, p in origin.items()}
    batched = torch.vmap(objective)(candidates)
    singly = torch.stack([objective({key: p[i] for key, p in candidates.items()}) for i in range(3)])
    torch.testing.assert_close(batched, singly, rtol=1e-15, atol=0.0)

    tangents = {key: torch.ones_like(p) for key, p in origin.items()}
    _, directional = torch.func.jvp(objective, (origin,), (tangents,))
    assert directional.item() == pytest.approx(sum(slope.item() for slope in slopes.values()), rel=1e-13)


# Refusals


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Hyperparameters(radam(), ("learning_rate",)),
            TypeError,
            "no hyperparameter 'learning_rate'.*lr, betas",
        ),
        (lambda: Hyperparameters(radam(), {"penalty": 0.1}), TypeError, "comes with its domain"),
        (lambda: Hyperparameters(radam(), ()), ValueError, "at least one hyperparameter"),
        (lambda: Hyperparameters(radam(), {}), ValueError, "at least one hyperparameter"),
        (lambda: Hyperparameters(radam(), ("lr", "eps", "lr")), ValueError, "once, got learn=.'lr', 'eps', 'lr'"),
        (lambda: Hyperparameters(radam(), {"betas": 0.9}), TypeError, "betas must start at a pair.*0.9"),
        (lambda: Hyperparameters(radam(), {"betas": (0.9, 0.99, 0.999)}), TypeError, "betas must start at a pair"),
        (
            lambda: Hyperparameters(radam(), {"betas": ((0.9, 0.99), constraints.unit_interval)}),
            TypeError,
            "each element may be .start, domain.",
        ),
        (lambda: Hyperparameters(radam(), {"lr": (0.1, 0.2)}), TypeError, "lr must start at a number, a tensor"),
        (lambda: Hyperparameters(radam(), {"lr": "0.1"}), TypeError, "lr must start at a number, a tensor"),
        (lambda: Hyperparameters(radam(), {"lr": None}), TypeError, "lr must start at a number, a tensor"),
        (lambda: Hyperparameters(radam(), {"lr": lambda step: 0.1}), TypeError, "lr must start at a number, a tensor"),
        (
            lambda: Hyperparameters(radam(), {"lr": -0.1}),
            ValueError,
            r"lr must start inside its domain \(> 0.0\).*-0.1",
        ),
        (lambda: Hyperparameters(radam(), {"lr": math.nan}), ValueError, "lr must start inside its domain"),
        (lambda: Hyperparameters(radam(), {"lr": math.inf}), ValueError, "lr must start inside its domain"),
        (lambda: Hyperparameters(radam(), {"lr": Schedule(2, [0.1, -1.0])}), ValueError, "lr must start inside.*-1.0"),
        (lambda: Hyperparameters(radam(), {"betas": (0.9, 1.5)}), ValueError, r"betas\[1\] must start inside.*1.5"),
        (lambda: Hyperparameters(radam(), {"betas": (0.9, 0.5)}), ValueError, r"betas\[1\] must start inside.*0.5"),
        (lambda: Hyperparameters(rprop(), {"etas": (1.1, 1.2)}), ValueError, r"etas\[0\] must start inside.*1.1"),
        (lambda: Hyperparameters(rprop(), {"etas": (0.5, 0.9)}), ValueError, r"etas\[1\] must start inside.*0.9"),
        (
            lambda: Hyperparameters(rprop(), {"step_sizes": (1.0, 0.5)}),
            ValueError,
            r"step_sizes\[1\] must start inside",
        ),
        (
            lambda: Hyperparameters(rprop(), {"step_sizes": (Schedule(2, 0.1), 1.0)}),
            ValueError,
            r"step_sizes\[1\] is bounded by step_sizes\[0\] and must have its form",
        ),
        (
            lambda: Hyperparameters(rprop(), {"step_sizes": (Schedule(2, 0.1), PerParameter("ab", 1.0))}),
            ValueError,
            r"step_sizes\[1\] is bounded by step_sizes\[0\] and must have its form",
        ),
        (
            lambda: Hyperparameters(rprop(), {"step_sizes": (PerParameter("ab", 0.1), PerParameter("ba", 1.0))}),
            ValueError,
            r"step_sizes\[1\] is bounded by step_sizes\[0\] and must have its form",
        ),
        (
            lambda: Hyperparameters(radam(), {"forward": (0.1, constraints.positive)}),
            ValueError,
            "'forward'.*nn.Module",
        ),
        (lambda: Hyperparameters(radam(), {"training": (0.1, constraints.positive)}), ValueError, "'training'.*nn.Mod"),
        (lambda: PerParameter([], 0.1), ValueError, "at least one"),
        (lambda: PerParameter(["a", "b", "a"], 0.1), ValueError, "names must be distinct"),
    ],
)
def test_a_bad_argument_is_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("opt", "learn"),
    [
        (radam(), {"lr": 0.0}),
        (radam(), {"weight_decay": 0}),
        (radam(), ("weight_decay",)),
        (radam(), {"eps": 0.0}),
        (radam(), {"betas": (0.0, 0.9)}),
        (radam(), {"betas": (1.0, 0.9)}),
        (radam(), {"betas": (0.9, 2 / 3)}),
        (radam(), {"betas": (0.9, 1.0)}),
        (rprop(), {"etas": (0.0, 1.2)}),
        (rprop(), {"etas": (1.0, 1.2)}),
        (rprop(), {"etas": (0.5, 1.0)}),
        (rprop(), {"step_sizes": (0.0, 1.0)}),
        (rprop(), {"step_sizes": (0.013, 0.013)}),
        (rprop(), {"step_sizes": (Schedule(2, [0.013, 0.02]), Schedule(2, [0.014, 0.02]))}),
        (sgd(), ("momentum",)),
        (sgd(), {"lr": torch.tensor([0.1, 0.0])}),
        (sgd(), {"extra": (-4.0, constraints.interval(-4.0, -2.0))}),
        (sgd(), {"extra": (5.0, constraints.less_than(5.0))}),
    ],
)
def test_a_start_on_the_boundary_is_refused_with_one_that_works(opt: Any, learn: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot start at .* the boundary of its domain") as caught:
        Hyperparameters(opt, learn)
    found = re.match(r"(\w+)(?:\[(\d)\])? cannot start .* try (\S+)$", str(caught.value))
    assert found is not None, caught.value
    name, element, suggestion = found[1], found[2], float(found[3])
    start = learn[name] if isinstance(learn, dict) else opt.defaults[name]
    if element is not None:
        pair = [Schedule(2, suggestion) if isinstance(item, Schedule) else item for item in start]
        pair[int(element)] = Schedule(2, suggestion) if isinstance(start[int(element)], Schedule) else suggestion
        if isinstance(start[0], Schedule):
            pair[0] = start[0]
        fixed: Any = tuple(pair)
    else:
        fixed = (suggestion, start[1]) if name == "extra" else suggestion
    Hyperparameters(opt, {name: fixed})


def test_a_refused_start_says_where_the_domain_ends() -> None:
    with pytest.raises(ValueError, match=re.escape("betas[1] cannot start at 1.0") + ".*0.6666.*1.0"):
        Hyperparameters(radam(), {"betas": (0.9, 1.0)})
