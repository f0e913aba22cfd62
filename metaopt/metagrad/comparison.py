"""Estimators of meta-gradients side by side on a task of one's own: bias, variance, time and memory.

estimators = {"unrolled": Unrolled(100), "truncated": Unrolled(100, truncation=10), "ES": ES(100, std=0.1, pairs=8)}
comparison = metaopt.metagrad.compare(task, opt, hyper, estimators, reference=Unrolled(100))
print(comparison)
comparison.plot("comparison.svg")
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Generator, Tensor, nn

from metaopt.checks import check_count
from metaopt.functional import Optimizer
from metaopt.memory import peak
from metaopt.metagrad.estimator import Estimator
from metaopt.tasks import Task, TaskBatch


@dataclass(frozen=True)
class Record:
    """Repeated estimates of one meta-gradient, and what they cost.

    An estimate is of the whole horizon: of an estimator that goes a window a call, the sum over the windows.

    Attributes:
        gradients: one row per estimate, float64 of shape (samples, D): hyper's parameters laid flat in order.
        losses: the meta-loss that came with each, shape (samples,).
        seconds: of an estimate, the median.
        bytes: the most bytes of tensors alive at once while one was made.
    """

    gradients: Tensor
    losses: Tensor
    seconds: float
    bytes: int

    @property
    def mean(self) -> Tensor:
        """Shape (D,)."""
        return self.gradients.mean(0)

    @property
    def variance(self) -> Tensor:
        """Of a single estimate, shape (D,); NaN for one sample."""
        mean = self.mean  # without the warning of Tensor.var at one sample
        return (self.gradients - mean).square().sum(0) / (len(self.gradients) - 1 or float("nan"))

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, shape (D,)."""
        return (self.variance / len(self.gradients)).sqrt()


def measure(
    estimator: Estimator,
    task: Task | TaskBatch,
    opt: Optimizer,
    hyper: nn.Module,
    samples: int = 10,
    generator: Generator | None = None,
) -> Record:
    """Repeat an estimate at the present hyperparameters, which keep their ``.grad``.

    Args:
        estimator: of the meta-gradient; it starts afresh, and is left as it was.
        task: what is learned on; its randomness differs from sample to sample.
        opt: the inner optimizer.
        hyper: a module whose call returns a mapping of values.
        samples: how many estimates, >= 1. One more is made before them, for its memory.
        generator: None is torch's default generator.

    Raises:
        ValueError: ``samples`` below 1.

    Example:
        >>> import metaopt
        >>> task, opt = metaopt.tasks.NoisyQuadratic(), metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> record = measure(metaopt.metagrad.Unrolled(5), task, opt, hyper, samples=3)
        >>> record.gradients.shape, hyper.lr.grad
        (torch.Size([3, 1]), None)
    """
    check_count("samples", samples)
    estimator = _afresh(estimator)
    parameters = [p for p in hyper.parameters() if p.requires_grad]
    kept = [(p, p.grad) for p in hyper.parameters()]
    losses: list[float] = []
    gradients: list[Tensor] = []
    seconds: list[float] = []

    def estimate() -> None:
        hyper.zero_grad()
        windows = range(getattr(estimator, "windows", 1))
        losses.append(sum(estimator.backward(task, opt, hyper, generator).item() for _ in windows))

    try:
        size = peak(estimate)
        losses.clear()
        for _ in range(samples):
            started = perf_counter()
            estimate()
            seconds.append(perf_counter() - started)
            flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            gradients.append(torch.cat([grad.flatten().to(torch.float64).cpu() for grad in flat]))
    finally:
        for p, grad in kept:
            p.grad = grad
    return Record(torch.stack(gradients), torch.tensor(losses, dtype=torch.float64), median(seconds), size)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; its text is a table.

    Attributes:
        records: by the estimators' names.
        reference: the gradient that they are compared with, shape (D,).
        reference_error: its standard error, shape (D,); 0 for an exact one, and for a single estimate.
    """

    records: Mapping[str, Record]
    reference: Tensor
    reference_error: Tensor

    def bias(self, name: str) -> tuple[float, float]:
        """Distance of the mean estimate from the reference, and the distance that chance alone would make.

        Both are relative to the reference's norm. A first number of no more than about twice the second is no evidence
        of a bias; the second is NaN for one sample.
        """
        record = self.records[name]
        distance = (record.mean - self.reference).norm()
        noise = (record.standard_error.square() + self.reference_error.square()).sum().sqrt()
        scale = self.reference.norm()
        return float(distance / scale), float(noise / scale)

    def deviation(self, name: str) -> float:
        """Standard deviation of a single estimate (root of the total variance), relative to the reference's norm."""
        return float(self.records[name].variance.sum().sqrt() / self.reference.norm())

    def cosine(self, name: str) -> float:
        """Of the angle between the mean estimate and the reference."""
        return float(torch.cosine_similarity(self.records[name].mean, self.reference, dim=0))

    def rows(self) -> list[dict[str, Any]]:
        """One row per estimator, plain numbers for JSON."""
        return [
            {
                "estimator": name,
                "bias": self.bias(name)[0],
                "bias_by_chance": self.bias(name)[1],
                "deviation": self.deviation(name),
                "cosine": self.cosine(name),
                "seconds": record.seconds,
                "bytes": record.bytes,
            }
            for name, record in self.records.items()
        ]

    def __str__(self) -> str:
        width = max(len("estimator"), *(len(name) for name in self.records))
        head = (
            f"{'estimator':{width}}  {'bias':>9} {'by chance':>9} {'deviation':>9} {'cosine':>7} {'ms':>9} {'MiB':>8}"
        )
        lines = [
            f"{row['estimator']:{width}}  {row['bias']:9.2g} {row['bias_by_chance']:9.2g} {row['deviation']:9.2g} "
            f"{row['cosine']:7.3f} {1e3 * row['seconds']:9.1f} {row['bytes'] / 2**20:8.2f}"
            for row in self.rows()
        ]
        return "\n".join([head, *lines])

    def plot(self, path: Path | str) -> Path:
        """Bias against deviation, and time against memory; saved in the format of the file's name.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plots need matplotlib: pip install 'metaopt[plots]'") from None
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        quality, cost = figure.subplots(1, 2)
        for row in self.rows():
            quality.errorbar(row["deviation"], row["bias"], yerr=row["bias_by_chance"], fmt="o", label=row["estimator"])
            cost.plot(1e3 * row["seconds"], row["bytes"] / 2**20, "o", label=row["estimator"])
        quality.set(xlabel="deviation of an estimate", ylabel="bias", title="relative to the reference's norm")
        quality.set_xscale("symlog", linthresh=1e-3)
        quality.set_yscale("symlog", linthresh=1e-3)
        cost.set(xlabel="ms", ylabel="MiB", xscale="log", yscale="log", title="cost of an estimate")
        cost.legend()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return path


def compare(
    task: Task | TaskBatch,
    opt: Optimizer,
    hyper: nn.Module,
    estimators: Mapping[str, Estimator],
    reference: Estimator | Tensor,
    samples: int = 10,
    reference_samples: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Bias, variance, time and memory of estimators on a task, at the present hyperparameters.

    Args:
        task: what is learned on.
        opt: the inner optimizer.
        hyper: a module whose call returns a mapping of values; it is not changed.
        estimators: by name.
        reference: an estimator without bias, or the meta-gradient itself: shape (D,), hyper's parameters laid flat.
        samples: estimates of each.
        reference_samples: estimates of the reference; None for as many.
        seed: of a generator for each estimator; the reference gets another.

    Raises:
        ValueError: no estimators, ``samples`` below 1, a reference of another shape or with a norm of 0.

    Example:
        >>> import metaopt
        >>> from metaopt.metagrad import ES, Unrolled
        >>> task, opt = metaopt.tasks.NoisyQuadratic(), metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> estimators = {"truncated": Unrolled(20, truncation=1), "ES": ES(20, std=0.1, pairs=8)}
        >>> comparison = compare(task, opt, hyper, estimators, reference=Unrolled(20))
        >>> comparison.bias("truncated")[0] > 0.5
        True

    References:
        Metz et al., Gradients are Not All You Need, 2021, on why both bias and variance matter.
    """
    if not estimators:
        raise ValueError("estimators must name at least one, got none")
    size = sum(p.numel() for p in hyper.parameters() if p.requires_grad)
    if isinstance(reference, Tensor):
        if reference.shape != (size,):
            raise ValueError(f"reference must have shape ({size},), got {tuple(reference.shape)}")
        exact, error = reference.detach().to(torch.float64).cpu(), torch.zeros(size, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed + 1)
        record = measure(
            reference, task, opt, hyper, samples if reference_samples is None else reference_samples, generator
        )
        exact, error = record.mean, record.standard_error.nan_to_num()
    if not exact.norm() > 0:
        raise ValueError(f"reference must have a norm > 0, to which the others are compared, got {exact.tolist()}")
    records = {
        name: measure(estimator, task, opt, hyper, samples, torch.Generator().manual_seed(seed))
        for name, estimator in estimators.items()
    }
    return Comparison(records, exact, error)


def _afresh(estimator: Estimator) -> Estimator:
    """A copy that begins a new unroll."""
    fresh = copy.copy(estimator)
    if hasattr(fresh, "reset"):
        fresh.reset()
    return fresh
