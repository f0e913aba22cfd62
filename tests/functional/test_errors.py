"""Bad input is refused by an error that names the argument and shows the value, and leaves everything as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.functional import REGISTRY
from tests.functional.cases import F64, PEERS
from tests.functional.snapshots import untouched

# hyperparameter -> values outside its domain, and how the error shows them
OUTSIDE: dict[str, list[tuple[Any, str]]] = {
    "lr": [(-1.0, "lr=-1.0"), (float("nan"), "lr=nan"), (-1, "lr=-1")],
    "betas": [
        ((1.0, 0.999), "betas[0]=1.0"),
        ((-0.1, 0.999), "betas[0]=-0.1"),
        ((0.9, 1.0), "betas[1]=1.0"),
        ((0.9, -0.5), "betas[1]=-0.5"),
    ],
    "eps": [(-1e-8, "eps=-1e-08")],
    "weight_decay": [(-0.25, "weight_decay=-0.25")],
    "momentum": [(-0.5, "momentum=-0.5")],
    "dampening": [(float("nan"), "dampening=nan")],
    "etas": [
        ((1.5, 0.5), "etas[0]=1.5"),
        ((0.0, 1.5), "etas[0]=0.0"),
        ((1.0, 1.5), "etas[0]=1.0"),
        ((0.5, 1.0), "etas[1]=1.0"),
    ],
    "step_sizes": [((-1.0, 50.0), "step_sizes[0]=-1.0"), ((1.0, 0.5), "step_sizes[1]=0.5")],
}
WRONG_FORM = {
    "lr": ["0.1", None, 0.1j, (0.1, 0.2), torch.tensor(0.1j), torch.tensor(True)],
    "betas": [0.9, (0.9,), (0.9, 0.99, 0.999), ("0.9", 0.999), {"weight": 0.9}],
    "etas": [0.5, (0.5,), (None, 1.2)],
}
CALLS = ["construct", "construct with a tensor", "init", "step", "mapping", "callable"]


def params() -> dict[str, Tensor]:
    return {"weight": torch.randn(3, 2, dtype=F64), "bias": torch.randn(2, dtype=F64)}


def nested(convert: Callable[[Any], Any], value: Any) -> Any:
    return tuple(convert(item) for item in value) if isinstance(value, tuple) else convert(value)


def attempt(make: Callable[..., Any], call: str, name: str, value: Any) -> None:
    """Give an optimizer a value in one of the ways that there are."""
    if call == "construct":
        make(**{name: value})
    elif call == "construct with a tensor":
        make(**{name: nested(lambda x: torch.tensor(x, dtype=F64), value)})
    else:
        opt, start = make(), params()
        state = opt.init(start)
        if call == "mapping":
            value = nested(lambda x: dict.fromkeys(start, x), value)
        elif call == "callable":
            value = lambda step, value=value: value  # noqa: E731
        with untouched(start, state):
            if call == "init":
                opt.init(start, **{name: value})
            else:
                opt.step(start, start, state, **{name: value})


def every(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(REGISTRY[optimizer], name, item, id=f"{optimizer}-{name}-{item}")
        for optimizer in PEERS
        for name, items in table.items()
        if name in REGISTRY[optimizer]().hyperparameters
        for item in items
    ]


def test_every_hyperparameter_has_values_to_refuse() -> None:
    assert {name for make in REGISTRY.values() for name in make().hyperparameters} == OUTSIDE.keys()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("make", "name", "bad"), every(OUTSIDE))
def test_a_number_outside_the_domain(make: Callable[..., Any], name: str, bad: tuple[Any, str], call: str) -> None:
    value, shown = bad
    name, _, number = shown.partition("=")
    if call == "mapping":
        name += "['weight']"
    with pytest.raises(ValueError, match=f"^{re.escape(name)} must be .*, got {re.escape(f'{name}={number}')}(.0)?$"):
        attempt(make, call, name.partition("[")[0], value)


@pytest.mark.parametrize("call", ["construct", "init", "step", "callable"])
@pytest.mark.parametrize(("make", "name", "value"), every(WRONG_FORM))
def test_a_value_of_a_form_that_no_hyperparameter_has(
    make: Callable[..., Any], name: str, value: Any, call: str
) -> None:
    with pytest.raises(TypeError, match=rf"^{name}(\[.*\])? must be .*got "):
        attempt(make, call, name, value)


@pytest.mark.parametrize("name", PEERS)
class TestEveryOptimizerRefuses:
    def refused(self, kind: type[Exception], match: str, name: str, **changes: Any) -> None:
        """Check one call of ``step``, right but for ``changes``."""
        opt = REGISTRY[name]()
        start = params()
        good = {"params": start, "grads": start, "state": opt.init(start)}
        arguments = {**good, **changes}
        with untouched(arguments), pytest.raises(kind, match=match):
            opt.step(**arguments)

    def test_an_unknown_hyperparameter(self, name: str) -> None:
        message = rf"^{REGISTRY[name]().name} has no hyperparameter 'rate' \(got rate=0.5\); it has lr, "
        self.refused(TypeError, message, name, rate=0.5)
        with pytest.raises(TypeError, match=message):
            REGISTRY[name]().init(params(), rate=0.5)
        with pytest.raises(TypeError, match="rate"):
            REGISTRY[name](rate=0.5)

    def test_gradients_of_another_structure(self, name: str) -> None:
        start = params()
        message = "^grads must have the structure of params"
        for grads in ({"weight": start["weight"]}, {**start, "other": start["bias"]}, list(start.values()), None):
            self.refused(ValueError, message, name, params=start, grads=grads)

    def test_a_gradient_of_another_shape(self, name: str) -> None:
        start = params()
        message = r"^grads\['weight'\] must have the shape \(3, 2\) of its parameter, got \(2, 3\)$"
        self.refused(ValueError, message, name, params=start, grads={**start, "weight": torch.zeros(2, 3, dtype=F64)})

    def test_a_gradient_that_would_only_broadcast(self, name: str) -> None:
        start = params()
        message = r"^grads\['bias'\] must have the shape \(2,\) of its parameter, got \(\)$"
        self.refused(ValueError, message, name, params=start, grads={**start, "bias": torch.ones((), dtype=F64)})

    def test_a_sparse_gradient(self, name: str) -> None:
        start = params()
        grads = {**start, "weight": start["weight"].to_sparse()}
        opt = REGISTRY[name]()
        with pytest.raises(TypeError, match=r"^grads\['weight'\] must be dense, got a sparse gradient.*sparse_coo$"):
            opt.step(start, grads, opt.init(start))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
    def test_a_gradient_of_another_kind_of_dtype(self, name: str, dtype: torch.dtype) -> None:
        start = params()
        message = rf"^grads\['bias'\] must have a dtype like its parameter's torch.float64, got {dtype}$"
        self.refused(TypeError, message, name, params=start, grads={**start, "bias": start["bias"].to(dtype)})

    def test_a_gradient_that_is_no_tensor(self, name: str) -> None:
        start = params()
        message = r"^grads\['bias'\] must be a tensor or None, got 0.5$"
        self.refused(TypeError, message, name, params=start, grads={**start, "bias": 0.5})

    @pytest.mark.parametrize("bad", [torch.arange(3), torch.tensor([True]), 0.5, "text"], ids=str)
    def test_a_parameter_that_cannot_be_trained(self, name: str, bad: Any) -> None:
        start = {"weight": torch.ones(2), "layer": [bad]}
        got = re.escape(str(bad.dtype) if isinstance(bad, Tensor) else repr(bad))
        message = rf"^params\['layer.0'\] must be a floating-point or complex tensor, got {got}$"
        with pytest.raises(TypeError, match=message):
            REGISTRY[name]().init(start)
        opt = REGISTRY[name]()
        state = opt.init({"weight": torch.ones(2), "layer": [torch.ones(3)]})
        self.refused(TypeError, message, name, params=start, grads=start, state=state)

    def test_a_tensor_that_does_not_broadcast_against_its_parameter(self, name: str) -> None:
        """Nor may it make the parameter larger."""
        for value in (torch.full((3,), 0.1), torch.full((1, 3, 2), 0.1)):
            shape = re.escape(str(tuple(value.shape)))
            message = rf"^lr of shape {shape} does not broadcast against parameter 'weight' of shape \(3, 2\)$"
            self.refused(ValueError, message, name, lr=value)
            with pytest.raises(ValueError, match=message):
                REGISTRY[name]().init(params(), lr=value)

    def test_a_mapping_that_lacks_a_parameter(self, name: str) -> None:
        message = r"^lr has no value for parameter 'bias'; it has \['weight'\]$"
        self.refused(ValueError, message, name, lr={"weight": 0.1})
        with pytest.raises(ValueError, match=message):
            REGISTRY[name](lr={"weight": 0.1}).init(params())

    def test_a_state_of_another_optimizer(self, name: str) -> None:
        other = "sgd" if name != "sgd" else "radam"
        wanted, got = REGISTRY[name]().State.__name__, REGISTRY[other]().State.__name__
        start = params()
        self.refused(
            TypeError, f"^state must be a {wanted}, got {got}$", name, params=start, state=REGISTRY[other]().init(start)
        )
        self.refused(TypeError, f"^state must be a {wanted}, got dict$", name, state={})

    def test_a_state_of_other_parameters(self, name: str) -> None:
        state = REGISTRY[name]().init({"other": torch.ones(1)})
        self.refused(ValueError, r"^state\.step must have the structure of params", name, state=state)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.1}], ids=str)
def test_nesterov_needs_momentum_and_no_dampening(options: dict[str, float]) -> None:
    """As in torch."""
    with pytest.raises(ValueError, match=r"nesterov.*momentum=\S+ and dampening=\S+"):
        REGISTRY["sgd"](nesterov=True, **options)
    with pytest.raises(ValueError, match="Nesterov"):
        torch.optim.SGD([torch.zeros(1)], nesterov=True, **options)
