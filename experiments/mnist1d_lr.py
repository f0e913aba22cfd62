"""A learning rate meta-learned on MNIST-1D, from far too high and far too low.

    python -m experiments.mnist1d_lr

Two hundred steps of SGD are differentiated from end to end; the meta-loss is the mean of the losses on the way. Plain
gradient descent on the learning rate itself takes it to the same place from either side.

Source: Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D, ICML 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import metaopt
from experiments.parts.rate import Rate
from experiments.parts.session import ALONE, Part, Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt.tasks import MNIST1D, mlp1d

STARTS = (1.5, 0.15)


@dataclass(frozen=True)
class Config(Tracked):
    """Meta-learn the learning rate of SGD on MNIST-1D."""

    quick: bool = False
    """Ten meta-steps with a meta-learning rate of 1."""
    out: Path = Path("runs/papers/mnist1d_lr")
    steps: int = 200
    """Inner steps."""
    meta_steps: int = 50
    meta_lr: float = 0.3
    seed: int = 0
    """Of the network's weights, the same in every meta-step; the batches come in order."""

    def __post_init__(self) -> None:
        for name in ("steps", "meta_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        if not 0 < self.meta_lr < float("inf"):
            raise ValueError(f"meta_lr must be > 0, got meta_lr={self.meta_lr}")


@dataclass(frozen=True)
class Descent:
    """Of a run, by meta-step: the learning rate, one value more than there are steps, and the meta-loss."""

    rates: list[float]
    losses: list[float]


def descend(start: float, config: Config, part: Part = ALONE) -> Descent:
    """Meta-learn the learning rate from one start."""

    def network() -> nn.Module:
        torch.manual_seed(config.seed)  # the study's runs share their weights; the task restores the global seed
        return mlp1d()

    task = MNIST1D(network, batch_size=50, order="sequential", validation=0)
    hyper = Rate(start)
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=config.meta_lr)
    result = metaopt.meta_train(
        task,
        metaopt.functional.sgd(),
        hyper,
        metaopt.metagrad.Unrolled(config.steps, objective="inner"),
        meta_optimizer,
        steps=config.meta_steps,
        progress=False,
        **part,
    )
    return Descent([*(record["hyper"]["lr"] for record in result.history), hyper.lr.item()], result.losses)


def run(config: Config, session: Session) -> list[Finding]:
    if config.quick:
        config = replace(config, meta_steps=10, meta_lr=1.0)
    descents = {start: descend(start, config, session.part(start=f"{start:g}")) for start in STARTS}
    save_figure(config.out / "mnist1d_lr.svg", lambda figure: _draw(figure, descents), (8.0, 3.2))
    learned = [
        Finding(
            f"lr learned from {start}",
            "about 0.62",
            f"{descent.rates[-1]:.4f}",
            abs(descent.rates[-1] - 0.62) < (0.02 if config.quick else 0.01),
        )
        for start, descent in descents.items()
    ]
    before, after = descents[1.5].losses[0], descents[1.5].losses[-1]
    loss = Finding("mean loss of 200 steps, from 1.5", "-", f"{before:.3f} -> {after:.3f}", after < 1.72)
    return [*learned, loss]


def _draw(figure: Figure, descents: dict[float, Descent]) -> None:
    rates, losses = figure.subplots(1, 2)
    for start, descent in descents.items():
        rates.plot(descent.rates, label=f"from {start}")
        losses.plot(descent.losses, label=f"from {start}")
    rates.axhline(0.62, color="grey", linestyle=":", label="published: 0.62")
    rates.set(title="learning rate", xlabel="meta-step")
    losses.set(title="meta-loss: mean of the training losses", xlabel="meta-step")
    rates.legend()
    losses.legend()


STUDY = Study(
    name="mnist1d_lr",
    title="Meta-learned lr on MNIST-1D",
    source="Greydanus & Kobak, ICML 2024",
    run=run,
    config=Config,
)

if __name__ == "__main__":
    STUDY.command_line()
