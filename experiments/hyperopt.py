"""The main job: RAdam's and Rprop's hyperparameters learned by gradient descent through training, on real images.

    scripts/demo                                        # digits, both optimizers, about a minute
    python -m experiments.hyperopt --optimizer rprop --task digits-convnet

Hyperparameters are learned as scalars, and as what a search cannot reach: a value per step and per parameter. They are
compared, at an equal budget of inner training steps, with random search over the same two spaces and over scalars with
a cosine schedule, and with torch's defaults. Learning starts at the middle of the ranges that the searches draw from.
Everything is judged on fresh seeds and on the test split, at the trained horizon and at twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Generator

import metaopt
from experiments.parts import figure, table
from experiments.parts.evaluation import Contender, Result, evaluate, read
from experiments.parts.meta_optimizer import annealed_adam
from experiments.parts.processes import processes
from experiments.parts.running import Trial, random_search
from experiments.parts.session import Session, Tracked, options, session
from experiments.parts.space import RADAM, RPROP, Range, Space, draw, fill
from metaopt import PerParameter, Schedule
from metaopt.functional import Optimizer
from metaopt.functional.tree import Tree
from metaopt.tasks import Digits, NoisyQuadratic, Replicas, Task, convnet

TASKS: Mapping[str, Callable[[], Task]] = {
    "digits-mlp": partial(Digits, batch_size=256),
    "digits-convnet": partial(Digits, convnet, batch_size=256),
    "quadratic": NoisyQuadratic,
}
OPTIMIZERS: Mapping[str, tuple[Callable[[], Optimizer], Space]] = {
    "radam": (metaopt.functional.radam, RADAM),
    "rprop": (metaopt.functional.rprop, RPROP),
}


# name, space, and whether the learning rate falls along a cosine
SEARCHES = (
    ("random search, scalars", "scalars", False),
    ("random search, scalars, cosine", "scalars", True),
    ("random search, per step and parameter", "schedules", False),
)
LEARNED = (("learned, scalars", "scalars"), ("learned, per step and parameter", "schedules"))


@dataclass(frozen=True)
class Config(Tracked):
    """Learn the hyperparameters of an optimizer through unrolled training, and compare."""

    optimizer: Literal["both", "radam", "rprop"] = "both"
    task: Literal["digits-mlp", "digits-convnet", "quadratic"] = "digits-mlp"
    steps: int = 60
    """Inner training steps: the horizon."""
    meta_steps: int = 60
    """Steps of the meta-optimizer, and trials of each random search."""
    replicas: int = 3
    """Runs per meta-step and per trial."""
    meta_lr: float = 0.1
    """Adam's learning rate in unconstrained coordinates (log lr, logit beta), annealed to 0."""
    clip: float = 1.0
    """Largest norm of a meta-gradient."""
    seeds: int = 20
    """Fresh seeds of the evaluation."""
    seed: int = 0
    out: Path = Path("runs/hyperopt")
    """Folder for hyperopt.svg, config.yaml, record.jsonl, checkpoints and wandb's files."""

    def __post_init__(self) -> None:
        for name in ("steps", "meta_steps", "replicas", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        for name in ("meta_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")

    @property
    def trainings(self) -> int:
        """Training runs that a search or a meta-training run may spend."""
        return self.meta_steps * self.replicas

    @property
    def optimizers(self) -> tuple[str, ...]:
        return tuple(OPTIMIZERS) if self.optimizer == "both" else (self.optimizer,)


def spread(optimizer: str, names: list[str], steps: int, key: str, value: Callable[[], float]) -> Any:
    """A learning rate per step and per parameter, all else being scalar.

    Rprop's lr is its initial step size, of which there is one per parameter; its largest step size, per step and per
    parameter, is what limits a step as a learning rate does.
    """
    if key == {"radam": "lr", "rprop": "step_sizes[1]"}[optimizer]:
        return {name: [value() for _ in range(steps)] for name in names}
    if key == "lr":
        return {name: value() for name in names}
    return value()


def sample(config: Config, optimizer: str, names: list[str], space: str, generator: Generator) -> dict[str, Any]:
    """One draw for a random search: over the scalars, or over a value per step and per parameter."""
    _, ranges = OPTIMIZERS[optimizer]

    def make(key: str, part: Range) -> Any:
        value = partial(draw, part, generator)
        return value() if space == "scalars" else spread(optimizer, names, config.steps, key, value)

    return fill(ranges, make)


def judge(config: Config, optimizer: str, contender: Contender) -> Result:
    """Train and test a contender on fresh seeds."""
    task, (make, _) = TASKS[config.task](), OPTIMIZERS[optimizer]
    return evaluate(task, make(), optimizer, contender, config.steps, config.seeds)


def search(config: Config, optimizer: str, name: str, space: str, cosine: bool) -> tuple[list[Trial], Result]:
    """A random search with as many inner steps as a meta-training run takes; its trials, and its best one judged."""
    task, (make, _) = TASKS[config.task](), OPTIMIZERS[optimizer]
    trials = random_search(
        task,
        make(),
        partial(sample, config, optimizer, Tree(task.init(None)).names, space),
        partial(read, optimizer=optimizer, cosine_steps=config.steps if cosine else None),
        trials=config.meta_steps,
        steps=config.steps,
        replicas=config.replicas,
        seed=config.seed,
    )
    return trials, judge(config, optimizer, Contender(name, trials[0].values, cosine, config.trainings))


def starts(config: Config, optimizer: str, names: list[str], space: str) -> dict[str, Any]:
    """Where learning starts: the middle of every range."""
    _, ranges = OPTIMIZERS[optimizer]

    def make(key: str, part: Range) -> Any:
        middle = part.at(0.5)
        value = middle if space == "scalars" else spread(optimizer, names, config.steps, key, lambda: middle)
        if not isinstance(value, dict):
            return value
        scheduled = isinstance(value[names[0]], list)
        return PerParameter(names, Schedule(config.steps, middle) if scheduled else middle)

    return fill(ranges, make)


def learn(
    config: Config, run: Session, optimizer: str, name: str, space: str
) -> tuple[list[dict[str, Any]], Contender]:
    """Meta-train; the history, and what was learned."""
    task, (make, _) = TASKS[config.task](), OPTIMIZERS[optimizer]
    opt, names = make(), Tree(task.init(None)).names
    hyper = metaopt.Hyperparameters(opt, learn=starts(config, optimizer, names, space))
    meta_optimizer, annealing = annealed_adam(hyper, config.meta_lr, config.meta_steps, config.clip, betas=(0.9, 0.99))
    result = metaopt.meta_train(
        Replicas(task, config.replicas),
        opt,
        hyper,
        metaopt.metagrad.Unrolled(config.steps),
        meta_optimizer,
        steps=config.meta_steps,
        generator=torch.Generator().manual_seed(config.seed),
        scheduler=annealing,
        **run.part(optimizer=optimizer, study=name),
    )
    return result.history, Contender(name, hyper.numbers(), trainings=config.trainings)


def main(config: Config) -> dict[str, list[Result]]:
    """Learn, search, evaluate; print the table, save the figure and the record."""
    torch.set_num_threads(1)
    started = perf_counter()
    with processes() as ranks, session(config, "hyperopt") as run:
        if not ranks.first:  # it shares in the learning alone
            for optimizer in config.optimizers:
                for name, space in LEARNED:
                    learn(config, run, optimizer, name, space)
            return {}
        results, histories = compared(config, run)
    print()
    console = Console()
    Console(width=max(console.width, table.WIDTH)).print(table.make(results, config.steps, config.seeds))
    path = figure.save(config.out / "hyperopt.svg", results, histories)
    console.print(f"{perf_counter() - started:.0f} s; figure in {path}, record in {config.out / 'record.jsonl'}")
    return results


def compared(
    config: Config, run: Session
) -> tuple[dict[str, list[Result]], dict[str, dict[str, list[dict[str, Any]]]]]:
    """Results and histories by optimizer; the searches run in a second process while this one learns."""
    console = Console()
    histories: dict[str, dict[str, list[dict[str, Any]]]] = {}
    results: dict[str, list[Result]] = {}
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        defaults = {
            optimizer: pool.submit(judge, config, optimizer, Contender("torch's defaults", {}))
            for optimizer in config.optimizers
        }
        searches = {
            optimizer: [pool.submit(search, config, optimizer, *search_of) for search_of in SEARCHES]
            for optimizer in config.optimizers
        }
        learned: dict[str, list[Result]] = {}
        for optimizer in config.optimizers:
            histories[optimizer], learned[optimizer] = {}, []
            for name, space in LEARNED:
                console.print(f"[bold]{optimizer}[/], {name}: through {config.steps} steps of training")
                histories[optimizer][name], contender = learn(config, run, optimizer, name, space)
                learned[optimizer].append(judge(config, optimizer, contender))
        console.print("waiting for the random searches")
        for optimizer in config.optimizers:
            found = [future.result() for future in searches[optimizer]]
            results[optimizer] = [defaults[optimizer].result(), *(best for _, best in found), *learned[optimizer]]
            for trials, best in found:
                log(run, optimizer, best.contender.name, [asdict(trial) for trial in trials])
            log(run, optimizer, "evaluation", [table.as_record(judged) for judged in results[optimizer]])
    return results, histories


def log(run: Session, optimizer: str, study: str, rows: list[dict[str, Any]]) -> None:
    """Rows that are there once and for all."""
    tracker = run.tracker.scope(optimizer=optimizer, study=study)
    tracker.rewind(0)  # a run that was resumed may have logged them before
    for number, row in enumerate(rows):
        tracker.log(row, number)


if __name__ == "__main__":
    main(options(Config, __doc__))
