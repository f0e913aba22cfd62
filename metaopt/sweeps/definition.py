"""A sweep file in wandb's format: what it says, as plain data, checked in full before anything runs.

The format is that of wandb's documentation ("Sweep configuration options") and of the schema that wandb publishes
(``schema.json`` of its package ``sweeps``). What only wandb's servers can do (``job``, ``image_uri``, ``scheduler``,
``method: custom``, several ``metrics``) is refused; ``metric.impute``, ``controller``, ``apiVersion`` and ``kind`` are
accepted and change nothing.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from metaopt.sweeps.distributions import DISTRIBUTIONS, Distribution

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Method = Literal["grid", "random", "bayes"]
Goal = Literal["minimize", "maximize"]
T = TypeVar("T")

MACROS = (
    "env",
    "interpreter",
    "program",
    "args",
    "args_no_equals",
    "args_no_hyphens",
    "args_no_boolean_flags",
    "args_append_hydra",
    "args_override_hydra",
    "args_json",
    "args_json_file",
)

_KEYS = ("program", "method", "metric", "parameters", "early_terminate", "command", "run_cap")
_TEXTS = ("name", "description", "project", "entity", "apiVersion", "kind")
_SERVED = ("job", "image_uri", "scheduler", "metrics")
_LARGEST_GRID = 1_000_000


class SweepError(ValueError):
    """A sweep file that cannot be read or run: one line with the file, the key and the value."""


@dataclass(frozen=True)
class Metric:
    """What is optimized.

    Attributes:
        name: as the program logs it.
        goal: which way is better.
        target: no further runs are started once one has reached it.
    """

    name: str
    goal: Goal = "minimize"
    target: float | None = None


@dataclass(frozen=True)
class Hyperband:
    """When to stop runs early; :mod:`metaopt.sweeps.hyperband` defines the numbers."""

    min_iter: int | None = None
    max_iter: int | None = None
    s: int | None = None
    eta: float = 3
    strict: bool = False


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        method: how points are chosen.
        metric: None if the file has none (grid and random need none).
        parameters: by name, nested ones as ``optimizer.lr``; sorted by name on every level, as wandb sorts them.
        paths: for every name its keys: ``("optimizer", "lr")`` is nested, ``("optimizer.lr",)`` a name with a dot.
        early_terminate: when to stop runs early.
        run_cap: the largest number of runs.
        program: the training script.
        command: how to call it, with macros; empty for wandb's default.
        text: the YAML as read.
    """

    method: Method
    metric: Metric | None
    parameters: Mapping[str, Distribution]
    paths: Mapping[str, tuple[str, ...]]
    early_terminate: Hyperband | None
    run_cap: int | None
    program: str | None
    command: tuple[str, ...]
    name: str | None
    description: str | None
    project: str | None
    entity: str | None
    text: str

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The values of a trial by flat name, constants included."""
        return {name: distribution.suggest(trial, name) for name, distribution in self.parameters.items()}

    def grid(self) -> list[dict[str, Any]]:
        """Every point, in wandb's order: parameters sorted by name, the last one changing fastest.

        Raises:
            ValueError: a parameter whose values cannot be listed.

        Example:
            >>> sweep = parse("{method: grid, program: a.py, parameters: {b: {values: [1, 2]}, a: {values: [3, 4]}}}")
            >>> sweep.grid()
            [{'a': 3, 'b': 1}, {'a': 3, 'b': 2}, {'a': 4, 'b': 1}, {'a': 4, 'b': 2}]
        """
        points = itertools.product(*(distribution.values() for distribution in self.parameters.values()))
        return [dict(zip(self.parameters, point, strict=True)) for point in points]


def read(path: Path | str) -> Sweep:
    """Read a sweep file.

    Raises:
        SweepError: the file cannot be read, or says what cannot be run.
        ImportError: PyYAML is missing.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SweepError(f"{path}: {reason}") from None
    return parse(text, str(path))


def parse(text: str, source: str = "sweep") -> Sweep:
    """Read a sweep from the text of its file.

    Args:
        text: YAML.
        source: names the text in errors.

    Raises:
        SweepError: what cannot be run.
        ImportError: PyYAML is missing.

    Example:
        >>> sweep = parse('''
        ... program: train.py
        ... method: random
        ... parameters:
        ...   optimizer:
        ...     parameters:
        ...       lr: {distribution: log_uniform_values, min: 0.001, max: 0.1}
        ...   epochs: {value: 10}
        ... ''')
        >>> dict(sweep.parameters)
        {'epochs': Constant(value=10), 'optimizer.lr': LogUniformValues(min=0.001, max=0.1)}
        >>> parse("{program: train.py, metod: grid}", "sweep.yaml")
        Traceback (most recent call last):
        ...
        metaopt.sweeps.definition.SweepError: sweep.yaml: unknown key 'metod'; did you mean 'method'?
    """
    at = _Place(source, _load(text, source))
    at.known((*_KEYS, *_TEXTS, *_SERVED, "controller"))
    for key in _SERVED:
        if key in at.value:
            meant = _did_you_mean(key, _KEYS)
            why = f"{key} needs wandb's servers; a sweep that is run here has a program and a metric"
            raise at.error(f"{key}{meant} ({why})" if meant else why)
    method = cast(Method, at.one_of("method", ("grid", "random", "bayes")))
    metric = _metric(at / "metric") if "metric" in at.value else None
    rule = _hyperband(at / "early_terminate") if "early_terminate" in at.value else None
    for reason, needed in ((f"method {method}", method == "bayes"), ("early_terminate", rule is not None)):
        if needed and metric is None:
            raise at.error(f"{reason} needs a metric, such as metric: {{name: loss, goal: minimize}}")
    parameters, paths = _parameters(at)
    program, command = at.text("program"), _command(at)
    if not program and (not command or "${program}" in command):
        raise at.error("program is missing: the script to run, such as program: train.py")
    sweep = Sweep(
        method=method,
        metric=metric,
        parameters=parameters,
        paths=paths,
        early_terminate=rule,
        run_cap=at.count("run_cap"),
        program=program,
        command=command,
        text=text,
        **{key: at.text(key) for key in ("name", "description", "project", "entity")},
    )
    if method == "grid":
        _check_grid(at, sweep)
    return sweep


@dataclass(frozen=True)
class _Place:
    """A mapping in the file, and where it stands."""

    name: str
    value: Any

    def __truediv__(self, key: str) -> _Place:
        """The mapping below ``key``."""
        value = self.value[key]
        if not isinstance(value, dict):
            raise self.error(f"{key} must be a mapping, got {key}: {value!r}")
        return _Place(f"{self.name}: {key}" if ": " not in self.name else f"{self.name}.{key}", value)

    def error(self, message: str) -> SweepError:
        return SweepError(f"{self.name}: {message}")

    def known(self, keys: Collection[str], owner: str = "") -> None:
        """Refuse other keys."""
        for key in self.value:
            if key not in keys:
                of = f" of {owner}, which takes {', '.join(keys)}" if owner else ""
                raise self.error(f"unknown key {key!r}{of}{_did_you_mean(key, keys)}")

    def one_of(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of a few words."""
        value = self.value.get(key, default)
        if value is None and key not in self.value:
            raise self.error(f"{key} is missing: {', '.join(choices)}")
        if value not in choices:
            raise self.error(f"{key} must be one of {', '.join(choices)}, got {value!r}{_did_you_mean(value, choices)}")
        return cast(str, value)

    def text(self, key: str) -> str | None:
        """A text, if it is there."""
        return self._typed(key, str, "a text")

    def count(self, key: str) -> int | None:
        """A whole number from 1 on, if it is there."""
        value = self._typed(key, int, "a whole number")
        if value is not None and value < 1:
            raise self.error(f"{key} must be >= 1, got {value}")
        return value

    def number(self, key: str) -> float | None:
        """A finite number, if it is there."""
        value = cast("float | None", self._typed(key, (int, float), "a number"))
        if value is not None and not math.isfinite(value):
            raise self.error(f"{key} must be a finite number, got {value}")
        return value

    def flag(self, key: str) -> bool | None:
        """True or false, if it is there."""
        return self._typed(key, bool, "true or false")

    def _typed(self, key: str, kind: type[T] | tuple[type[T], ...], meant: str) -> T | None:
        if key not in self.value:
            return None
        value = self.value[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{key} must be {meant}, got {value!r}")
        return value


def _load(text: str, source: str) -> dict[Any, Any]:
    try:
        import yaml

        from metaopt.sweeps.unique_keys import UniqueKeys
    except ImportError:
        raise ImportError("sweep files need PyYAML: pip install 'metaopt[sweeps]'") from None
    try:
        value = yaml.load(text, UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SweepError(f"{source}: {where}{getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # a date that is none
        raise SweepError(f"{source}: {error}") from None
    if not isinstance(value, dict):
        got = "an empty file" if value is None else type(value).__name__
        raise SweepError(f"{source}: a sweep is a mapping (program:, method:, parameters:), got {got}")
    return value


def _metric(at: _Place) -> Metric:
    at.known(("name", "goal", "target", "impute", "impute_while_running"))
    name = at.text("name")
    if not name:
        raise at.error("name is missing")
    goal = at.one_of("goal", ("minimize", "maximize"), "minimize")
    at.one_of("impute", ("latest", "best", "worst"), "worst")
    if at.value.get("impute_while_running") is not False:
        at.one_of("impute_while_running", ("latest", "best", "worst", "false"), "false")
    return Metric(name, cast(Goal, goal), at.number("target"))


def _hyperband(at: _Place) -> Hyperband:
    at.known(("type", "min_iter", "max_iter", "s", "eta", "strict"))
    at.one_of("type", ("hyperband",))
    numbers = {key: at.count(key) for key in ("min_iter", "max_iter", "s")}
    eta = at.number("eta")
    strict = at.flag("strict")
    rule = Hyperband(**numbers, eta=3 if eta is None else eta, strict=bool(strict))
    if not rule.eta > 1:
        raise at.error(f"eta must be > 1, got {rule.eta}")
    if rule.max_iter is None and rule.min_iter is None:
        raise at.error("hyperband needs min_iter, or max_iter and s")
    if rule.max_iter is not None:
        if rule.s is None:
            raise at.error(f"max_iter needs s, the number of brackets, got max_iter={rule.max_iter} alone")
        if rule.max_iter < rule.eta:
            raise at.error(f"max_iter / eta must be >= 1, the first bracket, got {rule.max_iter} / {rule.eta}")
    return rule


def _command(at: _Place) -> tuple[str, ...]:
    command = at.value.get("command", [])
    if not isinstance(command, list) or any(isinstance(word, list | dict) or word is None for word in command):
        raise at.error(
            f"command must be a list of words, such as [python, '${{program}}', '${{args}}'], got {command!r}"
        )
    words = tuple(map(str, command))
    for word in words:
        macro = re.fullmatch(r"\$\{(.*)\}", word)
        if macro and macro[1] not in MACROS and not re.search(r"\$\{envvar:\w+\}", word):
            meant = _did_you_mean(macro[1], MACROS) or f"; there are {', '.join(MACROS)} and envvar:NAME"
            raise at.error(f"command: unknown macro {word}{meant}")
    return words


def _parameters(at: _Place) -> tuple[dict[str, Distribution], dict[str, tuple[str, ...]]]:
    """The distributions by flat name, and the keys that each name stands for."""
    found: dict[str, Distribution] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for path, distribution in _nested_parameters(at, ()):
        name = ".".join(path)
        if name in found:
            raise at.error(f"two parameters are called {name}: one with a dot in its name, one nested")
        found[name], paths[name] = distribution, path
    return found, paths


def _nested_parameters(at: _Place, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Distribution]]:
    if not at.value.get("parameters"):
        raise at.error(f"parameters is {'empty' if 'parameters' in at.value else 'missing'}")
    parameters = at / "parameters"
    for key in parameters.value:
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", key):
            hint = " (YAML reads on, off, yes and no so: put quotes around the name)" if isinstance(key, bool) else ""
            raise parameters.error(
                f"a name starts with a letter and has letters, digits and _ . - in it, got {key!r}{hint}"
            )
    for key in sorted(parameters.value):
        if not isinstance(parameters.value[key], dict):
            raise parameters.error(f"{key} must be a mapping, such as {key}: {{value: {parameters.value[key]}}}")
        one = parameters / key
        if "parameters" in one.value:
            one.known(("parameters",), "a parameter with others nested in it")
            yield from _nested_parameters(one, (*above, key))
        else:
            yield (*above, key), _distribution(one)


def _distribution(at: _Place) -> Distribution:
    given = dict(at.value)
    name = at.one_of("distribution", tuple(DISTRIBUTIONS)) if "distribution" in given else _inferred(at)
    given.pop("distribution", None)
    takes = {_KEY.get(field.name, field.name): field for field in fields(DISTRIBUTIONS[name])}  # type: ignore[arg-type]
    at.known(("distribution", *takes), name)
    for key, field in takes.items():
        if key not in given and field.default is MISSING:
            raise at.error(f"{name} needs {key}")
        if key in ("values", "probabilities"):
            if not isinstance(given[key], list):
                raise at.error(f"{key} must be a list, got {key}: {given[key]!r}")
            given[key] = tuple(given[key])
    try:
        return DISTRIBUTIONS[name](**{takes[key].name: value for key, value in given.items()})
    except ValueError as error:
        raise at.error(str(error)) from None


# The key of a file whose name a method has.
_KEY = {"choices": "values"}


def _inferred(at: _Place) -> str:
    """wandb's choice where no distribution is named."""
    keys = set(at.value)
    if "value" in keys:
        return "constant"
    if "values" in keys:
        return "categorical_w_probabilities" if "probabilities" in keys else "categorical"
    if keys == {"min", "max"}:
        whole = all(isinstance(at.value[key], int) and not isinstance(at.value[key], bool) for key in keys)
        return "int_uniform" if whole else "uniform"
    known = (
        "value",
        "values",
        "min",
        "max",
        "distribution",
        "parameters",
        "mu",
        "sigma",
        "q",
        "a",
        "b",
        "probabilities",
    )
    at.known(known)
    if not keys:
        raise at.error("empty: it needs value, values, min and max, distribution or parameters")
    for one, other in (("min", "max"), ("max", "min")):
        if keys == {one}:
            raise at.error(f"{one} needs {other}")
    raise at.error(f"{', '.join(sorted(keys))}: which distribution? Such as distribution: {_suggested(keys)}")


def _suggested(keys: set[str]) -> str:
    """The distribution that takes these keys."""
    for name, cls in DISTRIBUTIONS.items():
        if keys <= {_KEY.get(field.name, field.name) for field in fields(cls)}:  # type: ignore[arg-type]
            return name
    return "uniform"


def _check_grid(at: _Place, sweep: Sweep) -> None:
    size = 1
    for name, distribution in sweep.parameters.items():
        try:
            size *= len(distribution.values())
        except ValueError as error:
            raise at.error(f"parameters.{name}: {error}") from None
    if size > _LARGEST_GRID:
        raise at.error(f"the grid has {size:,} points, more than {_LARGEST_GRID:,}: sample it with method: random")


def _did_you_mean(word: object, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
