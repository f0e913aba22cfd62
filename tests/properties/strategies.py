"""What is tried: trees, dtypes, shapes, hyperparameters over their domains, gradients of every size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from metaopt.functional import REGISTRY
from tests.functional.cases import PEERS

SINGLE = (torch.float32, torch.complex64)
DOUBLE = (torch.float64, torch.complex128)
HALF = (torch.float16, torch.bfloat16)


# Hyperparameters


def powers(lowest: float, highest: float) -> st.SearchStrategy[float]:
    """Numbers of every size between two powers of ten."""
    return st.floats(lowest, highest).map(lambda exponent: 10.0**exponent)


def betas(nearest: float) -> st.SearchStrategy[float]:
    """From 0 to 1 - 10^-nearest, many of them near 1."""
    near_1 = st.floats(0.0, nearest).map(lambda exponent: 1.0 - 10.0**-exponent)
    return st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]) | near_1


RATES = st.sampled_from([1e-3, 0.0, 0.1, 1.0]) | powers(-12, 6)
DECAYS = st.sampled_from([0.0, 0.1, 1.0]) | powers(-8, 2)


@dataclass(frozen=True)
class Setup:
    """An optimizer and its options, under the names that torch and metaopt share."""

    name: str
    options: dict[str, Any]

    @property
    def opt(self) -> Any:
        return REGISTRY[self.name](**self.options)

    def torch_optimizer(self, params: Sequence[Any]) -> torch.optim.Optimizer:
        return PEERS[self.name].torch(params, **self.options, foreach=False)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters alone."""
        return {key: value for key, value in self.options.items() if not isinstance(value, bool)}

    @property
    def elements(self) -> dict[str, float]:
        """The same with pairs laid flat: {"betas[0]": .9, ...}."""
        return {
            key if item is value else f"{key}[{index}]": item
            for key, value in self.hyper.items()
            for index, item in enumerate(value if isinstance(value, tuple) else (value,))
        }

    @property
    def exact(self) -> dict[str, Any]:
        """All options, the hyperparameters as Decimals; for AdamW with the flag that it does not have."""

        def decimal(value: Any) -> Any:
            return tuple(map(Decimal, value)) if isinstance(value, tuple) else Decimal(value)

        flags = {"decoupled_weight_decay": self.name == "adamw"}
        return {**flags, **self.options, **{key: decimal(value) for key, value in self.hyper.items()}}


def setups(name: str, *, nearest: float = 4.0, with_eps: bool = False) -> st.SearchStrategy[Setup]:
    """Options over their whole domain, as far as torch computes with them.

    Args:
        nearest: betas go up to 1 - 10^-nearest.
        with_eps: leave an eps of 0 out, at which 0 / 0 is met.
    """
    options: dict[str, st.SearchStrategy[Any]] = {"lr": RATES, "maximize": st.booleans()}
    if name == "rprop":
        # Not so near to 0 or 1 that float32 rounds them there: torch then takes a flip for none, and none for a flip.
        shrink = st.sampled_from([0.5]) | st.floats(1e-6, 1 - 1e-6)
        grow = st.sampled_from([1.2, float("inf")]) | st.floats(1e-6, 10.0).map(lambda x: 1.0 + x) | powers(1, 6)
        sizes = st.sampled_from([0.0, 1e-6, 50.0, float("inf")]) | powers(-12, 6)
        options["etas"] = st.tuples(shrink, grow)
        options["step_sizes"] = st.tuples(sizes, sizes).map(sorted).map(tuple).filter(lambda s: s[0] < float("inf"))
    elif name == "sgd":
        options |= {"momentum": st.just(0.0) | betas(6.0) | st.floats(0, 2), "weight_decay": DECAYS}
        options |= {"dampening": st.just(0.0) | st.floats(-2, 2), "nesterov": st.booleans()}
    else:
        eps = st.sampled_from([1e-8, 1e-3]) | powers(-12, 0)
        options["betas"] = st.tuples(betas(nearest), betas(nearest))
        options["eps"] = eps if with_eps else eps | st.just(0.0)
        options["weight_decay"] = DECAYS
        if name != "adamw":
            options["decoupled_weight_decay"] = st.booleans()
    return st.fixed_dictionaries(options).map(lambda values: Setup(name, _allowed(values)))


def learned(setup: Setup) -> dict[str, float]:
    """The elements to differentiate by: all but a momentum of 0 beside dampening, which is refused, and no infinity."""
    elements = {key: value for key, value in setup.elements.items() if value < float("inf")}
    if setup.name == "sgd" and elements["momentum"] == 0 != elements["dampening"]:
        del elements["momentum"]
    return elements


def _allowed(options: dict[str, Any]) -> dict[str, Any]:
    """torch refuses nesterov without momentum, or with dampening."""
    if options.get("nesterov"):
        options["dampening"], options["momentum"] = 0.0, options["momentum"] or 0.9
    return options


# Numbers

MODERATE = st.floats(-10, 10, width=32)


def sized(exponents: Sequence[int]) -> st.SearchStrategy[float]:
    """0, moderate numbers, and such times given powers of ten."""
    return st.just(0.0) | MODERATE | st.builds(lambda x, e: x * 10.0**e, MODERATE, st.sampled_from(exponents))


def spread(lowest: float, highest: float) -> st.SearchStrategy[float]:
    """0, and numbers of both signs and every size between two powers of ten."""
    return st.just(0.0) | st.builds(lambda x, sign: sign * x, powers(lowest, highest), st.sampled_from([1.0, -1.0]))


NOT_FINITE = st.sampled_from([float("inf"), float("-inf"), float("nan")])
STARTS = sized([-10, -3, 3, 10])
# Squares of the greatest overflow, squares of the least are 0. In float64 1e-40 is an ordinary number.
ANY_SIZE = {torch.float32: sized([-40, -30, -20, -10, 10, 20, 30, 37]), torch.float64: sized([-160, -40, 20, 40, 160])}
GRADIENTS = {dtype: st.one_of(sizes, sizes, sizes, NOT_FINITE) for dtype, sizes in ANY_SIZE.items()}


# Trees


class Branches(NamedTuple):
    left: Any
    right: Any


# From 4,096 elements a step is one pass of its own.
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (0,), (0, 3), (2, 1, 2), (1, 5), (4099,)])


@dataclass(frozen=True)
class Leaf:
    """A tensor in the making: a few numbers, repeated until its shape is filled."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def real(self) -> torch.dtype:
        return self.dtype.to_real()

    def filled(self, numbers: Sequence[float]) -> Tensor:
        shape = (*self.shape, 2) if self.dtype.is_complex else self.shape
        count = torch.Size(shape).numel()
        values = torch.tensor(numbers, dtype=torch.float64).to(self.real)
        tensor = values.repeat(count // len(numbers) + 1)[:count].reshape(shape)
        return torch.view_as_complex(tensor) if self.dtype.is_complex else tensor


def leaves(dtypes: Sequence[torch.dtype]) -> st.SearchStrategy[Leaf]:
    return st.builds(Leaf, st.sampled_from(dtypes), SHAPES)


def branches(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "weight", "0"])
    return st.one_of(
        st.dictionaries(names, inner, max_size=2),
        st.lists(inner, max_size=2),
        st.tuples(inner),
        st.builds(Branches, inner, inner),
    )


def trees(dtypes: Sequence[torch.dtype]) -> st.SearchStrategy[Any]:
    """Leaves alone, and dicts, lists, tuples and NamedTuples of them, of these and so on."""
    leaf = leaves(dtypes)
    shallow = branches(leaf)
    return leaf | shallow | branches(leaf | shallow)


@dataclass(frozen=True)
class Run:
    """A tree of parameters and its gradients at each step."""

    params: Any
    grads: list[Any]


@st.composite
def runs(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype], gradients: dict[torch.dtype, Any] = GRADIENTS, steps: int = 8
) -> Run:
    """Parameters of every kind, and up to some number of steps.

    Args:
        gradients: where to draw them from, by real dtype; or None, which they are now and then anyway.
    """
    tree = draw(trees(dtypes))

    def grads(leaf: Leaf) -> Tensor | None:
        source = gradients.get(leaf.real, ANY_SIZE[torch.float32])
        numbers = draw(st.lists(source, min_size=1, max_size=3) | st.none())
        return None if numbers is None else leaf.filled(numbers)

    def start(leaf: Leaf) -> Tensor:
        return leaf.filled(draw(st.lists(STARTS, min_size=1, max_size=3)))

    params = tree_map(start, tree)
    return Run(params, [tree_map(grads, tree) for _ in range(draw(st.integers(1, steps)))])
