"""wandb's distributions: one small class each, whose fields are the keys of a sweep file.

Where a distribution is exactly one of Optuna's, Optuna draws it under the parameter's own name. Otherwise Optuna draws
what the parameter is computed from, under a name that says so:

- ``lr``: the value itself (``uniform``, ``log_uniform_values``, ``int_uniform``, ``categorical``, ...)
- ``lr/quantile``: u, uniform in (0, 1); the value is the inverse of the distribution function at u (``normal``, ...)
- ``lr/unrounded``: X; the value is ``round(X / q) * q`` (``q_uniform``, ...)
- ``lr/unrounded/quantile``: both (``q_normal``, ...)

So a sampler that learns from earlier trials (bayes) sees a smooth space in which equal lengths are equally probable.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar, final

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

# What is cut off each end of (0, 1): a sampler may propose the very ends, where a normal variable is infinite. This
# leaves it 6 standard deviations on either side.
_END = 1e-9


class Distribution(ABC):
    """What a parameter's value is drawn from.

    Attributes:
        name: as written in a sweep file.

    Raises:
        ValueError: by the constructors, for what is outside of its domain.

    Example:
        >>> list(QUniform(min=0, max=1, q=0.25).values())
        [0.0, 0.25, 0.5, 0.75]
        >>> Normal(sigma=-1)
        Traceback (most recent call last):
        ...
        ValueError: sigma must be >= 0, got -1
    """

    name: ClassVar[str]

    @abstractmethod
    def suggest(self, trial: BaseTrial, name: str) -> Any:
        """This trial's value of the parameter called ``name``."""

    @abstractmethod
    def values(self) -> Sequence[Any]:
        """The values that a grid takes, in its order.

        Raises:
            ValueError: a grid cannot take this distribution.
        """


class Continuous(Distribution):
    """A distribution of real numbers."""

    @final
    def values(self) -> Sequence[Any]:
        raise ValueError(
            f"a grid cannot list {self.name}: it takes value, values, int_uniform (whole min and max) and q_uniform"
        )


class Quantized(Distribution):
    """``round(X / q) * q``: a whole number if ``q`` is one."""

    q: float

    @property
    @abstractmethod
    def unrounded(self) -> Distribution:
        """The distribution of X."""

    @final
    def __post_init__(self) -> None:
        _check_number("q", self.q, above=0)
        self.unrounded  # noqa: B018  # its constructor checks the other numbers

    @final
    def suggest(self, trial: BaseTrial, name: str) -> float:
        unrounded: float = self.unrounded.suggest(trial, f"{name}/unrounded")
        return round(unrounded / self.q) * self.q


class QuantizedContinuous(Quantized):
    """A quantized distribution without a finite list of values."""

    @final
    def values(self) -> Sequence[Any]:
        raise ValueError(f"a grid cannot list {self.name}: give its values")


# Listed values


@dataclass(frozen=True)
class Constant(Distribution):
    """One value, which is not searched."""

    name = "constant"
    value: Any

    def __post_init__(self) -> None:
        _text(self.value)

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        return self.value

    def values(self) -> Sequence[Any]:
        return (self.value,)


@dataclass(frozen=True)
class Categorical(Distribution):
    """One of the choices, all equally probable (listed twice: twice as probable).

    Optuna knows choices that it cannot hold or tell apart (lists, mappings, ``1`` beside ``true``) by their JSON.
    """

    name = "categorical"
    choices: tuple[Any, ...]

    def __post_init__(self) -> None:
        _check_choices(self.choices)

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        by_text = {_text(choice): choice for choice in self.choices}
        if len(by_text) < len(self.choices):
            return _pick(trial, name, self.choices, [1.0] * len(self.choices))
        if _plain(self.choices):
            return trial.suggest_categorical(name, self.choices)
        return by_text[trial.suggest_categorical(name, tuple(by_text))]

    def values(self) -> Sequence[Any]:
        return tuple({_text(choice): choice for choice in self.choices}.values())


@dataclass(frozen=True)
class CategoricalWithProbabilities(Distribution):
    """One of the choices, with these probabilities."""

    name = "categorical_w_probabilities"
    choices: tuple[Any, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_choices(self.choices)
        if len(self.probabilities) != len(self.choices):
            raise ValueError(f"{len(self.probabilities)} probabilities for {len(self.choices)} values")
        for probability in self.probabilities:
            _check_number("probabilities", probability, least=0)
        if not math.isclose(sum(self.probabilities), 1, rel_tol=1e-5):
            raise ValueError(f"probabilities must sum to 1, got {sum(self.probabilities):.6g}")

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        return _pick(trial, name, self.choices, self.probabilities)

    def values(self) -> Sequence[Any]:
        raise ValueError("a grid takes every value once: leave the probabilities out")


# Ranges


@dataclass(frozen=True)
class IntUniform(Distribution):
    """Whole numbers from ``min`` to ``max``, both included."""

    name = "int_uniform"
    min: int
    max: int

    def __post_init__(self) -> None:
        _check_range(self.min, self.max)
        for key, value in (("min", self.min), ("max", self.max)):
            if not isinstance(value, int):
                raise ValueError(f"{key} must be a whole number, got {value!r}")

    def suggest(self, trial: BaseTrial, name: str) -> int:
        return trial.suggest_int(name, self.min, self.max)

    def values(self) -> Sequence[int]:
        return range(self.min, self.max + 1)


@dataclass(frozen=True)
class Uniform(Continuous):
    """Real numbers between ``min`` and ``max``."""

    name = "uniform"
    min: float
    max: float

    def __post_init__(self) -> None:
        _check_range(self.min, self.max)

    def suggest(self, trial: BaseTrial, name: str) -> float:
        return trial.suggest_float(name, self.min, self.max)


@dataclass(frozen=True)
class LogUniformValues(Continuous):
    """X between ``min`` and ``max`` such that log X is uniform."""

    name = "log_uniform_values"
    min: float
    max: float

    def __post_init__(self) -> None:
        _check_range(self.min, self.max)
        _check_number("min", self.min, above=0)

    def suggest(self, trial: BaseTrial, name: str) -> float:
        return trial.suggest_float(name, self.min, self.max, log=True)


@dataclass(frozen=True)
class LogUniform(Continuous):
    """X such that log X is uniform between ``min`` and ``max``: these are exponents of e."""

    name = "log_uniform"
    min: float
    max: float

    def __post_init__(self) -> None:
        _check_exponents(self.min, self.max)

    def suggest(self, trial: BaseTrial, name: str) -> float:
        return trial.suggest_float(name, math.exp(self.min), math.exp(self.max), log=True)


@dataclass(frozen=True)
class InvLogUniform(Continuous):
    """X such that log(1 / X) is uniform between ``min`` and ``max``: X lies between exp(-max) and exp(-min)."""

    name = "inv_log_uniform"
    min: float
    max: float

    def __post_init__(self) -> None:
        _check_exponents(self.min, self.max)

    def suggest(self, trial: BaseTrial, name: str) -> float:
        return trial.suggest_float(name, math.exp(-self.max), math.exp(-self.min), log=True)


@dataclass(frozen=True)
class InvLogUniformValues(Continuous):
    """X between ``min`` and ``max`` such that log(1 / X) is uniform, and so log X: another name of the same."""

    name = "inv_log_uniform_values"
    min: float
    max: float

    def __post_init__(self) -> None:
        LogUniformValues(self.min, self.max)

    def suggest(self, trial: BaseTrial, name: str) -> float:
        return LogUniformValues(self.min, self.max).suggest(trial, name)


@dataclass(frozen=True)
class QUniform(Quantized):
    """Rounded :class:`Uniform`. A grid steps from ``min`` by ``q`` and leaves ``max`` out, as wandb's does."""

    name = "q_uniform"
    min: float
    max: float
    q: float = 1

    @property
    def unrounded(self) -> Distribution:
        return Uniform(self.min, self.max)

    def values(self) -> Sequence[float]:
        return _Steps(self.min, self.q, math.ceil((self.max - self.min) / self.q))


@dataclass(frozen=True)
class QLogUniformValues(QuantizedContinuous):
    """Rounded :class:`LogUniformValues`."""

    name = "q_log_uniform_values"
    min: float
    max: float
    q: float = 1

    @property
    def unrounded(self) -> Distribution:
        return LogUniformValues(self.min, self.max)


@dataclass(frozen=True)
class QLogUniform(QuantizedContinuous):
    """Rounded :class:`LogUniform`."""

    name = "q_log_uniform"
    min: float
    max: float
    q: float = 1

    @property
    def unrounded(self) -> Distribution:
        return LogUniform(self.min, self.max)


# Bells


@dataclass(frozen=True)
class Normal(Continuous):
    """Mean ``mu``, standard deviation ``sigma``."""

    name = "normal"
    mu: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        _check_number("mu", self.mu)
        _check_number("sigma", self.sigma, least=0)

    def suggest(self, trial: BaseTrial, name: str) -> float:
        return self.mu + self.sigma * NormalDist().inv_cdf(_quantile(trial, name))


@dataclass(frozen=True)
class LogNormal(Continuous):
    """X such that log X has mean ``mu`` and standard deviation ``sigma``."""

    name = "log_normal"
    mu: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        Normal(self.mu, self.sigma)
        if not _positive_exp(self.mu + self.sigma * NormalDist().inv_cdf(1 - _END)):
            raise ValueError(f"exp(mu + 6 sigma) is no float: mu={self.mu}, sigma={self.sigma} belong to log X")

    def suggest(self, trial: BaseTrial, name: str) -> float:
        return math.exp(Normal(self.mu, self.sigma).suggest(trial, name))


@dataclass(frozen=True)
class Beta(Continuous):
    """The beta distribution on (0, 1) with shapes ``a`` and ``b``. SciPy inverts it: there is no closed form."""

    name = "beta"
    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        _check_number("a", self.a, above=0)
        _check_number("b", self.b, above=0)

    def suggest(self, trial: BaseTrial, name: str) -> float:
        try:
            from scipy.special import betaincinv
        except ImportError:
            raise ImportError(f"{self.name} of {name} needs SciPy: pip install 'metaopt[sweeps]'") from None
        return float(betaincinv(self.a, self.b, _quantile(trial, name)))


@dataclass(frozen=True)
class QNormal(QuantizedContinuous):
    """Rounded :class:`Normal`."""

    name = "q_normal"
    mu: float = 0.0
    sigma: float = 1.0
    q: float = 1

    @property
    def unrounded(self) -> Distribution:
        return Normal(self.mu, self.sigma)


@dataclass(frozen=True)
class QLogNormal(QuantizedContinuous):
    """Rounded :class:`LogNormal`."""

    name = "q_log_normal"
    mu: float = 0.0
    sigma: float = 1.0
    q: float = 1

    @property
    def unrounded(self) -> Distribution:
        return LogNormal(self.mu, self.sigma)


@dataclass(frozen=True)
class QBeta(QuantizedContinuous):
    """Rounded :class:`Beta`."""

    name = "q_beta"
    a: float = 1.0
    b: float = 1.0
    q: float = 1

    @property
    def unrounded(self) -> Distribution:
        return Beta(self.a, self.b)


DISTRIBUTIONS: dict[str, type[Distribution]] = {
    cls.name: cls
    for cls in (
        Constant,
        Categorical,
        CategoricalWithProbabilities,
        IntUniform,
        Uniform,
        QUniform,
        LogUniform,
        LogUniformValues,
        InvLogUniform,
        InvLogUniformValues,
        QLogUniform,
        QLogUniformValues,
        Normal,
        QNormal,
        LogNormal,
        QLogNormal,
        Beta,
        QBeta,
    )
}


@dataclass(frozen=True)
class _Steps(Sequence[float]):
    """``size`` numbers from ``start`` on, ``step`` apart: a range of floats, which is not written out."""

    start: float
    step: float
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.start + index * self.step


def _quantile(trial: BaseTrial, name: str) -> float:
    """Uniform in (0, 1)."""
    return trial.suggest_float(f"{name}/quantile", _END, 1 - _END)


def _pick(trial: BaseTrial, name: str, choices: Sequence[Any], weights: Sequence[float]) -> Any:
    """The choice in whose share of (0, 1) the quantile lies."""
    ends = list(accumulate(weights))
    return choices[bisect_right(ends, _quantile(trial, name) * ends[-1])]


def _text(value: Any) -> str:
    """What tells values apart: ``1`` and ``true`` are equal in Python."""
    try:
        return json.dumps(value)
    except TypeError:
        raise ValueError(f"JSON, in which values are kept, has no {value!r}: a text needs quotes around it") from None


def _plain(choices: Sequence[Any]) -> bool:
    """Whether Optuna can hold the choices and tell them apart."""
    scalars = all(choice is None or isinstance(choice, bool | int | float | str) for choice in choices)
    return scalars and len(set(choices)) == len(choices) and all(choice == choice for choice in choices)


def _check_choices(choices: Sequence[Any]) -> None:
    if not choices:
        raise ValueError("values is empty")
    for choice in choices:
        _text(choice)


def _check_number(key: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}{_spelling(value)}")
    if not value > above:
        raise ValueError(f"{key} must be > {above}, got {value}")
    if not value >= least:
        raise ValueError(f"{key} must be >= {least}, got {value}")


def _spelling(value: Any) -> str:
    """YAML 1.1 reads 1e-3 as text: it wants 1.0e-3."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return f" (text to YAML; write {number:.6e})".replace("000000e", "0e") if math.isfinite(number) else ""


def _check_range(least: Any, greatest: Any) -> None:
    _check_number("min", least)
    _check_number("max", greatest)
    if not least < greatest:
        hint = " (a single number is value:)" if least == greatest else ""
        raise ValueError(f"min must be < max, got min={least}, max={greatest}{hint}")


def _check_exponents(least: Any, greatest: Any) -> None:
    _check_range(least, greatest)
    for key, value in (("min", least), ("max", greatest)):
        if not (_positive_exp(value) and _positive_exp(-value)):
            raise ValueError(
                f"{key} is an exponent of e, got {value}: distributions in *_values take the values themselves"
            )


def _positive_exp(exponent: float) -> bool:
    """Whether its power of e is a float above 0."""
    try:
        return math.exp(exponent) > 0
    except OverflowError:
        return False
