"""Rprop on the 10-5-10 encoder, 100 trainings at once, beside plain backpropagation.

    python -m experiments.rprop_encoder

Ten one-hot patterns must pass through five hidden units. The study counts the epochs (of one full-batch update each)
until every output is on the right side: above .6 where the pattern is 1, below .4 where it is 0.

Source: Riedmiller & Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm, 1993.
Its Rprop takes a step back after a change of sign; ours is torch's, iRprop-, which leaves the step out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

import metaopt
from experiments.parts.running import run as train
from experiments.parts.session import Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt.functional import Optimizer
from metaopt.tasks.task import Values

RATES = (0.5, 1.0, 1.5, 1.75, 2.0, 2.5)  # of backpropagation
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config(Tracked):
    """Epochs until the 10-5-10 encoder is learned, by Rprop and by backpropagation."""

    quick: bool = False
    """Backpropagation at a good learning rate alone, without the search for the best."""
    out: Path = Path("runs/papers/rprop_encoder")
    trials: int = 100
    """Trainings side by side, each from a start of its own."""
    epochs: int = 500
    """What is not learned by then has not converged."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trials", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")


class Encoder:
    """10-5-10 with sigmoids and biases; half the squared error, summed over patterns and outputs."""

    patterns = torch.eye(10)
    shapes = (("in", (5, 10)), ("in_bias", (5,)), ("out", (10, 5)), ("out_bias", (10,)))

    def init(self, generator: Generator | None) -> Params:
        return {name: torch.empty(shape).uniform_(-1, 1, generator=generator) for name, shape in self.shapes}

    def batch(self, step: int, generator: Generator | None) -> Tensor:
        return self.patterns

    def outputs(self, params: Params) -> Tensor:
        hidden = torch.sigmoid(self.patterns @ params["in"].T + params["in_bias"])
        return torch.sigmoid(hidden @ params["out"].T + params["out_bias"])

    def loss(self, params: Params, batch: Tensor, hyper: Values) -> Tensor:
        return 0.5 * ((self.outputs(params) - batch) ** 2).sum()

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        return self.loss(params, self.patterns, hyper)

    def learned(self, params: Params) -> Tensor:
        """Whether every output is on the right side, 0-d."""
        return ((self.outputs(params) - self.patterns).abs() < 0.4).all()


def epochs_needed(opt: Optimizer, config: Config) -> Tensor:
    """Updates until each trial has learned the patterns, shape (trials,); infinite for those that never have."""
    task, learned = Encoder(), list[Tensor]()
    generator = torch.Generator().manual_seed(config.seed)  # the same starts for every optimizer
    watch = lambda params: learned.append(torch.vmap(task.learned)(params))  # noqa: E731
    train(task, opt, {}, config.epochs, config.trials, generator, watch)
    by_epoch = torch.stack(learned)
    return torch.where(by_epoch.any(0), by_epoch.int().argmax(0).double(), torch.inf)


def mean_epochs(needed: Tensor) -> float:
    """Over the trials that converged."""
    return needed[needed.isfinite()].mean().item()


def converged(needed: Tensor) -> float:
    """The share of trials that did."""
    return needed.isfinite().double().mean().item()


def run(config: Config, session: Session) -> list[Finding]:
    rprop = epochs_needed(metaopt.functional.rprop(lr=0.1, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0)), config)
    rates = (2.0,) if config.quick else RATES
    backprop = {lr: epochs_needed(metaopt.functional.sgd(lr=lr), config) for lr in rates}
    # A rate that few trials survive looks fast on those: at least 95 in 100 must have converged.
    reliable = {lr: needed for lr, needed in backprop.items() if converged(needed) >= 0.95} or backprop
    best = min(reliable, key=lambda lr: mean_epochs(reliable[lr]))
    save_figure(config.out / "rprop_encoder.svg", lambda figure: _draw(figure, rprop, backprop), (5.0, 3.2))
    epochs, others = mean_epochs(rprop), mean_epochs(backprop[best])
    share = converged(rprop)
    return [
        Finding("epochs, Rprop", "about 30", f"{epochs:.1f} (iRprop-)", 23 <= epochs <= 27),
        Finding("trials that converge, Rprop", "-", f"{share:.0%} of {config.trials}", share >= 0.95),
        Finding("epochs, backpropagation at its best rate", "121", f"{others:.0f} (rate {best})", 100 <= others <= 150),
        Finding("backpropagation / Rprop", "about 4", f"{others / epochs:.1f}", others / epochs > 3),
    ]


def _draw(figure: Figure, rprop: Tensor, backprop: dict[float, Tensor]) -> None:
    axes = figure.subplots()
    for label, needed in {"Rprop": rprop, **{f"backprop, lr {lr}": n for lr, n in backprop.items()}}.items():
        at = needed.sort().values
        axes.step([0.0, *at.tolist()], [index / len(at) for index in range(len(at) + 1)], where="post", label=label)
    axes.set(title="10-5-10 encoder", xlabel="epochs", ylabel="trials that have converged")
    axes.legend()


STUDY = Study(
    name="rprop_encoder",
    title="Rprop on the 10-5-10 encoder",
    source="Riedmiller & Braun 1993",
    run=run,
    config=Config,
)

if __name__ == "__main__":
    STUDY.command_line()
