"""Each distribution against its definition in wandb's documentation, written with SciPy."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import optuna
import pytest
from scipy import stats

from metaopt.sweeps import parse
from metaopt.sweeps.distributions import DISTRIBUTIONS

SAMPLES = 10_000
SEED = 1
SIGNIFICANT = 1e-3
SWEEP = """
program: train.py
method: random
parameters:
  constant: {distribution: constant, value: [1, 2]}
  categorical: {values: [a, b, c]}
  doubled: {values: [a, b, a, c]}
  alike: {values: [1, 1.0, true, [1], {one: 1}, null]}
  categorical_w_probabilities: {values: [a, b, c, [d]], probabilities: [0.5, 0, 0.125, 0.375]}
  int_uniform: {min: -2, max: 5}
  uniform: {min: -1.0, max: 2}
  q_uniform: {distribution: q_uniform, min: 0, max: 10, q: 2}
  log_uniform: {distribution: log_uniform, min: -3, max: 2}
  log_uniform_values: {distribution: log_uniform_values, min: 0.001, max: 10}
  q_log_uniform: {distribution: q_log_uniform, min: 0, max: 3.5}
  q_log_uniform_values: {distribution: q_log_uniform_values, min: 1, max: 30, q: 0.5}
  inv_log_uniform: {distribution: inv_log_uniform, min: -1, max: 4}
  inv_log_uniform_values: {distribution: inv_log_uniform_values, min: 0.1, max: 5}
  normal: {distribution: normal, mu: 2, sigma: 0.5}
  q_normal: {distribution: q_normal, mu: 1.0, sigma: 2, q: 0.25}
  log_normal: {distribution: log_normal, mu: -1, sigma: 1.5}
  q_log_normal: {distribution: q_log_normal, mu: 1, sigma: 1}
  beta: {distribution: beta, a: 2, b: 5}
  q_beta: {distribution: q_beta, a: 0.5, b: 2, q: 0.1}
"""

Cdf = Callable[[Any], Any]


def log_uniform(least: float, greatest: float) -> Cdf:
    """log X uniform between two numbers."""
    return lambda x: stats.uniform(least, greatest - least).cdf(np.log(np.maximum(x, 1e-300)))


def inv_log_uniform(least: float, greatest: float) -> Cdf:
    """log(1 / X) uniform between two numbers."""
    return lambda x: stats.uniform(least, greatest - least).sf(np.log(1 / np.asarray(x)))


CONTINUOUS: dict[str, Cdf] = {
    "uniform": stats.uniform(-1, 3).cdf,
    "log_uniform": log_uniform(-3, 2),
    "log_uniform_values": log_uniform(math.log(0.001), math.log(10)),
    "inv_log_uniform": inv_log_uniform(-1, 4),
    "inv_log_uniform_values": inv_log_uniform(math.log(1 / 5), math.log(1 / 0.1)),
    "normal": stats.norm(2, 0.5).cdf,
    "log_normal": stats.lognorm(s=1.5, scale=math.exp(-1)).cdf,
    "beta": stats.beta(2, 5).cdf,
}
QUANTIZED: dict[str, tuple[Cdf, float]] = {
    "q_uniform": (stats.uniform(0, 10).cdf, 2),
    "q_log_uniform": (log_uniform(0, 3.5), 1),
    "q_log_uniform_values": (log_uniform(0, math.log(30)), 0.5),
    "q_normal": (stats.norm(1, 2).cdf, 0.25),
    "q_log_normal": (stats.lognorm(s=1, scale=math.e).cdf, 1),
    "q_beta": (stats.beta(0.5, 2).cdf, 0.1),
}
DISCRETE: dict[str, dict[str, float]] = {
    "constant": {"[1, 2]": 1},
    "categorical": {"'a'": 1 / 3, "'b'": 1 / 3, "'c'": 1 / 3},
    "doubled": {"'a'": 1 / 2, "'b'": 1 / 4, "'c'": 1 / 4},
    "alike": dict.fromkeys(["1", "1.0", "True", "[1]", "{'one': 1}", "None"], 1 / 6),
    "categorical_w_probabilities": {"'a'": 0.5, "'b'": 0, "'c'": 0.125, "['d']": 0.375},
    "int_uniform": {str(k): 1 / 8 for k in range(-2, 6)},
}

# What could be taken for the right thing. Each must be told apart by the test that the right one passes.
WRONG_CONTINUOUS: dict[str, Cdf] = {
    "uniform": stats.uniform(-1, 2.9).cdf,
    "log_uniform": stats.uniform(-3, 5).cdf,
    "log_uniform_values": stats.uniform(0.001, 10).cdf,
    "inv_log_uniform": log_uniform(-1, 4),
    "inv_log_uniform_values": stats.uniform(0.1, 4.9).cdf,
    "normal": stats.norm(2, 0.25).cdf,
    "log_normal": stats.norm(-1, 1.5).cdf,
    "beta": stats.beta(5, 2).cdf,
}
WRONG_QUANTIZED: dict[str, tuple[Cdf, float]] = {
    "q_uniform": (stats.uniform(-1, 12).cdf, 2),  # as probable at the ends as between them
    "q_log_uniform": (stats.uniform(1, math.exp(3.5) - 1).cdf, 1),
    "q_log_uniform_values": (log_uniform(0.05, math.log(30)), 0.5),
    "q_normal": (stats.norm(1.125, 2).cdf, 0.25),  # rounded down
    "q_log_normal": (stats.lognorm(s=1, scale=1).cdf, 1),
    "q_beta": (stats.beta(2, 0.5).cdf, 0.1),
}
WRONG_DISCRETE: dict[str, dict[str, float]] = {
    "categorical": {"'a'": 0.4, "'b'": 0.3, "'c'": 0.3},
    "doubled": {"'a'": 1 / 3, "'b'": 1 / 3, "'c'": 1 / 3},
    "alike": dict.fromkeys(["1", "[1]", "{'one': 1}", "None"], 1 / 4),
    "categorical_w_probabilities": {"'a'": 0.25, "'b'": 0.25, "'c'": 0.25, "['d']": 0.25},
    "int_uniform": {str(k): 1 / 7 for k in range(-2, 5)},
}


class RandomTrial:
    """Optuna's random draws, without a study that keeps them: three times as fast."""

    def __init__(self, seed: int) -> None:
        self._sampler: Any = optuna.samplers.RandomSampler(seed=seed)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> Any:
        return self._draw(name, optuna.distributions.FloatDistribution(low, high, log=log))

    def suggest_int(self, name: str, low: int, high: int) -> Any:
        return self._draw(name, optuna.distributions.IntDistribution(low, high))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._draw(name, optuna.distributions.CategoricalDistribution(choices))

    def _draw(self, name: str, distribution: Any) -> Any:
        return self._sampler.sample_independent(None, None, name, distribution)


@pytest.fixture(scope="module")
def samples() -> dict[str, list[Any]]:
    """What 10,000 trials get. Every parameter is drawn by a sampler of its own."""
    return {
        name: [distribution.suggest(trial, name) for _ in range(SAMPLES)]
        for seed, (name, distribution) in enumerate(parse(SWEEP).parameters.items(), SEED)
        for trial in [cast(optuna.trial.BaseTrial, RandomTrial(seed))]
    }


def p_continuous(values: list[float], cdf: Cdf) -> float:
    return float(stats.kstest(values, cdf).pvalue)


def p_discrete(counts: dict[Any, int], expected: dict[Any, float]) -> float:
    """Chi-square; what is expected less than five times is put together."""
    if any(counts[key] and not expected.get(key) for key in counts):
        return 0.0
    often = {key for key, p in expected.items() if p * SAMPLES >= 5}
    seen = [counts.get(key, 0) for key in often]
    hoped = [expected[key] * SAMPLES for key in often]
    if SAMPLES - sum(hoped) > 1:
        seen.append(SAMPLES - sum(seen))
        hoped.append(SAMPLES - sum(hoped))
    return float(stats.chisquare(seen, np.multiply(hoped, SAMPLES / sum(hoped))).pvalue) if len(seen) > 1 else 1.0


def p_quantized(values: list[float], cdf: Cdf, q: float) -> float:
    """round(X / q) is k where X lies between (k - 1/2) q and (k + 1/2) q."""
    places = np.asarray(values) / q
    assert np.allclose(places, np.round(places))
    counts = Counter(np.round(places).astype(int).tolist())
    chance = {k: float(cdf((k + 0.5) * q) - cdf((k - 0.5) * q)) for k in range(min(counts) - 5, max(counts) + 6)}
    return p_discrete(counts, chance)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_continuous_distribution_is_the_one_defined(samples: dict[str, list[Any]], name: str) -> None:
    assert p_continuous(samples[name], CONTINUOUS[name]) > SIGNIFICANT
    assert p_continuous(samples[name], WRONG_CONTINUOUS[name]) < SIGNIFICANT


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_distribution_is_the_one_defined(samples: dict[str, list[Any]], name: str) -> None:
    assert p_quantized(samples[name], *QUANTIZED[name]) > SIGNIFICANT
    assert p_quantized(samples[name], *WRONG_QUANTIZED[name]) < SIGNIFICANT


@pytest.mark.parametrize("name", DISCRETE)
def test_a_discrete_distribution_is_the_one_defined(samples: dict[str, list[Any]], name: str) -> None:
    counts = Counter(map(repr, samples[name]))
    assert p_discrete(counts, DISCRETE[name]) > SIGNIFICANT
    if name in WRONG_DISCRETE:
        assert p_discrete(counts, WRONG_DISCRETE[name]) < SIGNIFICANT


def test_every_distribution_is_tested() -> None:
    assert set(DISTRIBUTIONS) <= {*CONTINUOUS, *QUANTIZED, *DISCRETE}


@pytest.mark.parametrize(("name", "kind"), [("q_uniform", int), ("q_log_normal", int), ("q_normal", float)])
def test_a_quantized_value_is_whole_if_q_is(samples: dict[str, list[Any]], name: str, kind: type) -> None:
    assert {type(value) for value in samples[name]} == {kind}


def test_optuna_knows_a_value_by_its_parameter_and_what_it_is_computed_from_by_another_name() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    values = parse(SWEEP).suggest(trial)
    shared = {name for name in values if name in trial.params}
    assert shared == {
        *("categorical", "alike", "int_uniform", "uniform", "log_uniform", "log_uniform_values"),
        *("inv_log_uniform", "inv_log_uniform_values"),
    }
    assert all(trial.params[name] == values[name] for name in shared - {"alike"})
    assert set(trial.params) - shared == {
        *("doubled/quantile", "categorical_w_probabilities/quantile", "normal/quantile", "log_normal/quantile"),
        *("beta/quantile", "q_uniform/unrounded", "q_log_uniform/unrounded", "q_log_uniform_values/unrounded"),
        *("q_normal/unrounded/quantile", "q_log_normal/unrounded/quantile", "q_beta/unrounded/quantile"),
    }


@pytest.mark.parametrize("end", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("name", ["normal", "log_normal", "beta", "q_normal"])
def test_a_sampler_that_goes_to_the_ends_gets_finite_numbers(name: str, end: float) -> None:
    inner = "q_normal/unrounded/quantile" if name == "q_normal" else f"{name}/quantile"
    value = parse(SWEEP).parameters[name].suggest(optuna.trial.FixedTrial({inner: end}), name)
    assert math.isfinite(value)


def test_a_crashed_trial_is_drawn_again_as_it_was() -> None:
    sweep = parse(SWEEP)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    first = study.ask()
    values = sweep.suggest(first)
    study.enqueue_trial(first.params)
    assert sweep.suggest(study.ask()) == values
