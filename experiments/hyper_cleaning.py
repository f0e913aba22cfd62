"""Data hyper-cleaning: half of the training labels are wrong, and a weight for each example learns which.

    python -m experiments.hyper_cleaning                  # digits, by two estimators: about a minute
    python -m experiments.hyper_cleaning --data FOLDER    # IDX files, MNIST or Fashion-MNIST: a quarter of an hour

The inner problem is softmax regression on the weighted training examples, the outer one the loss on clean validation
examples. A weight below one half, where all of them start, flags its label as wrong. Three trainings are tested: on all
training examples (before), on those not flagged (after), and on those whose labels are right (oracle).

Source: Franceschi, Donini, Frasconi & Pontil, Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML
2017, section 5.1. There the weights lie in [0, 1], their sum is bounded, a flag is a weight of 0, and the validation
examples join the training that is tested. Here weights are sigmoids without a bound on their sum, and a little weight
decay gives the inner problem the minimum that `Implicit` asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.distributions import constraints

import metaopt
from experiments.parts.session import ALONE, Part, Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt.metagrad import Estimator, Implicit, Unrolled
from metaopt.tasks import Split, Splits, load_digits, load_idx
from metaopt.tasks.task import Values
from metaopt.unroll.plain import InnerStep

OPTIMIZER = metaopt.functional.sgd(lr=10.0, momentum=0.9, weight_decay=1e-4)
ESTIMATORS: dict[str, Callable[[int], Estimator]] = {
    "unrolled": Unrolled,
    "implicit": lambda steps: Implicit(steps, solver="cg"),
}


@dataclass(frozen=True)
class Config(Tracked):
    """Find the wrong labels of a training set by gradient descent on the validation loss."""

    quick: bool = False
    """Four meta-steps."""
    out: Path = Path("runs/papers/hyper_cleaning")
    data: Path | None = None
    """A folder of IDX files (MNIST's names); None for scikit-learn's digits: 1,000 / 397 / 400 images."""
    examples: int = 5_000
    """With --data: how many examples to train on, and as many to validate on; the paper's number."""
    flipped: float = 0.5
    """The share of training labels that are changed to another class."""
    steps: int = 200
    """Inner steps, each on all training examples."""
    meta_steps: int = 60
    meta_lr: float = 0.3
    """Of Adam, on the weights' logits."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("examples", "steps", "meta_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        if not 0 < self.flipped < 1:
            raise ValueError(f"flipped must be in (0, 1), got flipped={self.flipped}")
        if not self.meta_lr > 0:
            raise ValueError(f"meta_lr must be > 0, got meta_lr={self.meta_lr}")


class Flipped(NamedTuple):
    """Data whose training labels are partly wrong, and which of them are."""

    data: Splits
    wrong: Tensor


def load(config: Config) -> Flipped:
    """The data, inputs flattened to (n, pixels), with the labels of a random share of the training rows flipped."""
    data = load_digits() if config.data is None else _read(config.data, config.examples)
    generator = torch.Generator().manual_seed(config.seed)
    labels = data.train.labels
    classes = int(labels.max()) + 1
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: round(config.flipped * len(labels))]] = True
    others = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    # One learning rate for all data: with images of mean square norm 1 and a bias, the curvature at the start, where
    # all ten classes have p = 0.1, is at most 2 p; momentum 0.9 then allows a rate of 3.8 / 0.2.
    scale = data.train.images.flatten(1).square().sum(1).mean().sqrt()
    train, validation, test = (Split(images.flatten(1) / scale, y) for images, y in data)
    return Flipped(Splits(train._replace(labels=torch.where(wrong, others, labels)), validation, test), wrong)


def _read(folder: Path, examples: int) -> Splits:
    data = load_idx(folder, validation=examples)
    rows = len(data.train.labels)
    if examples > rows:
        raise ValueError(f"examples must be <= {(rows + examples) // 2} for this data, got examples={examples}")
    return data._replace(train=Split(*(x[:examples] for x in data.train)))


class SoftmaxRegression:
    """The inner loss weights each training example by ``hyper["weights"]``, the outer one is that of validation."""

    def __init__(self, train: Split, validation: Split) -> None:
        self.train = train
        self.validation = validation
        self.shape = (train.images.shape[1], int(validation.labels.max()) + 1)

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {"weight": torch.zeros(self.shape), "bias": torch.zeros(self.shape[1])}

    def batch(self, step: int, generator: Generator | None) -> Split:
        return self.train

    def loss(self, params: dict[str, Tensor], batch: Split, hyper: Values) -> Tensor:
        losses = nn.functional.cross_entropy(logits(params, batch.images), batch.labels, reduction="none")
        weighted: Tensor = hyper["weights"].to(losses) * losses
        return weighted.mean()

    def meta_loss(self, params: dict[str, Tensor], hyper: Values) -> Tensor:
        return nn.functional.cross_entropy(logits(params, self.validation.images), self.validation.labels)


def logits(params: dict[str, Tensor], images: Tensor) -> Tensor:
    """Shape (n, classes) for images of shape (n, pixels)."""
    return images @ params["weight"] + params["bias"]


@torch.no_grad()
def accuracy(data: Splits, kept: Tensor, steps: int) -> float:
    """On the test split, after training on these of the training examples."""
    task = SoftmaxRegression(data.train, data.validation)
    step = InnerStep(task, OPTIMIZER)
    values = {"weights": kept.float()}
    carry = step.init(values, None)
    for t in range(steps):
        carry, _ = step(carry, task.batch(t, None), values, t)
    return (logits(carry.params, data.test.images).argmax(-1) == data.test.labels).float().mean().item()


def f1(flagged: Tensor, wrong: Tensor) -> float:
    """The harmonic mean of precision and recall: 2 hits / (flagged + wrong)."""
    return 2 * (flagged & wrong).sum().item() / max(1, (flagged.sum() + wrong.sum()).item())


def clean(found: Flipped, estimator: Estimator, config: Config, part: Part = ALONE) -> Tensor:
    """The learned weights of the training examples."""
    task = SoftmaxRegression(found.data.train, found.data.validation)
    start = torch.full((len(found.wrong),), 0.5)
    hyper = metaopt.Hyperparameters(OPTIMIZER, learn={"weights": (start, constraints.unit_interval)})
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=config.meta_lr)
    steps = min(4, config.meta_steps) if config.quick else config.meta_steps
    metaopt.meta_train(task, OPTIMIZER, hyper, estimator, meta_optimizer, steps=steps, progress=False, **part)
    weights: Tensor = hyper()["weights"].detach()
    return weights


def run(config: Config, session: Session) -> list[Finding]:
    torch.set_num_threads(1)
    found = load(config)
    everything = torch.ones_like(found.wrong)
    before, oracle = (accuracy(found.data, kept, config.steps) for kept in (everything, ~found.wrong))
    findings, learned = [], {}
    for name, make in ESTIMATORS.items():
        learned[name] = weights = clean(found, make(config.steps), config, session.part(estimator=name))
        score = f1(weights < 0.5, found.wrong)
        after = accuracy(found.data, weights >= 0.5, config.steps)
        findings += [
            Finding(f"F1 of the flagged labels, {name}", "0.91 to 0.92 (MNIST)", f"{score:.3f}", score > 0.80),
            Finding(
                f"test accuracy before, after, oracle, {name}",
                "after: near the oracle's",
                f"{before:.1%}, {after:.1%}, {oracle:.1%}",
                oracle - after < after - before,
            ),
        ]
    save_figure(config.out / "hyper_cleaning.svg", lambda figure: _draw(figure, learned, found.wrong), (8.0, 3.0))
    return findings


def _draw(figure: Figure, learned: dict[str, Tensor], wrong: Tensor) -> None:
    for axes, (name, weights) in zip(figure.subplots(1, len(learned), sharey=True), learned.items(), strict=True):
        parts = [weights[~wrong].tolist(), weights[wrong].tolist()]
        axes.hist(parts, bins=20, range=(0, 1), label=["right label", "wrong label"], stacked=True)
        axes.axvline(0.5, color="0.3", linestyle=":")
        axes.set(title=f"{name}: F1 {f1(weights < 0.5, wrong):.3f}", xlabel="weight", ylabel="training examples")
        axes.legend(loc="upper center")


STUDY = Study(
    name="hyper_cleaning",
    title="Data hyper-cleaning",
    source="Franceschi et al., ICML 2017",
    run=run,
    config=Config,
)

if __name__ == "__main__":
    STUDY.command_line()
