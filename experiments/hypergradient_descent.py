"""A learning rate that learns while the model trains: from a poor one to nearly what the best one reaches.

    python -m experiments.hypergradient_descent

Each step moves the learning rate by the product of two consecutive gradients (SGD-HD), or of the gradient and Adam's
last direction (Adam-HD): it grows while they agree. The rule is additive, so the learning rate itself is the parameter
of `Rate`, its meta-optimizer is SGD, and the gradient is that of `metaopt.metagrad.Online`.

Source: Baydin, Cornish, Martínez Rubio, Schmidt & Wood, Online Learning Rate Adaptation with Hypergradient Descent,
ICLR 2018: MNIST and CIFAR-10, where the loss from an untuned learning rate comes near that of a tuned one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import metaopt
from experiments.parts.rate import Rate
from experiments.parts.running import meta_losses
from experiments.parts.running import run as train
from experiments.parts.session import Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt import tracking
from metaopt.functional import Optimizer
from metaopt.tasks import Digits
from metaopt.tracking import Run


@dataclass(frozen=True)
class Method:
    """An optimizer, and what is tried with it.

    Attributes:
        opt: the optimizer.
        poor: where the learning rate starts.
        meta_lr: of hypergradient descent, the best of its powers of ten; a tenth and ten times that are reported too.
        rates: constant ones, of which the best is the tuned one.
    """

    opt: Optimizer
    poor: float
    meta_lr: float
    rates: tuple[float, ...]


METHODS = {
    "SGD": Method(metaopt.functional.sgd(), 0.01, 0.1, (0.03, 0.1, 0.3, 0.6, 1.0, 2.0)),
    "Adam": Method(metaopt.functional.adam(), 1e-4, 1e-4, (0.001, 0.003, 0.01, 0.03, 0.1)),
}


@dataclass(frozen=True)
class Config(Tracked):
    """SGD and Adam with hypergradient descent on digits, from a poor learning rate."""

    quick: bool = False
    """150 steps, one seed, one meta-learning rate, and constant rates near the best alone."""
    out: Path = Path("runs/papers/hypergradient_descent")
    steps: int = 300
    seeds: int = 3
    seed: int = 0
    """The first of the seeds."""

    def __post_init__(self) -> None:
        for name in ("steps", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")


@dataclass(frozen=True)
class Training:
    """Of one run, after each step: the learning rate and the validation loss."""

    rates: list[float]
    losses: list[float]


def descend(method: Method, meta_lr: float, steps: int, seed: int, tracker: Run | None = None) -> Training:
    """Train once, the learning rate starting at the poor one and learning on the way."""
    task, hyper, online = Digits(), Rate(method.poor), metaopt.metagrad.Online(steps)
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=meta_lr)
    training = Training([], [])

    def record(*_: object) -> None:
        training.rates.append(hyper.lr.item())
        training.losses.append(task.meta_loss(online.params, {}).item())

    meta_optimizer.register_step_post_hook(record)
    generator = torch.Generator().manual_seed(seed)
    metaopt.meta_train(
        task, method.opt, hyper, online, meta_optimizer, steps, tracker=tracker, generator=generator, progress=False
    )
    return training


def constant(method: Method, lr: float, config: Config) -> list[float]:
    """The mean validation loss over seeds after each step at a constant learning rate."""
    losses: list[Tensor] = []
    task, generator = Digits(), torch.Generator().manual_seed(config.seed)
    keep = lambda params: losses.append(meta_losses(task, params).mean())  # noqa: E731
    train(task, method.opt, {"lr": lr}, config.steps, config.seeds, generator, keep)
    return torch.stack(losses[1:]).tolist()


@dataclass(frozen=True)
class Comparison:
    """What one optimizer did.

    Attributes:
        poor: validation losses at the constant rate that hypergradient descent starts from.
        tuned: the same at the best constant rate, which is ``best``.
        learned: by meta-learning rate, a training per seed; the method's own is the first.
    """

    best: float
    poor: list[float]
    tuned: list[float]
    learned: dict[float, list[Training]]

    def final(self, meta_lr: float) -> float:
        """The mean last loss over seeds."""
        return fmean(training.losses[-1] for training in self.learned[meta_lr])


def compare(method: Method, config: Config, tracker: Run | None = None) -> Comparison:
    seeds = range(config.seed, config.seed + config.seeds)
    meta_lrs = [method.meta_lr] if config.quick else [method.meta_lr, 0.1 * method.meta_lr, 10 * method.meta_lr]
    rates = method.rates[-3:] if config.quick else method.rates
    constants = {lr: constant(method, lr, config) for lr in rates}
    best = min(constants, key=lambda lr: constants[lr][-1])
    tracker = tracking.complete(tracker)
    learned = {
        beta: [
            descend(method, beta, config.steps, seed, tracker.scope(beta=f"{beta:g}", seed=str(seed))) for seed in seeds
        ]
        for beta in meta_lrs
    }
    return Comparison(best, constant(method, method.poor, config), constants[best], learned)


def run(config: Config, session: Session) -> list[Finding]:
    if config.quick:
        config = replace(config, steps=150, seeds=1)
    found = {name: compare(method, config, session.tracker.scope(optimizer=name)) for name, method in METHODS.items()}
    save_figure(config.out / "hypergradient_descent.svg", lambda figure: _draw(figure, found), (8.0, 6.0))
    return [finding for name, comparison in found.items() for finding in _findings(name, comparison)]


def _findings(name: str, comparison: Comparison) -> list[Finding]:
    poor, tuned, best = comparison.poor[-1], comparison.tuned[-1], comparison.best
    start, meta_lr = METHODS[name].poor, METHODS[name].meta_lr
    reached = comparison.final(meta_lr)
    share = (poor - reached) / (poor - tuned)
    findings = [
        Finding(
            f"validation loss, {name}-HD from lr {start:g}",
            "near that of the tuned lr",
            f"{reached:.3f}; constant {start:g}: {poor:.3f}, tuned {best:g}: {tuned:.3f}; {share:.1%} of the way",
            share > 0.95,
        )
    ]
    others = [beta for beta in comparison.learned if beta != meta_lr]
    if others:
        measured = ", ".join(f"{comparison.final(beta):.3f} (beta {beta:g})" for beta in sorted(others))
        findings.append(Finding(f"the same, beta other than {meta_lr:g}", "-", measured))
    return findings


def _draw(figure: Figure, found: Mapping[str, Comparison]) -> None:
    for (name, comparison), (rates, losses) in zip(found.items(), figure.subplots(len(found), 2), strict=True):
        for beta in sorted(comparison.learned):
            rates.plot(comparison.learned[beta][0].rates, label=f"{name}-HD, beta {beta:g}")
        rates.axhline(comparison.best, color="grey", linestyle=":", label="best constant")
        rates.set(title=f"{name}-HD: learning rate", xlabel="step", yscale="log")
        rates.legend()
        _draw_losses(losses, name, comparison)


def _draw_losses(axes: Axes, name: str, comparison: Comparison) -> None:
    start, meta_lr = METHODS[name].poor, METHODS[name].meta_lr
    mean = torch.tensor([training.losses for training in comparison.learned[meta_lr]]).mean(0)
    axes.plot(comparison.poor, label=f"constant lr {start:g}")
    axes.plot(mean.tolist(), label=f"{name}-HD from {start:g}")
    axes.plot(comparison.tuned, label=f"constant lr {comparison.best:g}")
    axes.set(title=f"{name}: validation loss", xlabel="step", yscale="log")
    axes.legend()


STUDY = Study(
    name="hypergradient_descent",
    title="Hypergradient descent",
    source="Baydin et al., ICLR 2018; digits as a stand-in",
    run=run,
    config=Config,
)

if __name__ == "__main__":
    STUDY.command_line()
