"""A learned optimizer: meta-trained through training on MNIST-1D, and compared with what it should beat.

    python -m experiments.learned_optimizer                         # meta-trains the MLP: ten minutes on two cores
    python -m experiments.learned_optimizer --design lstm
    python -m experiments.learned_optimizer --shipped mlp-mnist1d   # only compares the weights that come with metaopt

It is compared with SGD, Adam, RAdam and Rprop, each at the best of 15 learning rates, on held-out seeds: on the task
that it was trained on, on longer horizons, on other widths and depths, and on another data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

import metaopt
from experiments.parts.study import save_figure
from experiments.parts.tuning import HAND_DESIGNED, Trained, judged, tuned
from metaopt.metagrad import Unrolled
from metaopt.metagrad.objective import Objective
from metaopt.tasks import MNIST1D, Classification, Replicas, load_digits

DESIGNS: Mapping[str, Callable[[], Any]] = {
    "mlp": metaopt.learned.MLPOptimizer,
    "lstm": metaopt.learned.LSTMOptimizer,
    "adafactor": metaopt.learned.AdafactorMLPOptimizer,
}


def network(*widths: int, inputs: int = 40) -> nn.Module:
    """Dense layers with tanh, to 10 classes."""
    sizes = (inputs, *widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes, widths, strict=False):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        share: of the meta-steps.
        horizon: of the unrolls, as a share of the trained one.
        objective: what is minimised over them.
    """

    share: float
    horizon: float
    objective: Objective


CURRICULUM = (Stage(0.2, 0.2, "mean"), Stage(0.3, 0.5, "mean"), Stage(0.5, 1.0, "mean"))


@dataclass(frozen=True)
class Config:
    """Meta-train a learned optimizer on MNIST-1D, or take one that is shipped, and compare it."""

    design: Literal["mlp", "lstm", "adafactor"] = "mlp"
    shipped: str | None = None
    """Name of shipped weights to compare, in place of meta-training."""
    horizon: int = 100
    """Inner steps."""
    batch_size: int = 50
    meta_steps: int = 400
    replicas: int = 4
    """Runs per meta-gradient."""
    meta_lr: float = 3e-3
    """Adam's, annealed to 0 along a cosine."""
    clip: float = 1.0
    """Largest norm of a meta-gradient."""
    seeds: int = 20
    """Held-out seeds of the comparison."""
    tuning_seeds: int = 3
    """Seeds on which the learning rates of the others are tuned."""
    seed: int = 0
    out: Path = Path("runs/learned_optimizer")
    """Folder for the weights, the record and the figure."""

    def __post_init__(self) -> None:
        for name in ("horizon", "batch_size", "meta_steps", "replicas", "seeds", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        for name in ("meta_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")


def meta_train(config: Config, learned: Any, console: Console) -> list[dict[str, Any]]:
    """Through the curriculum; what was logged at each meta-step."""
    task = Replicas(MNIST1D(partial(network, 50), config.batch_size), config.replicas)
    meta_optimizer = torch.optim.Adam(learned.parameters(), lr=config.meta_lr)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, config.meta_steps)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(learned.parameters(), config.clip, error_if_nonfinite=True)

    meta_optimizer.register_step_pre_hook(clip)
    meta_optimizer.register_step_post_hook(lambda *_: anneal.step())
    generator = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, Any]] = []
    for stage in CURRICULUM:
        horizon = max(1, round(stage.horizon * config.horizon))
        steps = max(1, round(stage.share * config.meta_steps))
        estimator = Unrolled(horizon, stage.objective, segments="sqrt", compile=True)
        console.print(f"{steps} meta-steps through {horizon} steps, {stage.objective} loss")
        result = metaopt.meta_train(task, learned, learned, estimator, meta_optimizer, steps=steps, generator=generator)
        history += result.history
    return history


def scenarios(config: Config) -> dict[str, tuple[Any, int]]:
    """Tasks with their horizons: the one that was trained on first."""
    trained_on = MNIST1D(partial(network, 50), config.batch_size)
    return {
        "trained on": (trained_on, config.horizon),
        "2 times the horizon": (trained_on, 2 * config.horizon),
        "5 times the horizon": (trained_on, 5 * config.horizon),
        "width 16": (MNIST1D(partial(network, 16), config.batch_size), config.horizon),
        "width 200": (MNIST1D(partial(network, 200), config.batch_size), config.horizon),
        "three hidden layers": (MNIST1D(partial(network, 50, 50, 50), config.batch_size), config.horizon),
        "digits": (Classification(load_digits(), partial(network, 50, inputs=64), config.batch_size), config.horizon),
    }


def compare(config: Config, learned: Any) -> dict[str, list[Trained]]:
    """The learned optimizer, then the others at their best learning rates, in each scenario."""
    found = {}
    for name, (task, steps) in scenarios(config).items():
        own = judged(task, learned, f"learned, {config.design}", None, steps, config.seeds)
        others = [tuned(task, other, steps, config.seeds, config.tuning_seeds) for other in HAND_DESIGNED]
        found[name] = [own, *others]
    return found


def table(config: Config, found: Mapping[str, list[Trained]]) -> Table:
    """Test losses; the best of the others, and whether the learned optimizer is below it by more than the error."""
    names = ["learned", *HAND_DESIGNED]
    shown = Table("scenario", *names, "verdict", title=f"Test loss, mean ± standard error of {config.seeds} seeds")
    for scenario, rows in found.items():
        own, best = rows[0], min(rows[1:], key=lambda row: row.mean)
        error = (own.error**2 + best.error**2) ** 0.5
        verdict = "wins" if own.mean < best.mean - error else "loses" if own.mean > best.mean + error else "even"
        cells = [f"{row.mean:.3f} ± {row.error:.3f}" + (f" ({row.lr:.2g})" if row.lr else "") for row in rows]
        shown.add_row(scenario, *cells, verdict)
    return shown


def draw(found: Mapping[str, list[Trained]], figure: Figure) -> None:
    """Validation loss during training, mean and the band of one standard deviation over seeds."""
    panels = figure.subplots(2, 4).flatten()
    for axes, (scenario, rows) in zip(panels, found.items(), strict=False):
        for row in rows:
            mean, deviation = row.curve.mean(1), row.curve.std(1)
            axes.plot(mean, label=row.name)
            axes.fill_between(range(len(mean)), mean - deviation, mean + deviation, alpha=0.2)
        axes.set(title=scenario, xlabel="step", ylabel="validation loss", ylim=(0, 2.5))
    panels[0].legend()
    panels[-1].axis("off")


def main(config: Config) -> dict[str, list[Trained]]:
    """Meta-train, save, compare; print the table and save the figure."""
    torch.set_num_threads(1)
    console = Console()
    started = perf_counter()
    if config.shipped is None:
        torch.manual_seed(config.seed)
        learned = DESIGNS[config.design]()
        meta_train(config, learned, console)
        metaopt.learned.save(learned, config.out / f"{config.design}.safetensors")
        console.print(f"meta-training: {perf_counter() - started:.0f} s")
    else:
        learned = metaopt.learned.load(config.shipped)
    found = compare(config, learned)
    console.print(table(config, found))
    save_figure(config.out / "learned_optimizer.svg", partial(draw, found), (14, 6))
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
