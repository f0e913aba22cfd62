"""`measure` and `compare`: what they report of estimators whose bias and variance are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaopt import Hyperparameters
from metaopt.functional import radam, sgd
from metaopt.metagrad import ES, PES, Forward, Unrolled, compare, measure
from metaopt.tasks import NoisyQuadratic
from tests.metagrad.reference import seeded

EXACT = torch.tensor([3.0, -4.0], dtype=torch.float64)


class Known:
    """Returns a given gradient, a bias and noise of a given deviation; in windows, a part of it a call."""

    def __init__(self, bias: float = 0.0, deviation: float = 0.0, windows: int = 1) -> None:
        self.bias, self.deviation, self.windows = bias, deviation, windows

    def backward(self, task: Any, opt: Any, hyper: nn.Module, generator: Any = None) -> Tensor:
        noise = self.deviation * torch.randn(2, generator=generator, dtype=torch.float64)
        for p, g in zip(hyper.parameters(), EXACT + self.bias + noise, strict=True):
            p.grad = g / self.windows if p.grad is None else p.grad + g / self.windows
        return torch.tensor(7.0) / self.windows


def betas() -> Hyperparameters:
    return Hyperparameters(radam(), ("betas",))


def test_bias_and_deviation_are_those_of_the_estimator() -> None:
    estimators = {"exact": Known(), "biased": Known(bias=1.0), "noisy": Known(deviation=2.0)}
    comparison = compare(NoisyQuadratic(), radam(), betas(), estimators, EXACT, samples=400)
    assert comparison.bias("exact") == (0.0, 0.0)
    assert comparison.deviation("exact") == 0.0
    assert comparison.cosine("exact") == pytest.approx(1.0)
    assert comparison.bias("biased")[0] == pytest.approx(math.sqrt(2) / 5)
    distance, chance = comparison.bias("noisy")
    assert comparison.deviation("noisy") == pytest.approx(2 * math.sqrt(2) / 5, rel=0.1)
    assert chance == pytest.approx(comparison.deviation("noisy") / 20)
    assert distance < 3 * chance


def test_the_windows_of_an_estimator_are_added_up() -> None:
    record = measure(Known(windows=4), NoisyQuadratic(), radam(), betas(), samples=3)
    torch.testing.assert_close(record.gradients, EXACT.expand(3, 2))
    torch.testing.assert_close(record.losses, torch.full((3,), 7.0, dtype=torch.float64))


@pytest.mark.long
def test_real_estimators_against_a_reference() -> None:
    task, opt = NoisyQuadratic(noise=0.3), sgd(lr=0.05, momentum=0.5)
    hyper = Hyperparameters(opt, ("lr", "momentum"))
    estimators = {
        "forward": Forward(12, "mean"),
        "segments": Unrolled(12, "mean", segments=4),
        "windows": Unrolled(12, "mean", truncation=3, carry=True),
        "truncated": Unrolled(12, "mean", truncation=3),
        "ES": ES(12, 0.05, 16, "mean"),
        "PES": PES(12, 3, 0.05, 16),
    }
    comparison = compare(task, opt, hyper, estimators, Unrolled(12, "mean"), samples=20, reference_samples=80)
    for name in ("forward", "segments", "ES", "PES"):
        distance, chance = comparison.bias(name)
        assert distance < 3 * chance, name
    for name in ("windows", "truncated"):
        distance, chance = comparison.bias(name)
        assert distance > 5 * chance, name
    assert comparison.deviation("PES") < 1.5 * comparison.deviation("ES")
    torch.testing.assert_close(comparison.records["forward"].gradients, comparison.records["segments"].gradients)
    torch.testing.assert_close(comparison.records["windows"].mean, comparison.records["truncated"].mean)
    assert all(record.seconds > 0 and record.bytes > 0 for record in comparison.records.values())


def test_memory_is_that_of_tensors() -> None:
    task, opt = NoisyQuadratic(dimension=100_000), sgd(lr=0.05)
    hyper = Hyperparameters(opt, ("lr",))
    recorded = measure(Unrolled(50), task, opt, hyper, samples=1)
    forward = measure(Forward(50), task, opt, hyper, samples=1)
    assert recorded.bytes > 50 * 4 * 100_000
    assert forward.bytes < 0.25 * recorded.bytes


def test_hyper_and_estimators_are_left_as_they_were() -> None:
    task, opt, hyper = NoisyQuadratic(), sgd(lr=0.05), Hyperparameters(sgd(), ("lr",))
    kept = hyper.lr.grad = torch.tensor(5.0, dtype=torch.float64)
    estimator, untouched = PES(6, 3, 0.1, 2), PES(6, 3, 0.1, 2)
    estimator.backward(task, opt, hyper, seeded())
    untouched.backward(task, opt, hyper, seeded())
    hyper.lr.grad = kept
    compare(task, opt, hyper, {"PES": estimator}, Unrolled(6, "mean"), samples=3)
    assert hyper.lr.grad is kept
    assert estimator.backward(task, opt, hyper, seeded()) == untouched.backward(task, opt, hyper, seeded())


def test_an_error_leaves_the_grads_too() -> None:
    class Fails(Known):
        def backward(self, *args: Any, **kwargs: Any) -> Tensor:
            super().backward(*args, **kwargs)
            raise RuntimeError("here")

    hyper = betas()
    with pytest.raises(RuntimeError, match="here"):
        measure(Fails(), NoisyQuadratic(), radam(), hyper)
    assert all(p.grad is None for p in hyper.parameters())


def test_a_frozen_parameter_keeps_its_grad() -> None:
    hyper = betas()
    frozen = next(hyper.parameters())
    frozen.requires_grad_(False)
    kept = frozen.grad = torch.ones((), dtype=torch.float64)
    measure(Unrolled(3), NoisyQuadratic(), radam(), hyper, samples=1)
    assert frozen.grad is kept


def test_one_sample_says_nothing_of_chance(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    comparison = compare(NoisyQuadratic(), radam(), betas(), {"a": Known()}, EXACT, samples=1)
    assert math.isfinite(comparison.bias("a")[0])
    assert math.isnan(comparison.bias("a")[1])
    assert math.isnan(comparison.deviation("a"))
    assert not [w for w in recwarn if "degrees of freedom" in str(w.message)]
    pytest.importorskip("matplotlib")
    comparison.plot(tmp_path / "comparison.svg")


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    comparison = compare(NoisyQuadratic(), radam(), betas(), {"a": Known(), "longer": Known(1.0)}, EXACT, samples=2)
    lines = str(comparison).splitlines()
    assert [line.split()[0] for line in lines] == ["estimator", "a", "longer"]
    assert lines[2].split()[1] == "0.28"
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [row["estimator"] for row in comparison.rows()] == ["a", "longer"]
    pytest.importorskip("matplotlib")
    path = comparison.plot(tmp_path / "new" / "comparison.svg")
    assert "longer" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"estimators": {}}, "estimators must name at least one"),
        ({"samples": 2.5}, "samples must be a whole number, got samples=2.5"),
        ({"reference": Known(), "reference_samples": 0}, "samples must be >= 1, got samples=0"),
        ({"samples": 0}, "samples must be >= 1, got samples=0"),
        ({"reference": torch.ones(3)}, r"reference must have shape \(2,\), got \(3,\)"),
        ({"reference": torch.zeros(2)}, "reference must have a norm > 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"estimators": {"known": Known()}, "reference": EXACT, **arguments}
    with pytest.raises((TypeError, ValueError), match=match):
        compare(NoisyQuadratic(), radam(), betas(), **given)
