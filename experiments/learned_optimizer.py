"""A learned optimizer: meta-trained through training on MNIST-1D, and compared with what it should beat.

    python -m experiments.learned_optimizer                         # meta-trains the MLP: some seven minutes
    python -m experiments.learned_optimizer --design lstm
    torchrun --standalone --nproc-per-node 4 -m experiments.learned_optimizer --replicas 8
    python -m experiments.learned_optimizer --shipped mlp-mnist1d   # only compares the weights that come with metaopt

It is compared with SGD, Adam, RAdam and Rprop, each at the best of 15 learning rates, on held-out seeds: on the task
that it was trained on, on longer horizons, on other widths and depths, and on another data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

import metaopt
from experiments.parts.meta_optimizer import annealed_adam
from experiments.parts.processes import processes
from experiments.parts.session import ALONE, Session, Tracked, options, session
from experiments.parts.study import save_figure
from experiments.parts.tuning import HAND_DESIGNED, Trained, judged, tuned
from metaopt.learned import AdafactorMLPOptimizer, LearnedOptimizer, LSTMOptimizer, MLPOptimizer
from metaopt.metagrad import PES, Estimator, Ranks, Unrolled
from metaopt.tasks import MNIST1D, Classification, Replicas, load_digits

# Scales with which an untrained step is small beside the weights of a network, and a trained one need not be.
DESIGNS: Mapping[str, Callable[[], LearnedOptimizer]] = {
    "mlp": partial(MLPOptimizer, step_scale=0.02, magnitude_scale=1.0),
    "adafactor": partial(AdafactorMLPOptimizer, step_scale=0.02, magnitude_scale=1.0),
    "lstm": partial(LSTMOptimizer, output_scale=0.02),
}


def network(*widths: int, inputs: int = 40) -> nn.Module:
    """Dense layers with tanh, to 10 classes."""
    sizes = (inputs, *widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes, widths, strict=False):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


ESTIMATORS: Mapping[str, Callable[[int], Estimator]] = {
    "unrolled": lambda horizon: Unrolled(horizon, "inner"),
    "truncated": lambda horizon: Unrolled(horizon, "inner", truncation=max(1, horizon // 5), carry=True),
    "pes": lambda horizon: PES(horizon, max(1, horizon // 5), std=0.01, pairs=16, objective="inner"),
}
# Shares of the meta-steps, and the horizons that they unroll as shares of the trained one: short ones first, through
# which gradients are tame.
CURRICULUM = ((0.25, 0.2), (0.3, 0.5), (0.45, 1.0))


@dataclass(frozen=True)
class Config(Tracked):
    """Meta-train a learned optimizer on MNIST-1D, or take one that is shipped, and compare it."""

    design: Literal["mlp", "lstm", "adafactor"] = "mlp"
    shipped: str | None = None
    """Name of shipped weights to compare, in place of meta-training."""
    estimator: Literal["unrolled", "truncated", "pes"] = "unrolled"
    """Through the whole horizon; in windows of a fifth of it; or PES in such windows, 16 pairs."""
    horizon: int = 100
    """Inner steps."""
    batch_size: int = 50
    meta_steps: int = 400
    replicas: int = 4
    """Runs per meta-gradient."""
    meta_lr: float = 3e-3
    """Adam's, annealed to 0 along a cosine."""
    clip: float = 0.5
    """Largest norm of a meta-gradient."""
    seeds: int = 20
    """Held-out seeds of the comparison."""
    tuning_seeds: int = 3
    """Seeds on which the learning rates of the others are tuned."""
    seed: int = 0
    out: Path = Path("runs/learned_optimizer")

    def __post_init__(self) -> None:
        for name in ("horizon", "batch_size", "meta_steps", "replicas", "seeds", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        for name in ("meta_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")


def meta_train(
    config: Config, learned: LearnedOptimizer, console: Console, run: Session | None = None
) -> list[dict[str, Any]]:
    """Through the curriculum; what was logged at each meta-step."""
    task = Replicas(MNIST1D(partial(network, 50), config.batch_size), config.replicas)
    meta_optimizer, annealing = annealed_adam(learned, config.meta_lr, config.meta_steps, config.clip)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, Any]] = []
    for share, part in CURRICULUM:
        horizon, steps = max(1, round(part * config.horizon)), max(1, round(share * config.meta_steps))
        console.print(f"{steps} meta-steps through {horizon} steps")
        # The mean of the inner losses: with the last alone, what is learned is better on this task and worse elsewhere.
        estimator = ESTIMATORS[config.estimator](horizon)
        result = metaopt.meta_train(
            task,
            learned,
            learned,
            estimator,
            meta_optimizer,
            steps,
            generator=generator,
            scheduler=annealing,
            **(ALONE if run is None else run.part(stage=f"{horizon} steps")),
        )
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


def hand_designed(config: Config, scenario: str, name: str) -> Trained:
    """One of the others, at its best learning rate in a scenario."""
    torch.set_num_threads(1)
    task, steps = scenarios(config)[scenario]
    return tuned(task, name, steps, config.seeds, config.tuning_seeds)


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
    first = Ranks().first  # of the processes that learn together: it alone compares
    # The others are tuned in a second process while this one learns.
    with session(config, "learned_optimizer") as run, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        others = {
            scenario: [pool.submit(hand_designed, config, scenario, name) for name in HAND_DESIGNED]
            for scenario in (scenarios(config) if first else ())
        }
        if config.shipped is None:
            torch.manual_seed(config.seed)
            learned = DESIGNS[config.design]()
            meta_train(config, learned, console, run)
            if first:
                path = metaopt.learned.save(learned, config.out / f"{config.design}.safetensors")
                console.print(f"meta-training: {perf_counter() - started:.0f} s; weights in {path}")
        else:
            learned = metaopt.learned.load(config.shipped)
        if not first:
            return {}
        found = {}
        for scenario, (task, steps) in scenarios(config).items():
            own = judged(task, learned, f"learned, {learned.architecture}", None, steps, config.seeds)
            found[scenario] = [own, *(other.result() for other in others[scenario])]
        run.tracker.artifact(
            "evaluation", {scenario: {each.name: each.mean for each in rows} for scenario, rows in found.items()}
        )
    shown = table(config, found)
    Console(width=max(console.width, 170)).print(shown)
    save_figure(config.out / "learned_optimizer.svg", partial(draw, found), (14, 6))
    console.print(f"{perf_counter() - started:.0f} s; figure in {config.out}")
    return found


if __name__ == "__main__":
    with processes():
        main(options(Config, __doc__))
