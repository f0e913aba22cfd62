"""A learning rate for every step and every layer, learned by hypergradients through all of training.

    python -m experiments.lr_schedules

A hundred steps of SGD with momentum have a hundred learning rates for each tensor of weights: six hundred
hyperparameters, which no search reaches and one backward pass does. Nothing tells them to fall at the end.

Source: Maclaurin, Duvenaud & Adams, Gradient-Based Hyperparameter Optimization through Reversible Learning, ICML 2015:
a small network on MNIST, whose layers all take smaller steps in the last ten iterations. Ours is one on MNIST-1D, and
the graph is kept where the study runs training backwards: the gradient is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import metaopt
from experiments.parts.running import meta_losses
from experiments.parts.running import run as train
from experiments.parts.session import ALONE, Part, Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt import PerParameter, Schedule
from metaopt.tasks import MNIST1D, Replicas

CONSTANTS = (0.05, 0.1, 0.2, 0.4)  # what a schedule has to beat
FRESH = 1_000_000  # far from the seeds that are learned with


@dataclass(frozen=True)
class Config(Tracked):
    """Learn the learning rate of each step and layer on MNIST-1D."""

    quick: bool = False
    """Fifteen meta-steps of two runs each with a meta-learning rate of .15, and five fresh seeds."""
    out: Path = Path("runs/papers/lr_schedules")
    steps: int = 100
    """Inner steps, >= 30: the last 10 are compared with the fifth in the middle."""
    meta_steps: int = 50
    meta_lr: float = 0.1
    """Of RAdam, on the logarithms of the learning rates."""
    replicas: int = 4
    """Runs per meta-step."""
    start: float = 0.05
    """Every learning rate before learning."""
    seed: int = 0
    seeds: int = 20
    """Fresh seeds to judge by."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 30), ("meta_steps", 1), ("replicas", 1), ("seeds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {name}={getattr(self, name)}")
        for name in ("meta_lr", "start"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")


@dataclass(frozen=True)
class Learned:
    """Schedules by the name of their tensor, the meta-loss by meta-step."""

    schedules: dict[str, Tensor]
    losses: list[float]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The schedules of the matrices, of which the study speaks."""
        return {name: values for name, values in self.schedules.items() if name.endswith("weight")}

    @property
    def biases(self) -> dict[str, Tensor]:
        return {name: values for name, values in self.schedules.items() if name.endswith("bias")}


def network() -> nn.Module:
    """40-50-50-10 with tanh."""
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10))


TASK = MNIST1D(network, batch_size=100)
SGD = metaopt.functional.sgd(momentum=0.9)


def learn(config: Config, part: Part = ALONE) -> Learned:
    """Meta-train the schedules on the validation loss after the last step."""
    names = [name for name, _ in network().named_parameters()]
    hyper = metaopt.Hyperparameters(SGD, {"lr": PerParameter(names, Schedule(config.steps, config.start))})
    result = metaopt.meta_train(
        Replicas(TASK, config.replicas),
        SGD,
        hyper,
        metaopt.metagrad.Unrolled(config.steps),
        # beta2 = .99: with .999 RAdam would still be warming up when the meta-steps end
        metaopt.optim.RAdam(hyper.parameters(), lr=config.meta_lr, betas=(0.9, 0.99)),
        steps=config.meta_steps,
        generator=torch.Generator().manual_seed(config.seed),
        progress=False,
        **part,
    )
    return Learned({name: torch.tensor(values) for name, values in hyper.numbers()["lr"].items()}, result.losses)


def ratio(schedule: Tensor) -> float:
    """The mean learning rate of the last 10 steps by that of the fifth in the middle."""
    steps = len(schedule)
    return float(schedule[-10:].mean() / schedule[2 * steps // 5 : 3 * steps // 5].mean())


def validation_loss(lr: Any, config: Config) -> float:
    """After training, the mean over fresh seeds."""
    generator = torch.Generator().manual_seed(FRESH)
    return float(meta_losses(TASK, train(TASK, SGD, {"lr": lr}, config.steps, config.seeds, generator)).mean())


def run(config: Config, session: Session) -> list[Finding]:
    if config.quick:
        config = replace(config, meta_steps=15, meta_lr=0.15, replicas=2, seeds=5)
    learned = learn(config, session.part())
    save_figure(config.out / "lr_schedules.svg", lambda figure: _draw(figure, learned, config.start), (11.0, 3.2))
    shrunk = [
        Finding(
            f"lr of layer {layer}'s weights, last 10 steps / middle",
            "the last 10 shrink",
            f"{ratio(schedule):.2f}",
            ratio(schedule) < 0.9,
        )
        for layer, schedule in enumerate(learned.weights.values(), 1)
    ]
    biases = ", ".join(f"{ratio(schedule):.2f}" for schedule in learned.biases.values())
    values = {name: Schedule.of(schedule) for name, schedule in learned.schedules.items()}
    before, after = validation_loss(config.start, config), validation_loss(values, config)
    constant, rate = min((validation_loss(lr, config), lr) for lr in CONSTANTS)
    return [
        *shrunk,
        Finding("the same of the biases", "-", biases),
        Finding(
            "validation loss on fresh seeds, before and after", "-", f"{before:.3f} -> {after:.3f}", after < before
        ),
        Finding("the same with the best constant lr", "-", f"{constant:.3f} (lr {rate})"),
    ]


def _draw(figure: Figure, learned: Learned, start: float) -> None:
    weights, biases, losses = figure.subplots(1, 3)
    _draw_schedules(weights, learned.weights, start)
    weights.set(title="learned lr: weights", ylabel="learning rate")
    _draw_schedules(biases, learned.biases, start)
    biases.set(title="learned lr: biases")
    losses.plot(learned.losses)
    losses.set(title="meta-loss", xlabel="meta-step", ylabel="validation loss after training")


def _draw_schedules(axes: Axes, schedules: dict[str, Tensor], start: float) -> None:
    for layer, schedule in enumerate(schedules.values(), 1):
        axes.plot(schedule.tolist(), label=f"layer {layer}", drawstyle="steps-post")
    some = next(iter(schedules.values()))
    axes.axvspan(len(some) - 10, len(some), color="grey", alpha=0.15)
    axes.axhline(start, color="grey", linestyle=":", label="start")
    axes.set(xlabel="inner step", yscale="log")
    axes.legend()


STUDY = Study(
    name="lr_schedules",
    title="Learning-rate schedules",
    source="Maclaurin et al., ICML 2015; MNIST-1D as a stand-in",
    run=run,
    config=Config,
    shared=True,
)

if __name__ == "__main__":
    STUDY.command_line()
