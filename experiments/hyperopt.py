"""The main job: RAdam's and Rprop's hyperparameters learned by gradient descent through training, on real images.

    scripts/demo                                        # digits, both optimizers, about a minute
    python -m experiments.hyperopt --optimizer rprop --task digits-convnet

Hyperparameters are learned as scalars, and as what a search cannot reach: a value per step and per parameter. They are
compared, at an equal budget of inner training steps, with random search over the same two spaces and over scalars with
a cosine schedule, and with torch's defaults. Learning starts at the middle of the ranges that the searches draw from.
Everything is judged on fresh seeds and on the test split, at the trained horizon and at twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Generator

import metaopt
from experiments.parts import figure, table
from experiments.parts.evaluation import Contender, Result, evaluate, read
from experiments.parts.running import Trial, random_search
from experiments.parts.space import RADAM, RPROP, Range, Space, draw, fill
from metaopt import PerParameter, Schedule
from metaopt.functional import Optimizer
from metaopt.tasks import Digits, NoisyQuadratic, Replicas, Task, convnet
from metaopt.tracking import JSONL

TASKS: Mapping[str, Callable[[], Task]] = {
    "digits-mlp": partial(Digits, batch_size=256),
    "digits-convnet": partial(Digits, convnet, batch_size=256),
    "quadratic": NoisyQuadratic,
}
OPTIMIZERS: Mapping[str, tuple[Callable[[], Optimizer], Space]] = {
    "radam": (metaopt.functional.radam, RADAM),
    "rprop": (metaopt.functional.rprop, RPROP),
}


@dataclass(frozen=True)
class Config:
    """Learn the hyperparameters of an optimizer through unrolled training, and compare."""

    optimizer: Literal["both", "radam", "rprop"] = "both"
    task: Literal["digits-mlp", "digits-convnet", "quadratic"] = "digits-mlp"
    steps: int = 60
    """Inner training steps: the horizon."""
    meta_steps: int = 60
    """Steps of the meta-optimizer, and trials of each random search."""
    replicas: int = 4
    """Runs per meta-step and per trial."""
    meta_lr: float = 0.1
    """Adam's learning rate in unconstrained coordinates (log lr, logit beta), annealed to 0."""
    clip: float = 1.0
    """Largest norm of a meta-gradient."""
    seeds: int = 20
    """Fresh seeds of the evaluation."""
    seed: int = 0
    out: Path = Path("runs/hyperopt")
    """Folder for record.jsonl and hyperopt.svg."""

    def __post_init__(self) -> None:
        for name in ("steps", "meta_steps", "replicas", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        for name in ("meta_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")

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


def search(config: Config, optimizer: str, space: str, cosine: bool) -> list[Trial]:
    """A random search with as many inner steps as a meta-training run takes. Runs in a process of its own."""
    torch.set_num_threads(1)
    task, (make, _) = TASKS[config.task](), OPTIMIZERS[optimizer]
    names = list(metaopt.functional.tree.Tree(task.init(None)).names)
    return random_search(
        task,
        make(),
        partial(sample, config, optimizer, names, space),
        partial(read, optimizer=optimizer, cosine_steps=config.steps if cosine else None),
        trials=config.meta_steps,
        steps=config.steps,
        replicas=config.replicas,
        seed=config.seed,
    )


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


def learn(config: Config, optimizer: str, space: str) -> tuple[dict[str, Any], metaopt.train.MetaTrainResult]:
    """Meta-train; the learned numbers and the history."""
    task, (make, _) = TASKS[config.task](), OPTIMIZERS[optimizer]
    opt = make()
    names = list(metaopt.functional.tree.Tree(task.init(None)).names)
    hyper = metaopt.Hyperparameters(opt, learn=starts(config, optimizer, names, space))
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=config.meta_lr, betas=(0.9, 0.99))
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, config.meta_steps)

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(hyper.parameters(), config.clip)

    def anneal(*_: Any) -> None:
        annealing.step()

    meta_optimizer.register_step_pre_hook(clip)
    meta_optimizer.register_step_post_hook(anneal)
    result = metaopt.meta_train(
        Replicas(task, config.replicas),
        opt,
        hyper,
        metaopt.metagrad.Unrolled(config.steps),
        meta_optimizer,
        steps=config.meta_steps,
        tracker=JSONL(config.out / "record.jsonl", optimizer=optimizer, study=f"learned {space}"),
        generator=torch.Generator().manual_seed(config.seed),
    )
    return hyper.numbers(), result


def contenders(
    config: Config, optimizer: str, searches: Mapping[str, list[Trial]], learned: Mapping[str, dict[str, Any]]
) -> Iterator[Contender]:
    """Everybody who is compared, each with the number of training runs that its hyperparameters cost."""
    cost = config.meta_steps * config.replicas
    yield Contender("torch's defaults", {})
    yield Contender("random search, scalars", searches["scalars"][0].values, trainings=cost)
    yield Contender("random search, scalars, cosine", searches["cosine"][0].values, cosine=True, trainings=cost)
    yield Contender("random search, per step and parameter", searches["schedules"][0].values, trainings=cost)
    yield Contender("learned, scalars", learned["scalars"], trainings=cost)
    yield Contender("learned, per step and parameter", learned["schedules"], trainings=cost)


def main(config: Config) -> dict[str, list[Result]]:
    """Learn, search, evaluate; print the table, save the figure and the record."""
    torch.set_num_threads(1)
    console = Console()
    record = config.out / "record.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    started = perf_counter()
    learned: dict[str, dict[str, dict[str, Any]]] = {}
    histories: dict[str, dict[str, list[dict[str, Any]]]] = {}
    results: dict[str, list[Result]] = {}
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        # The searches run in a second process while this one learns.
        searches: dict[str, dict[str, Future[list[Trial]]]] = {
            optimizer: {
                "scalars": pool.submit(search, config, optimizer, "scalars", False),
                "cosine": pool.submit(search, config, optimizer, "scalars", True),
                "schedules": pool.submit(search, config, optimizer, "schedules", False),
            }
            for optimizer in config.optimizers
        }
        for optimizer in config.optimizers:
            learned[optimizer], histories[optimizer] = {}, {}
            for space in ("scalars", "schedules"):
                console.print(f"[bold]{optimizer}[/]: learning {table.SPACES[space]} through {config.steps} steps")
                learned[optimizer][space], result = learn(config, optimizer, space)
                histories[optimizer][space] = result.history
        console.print("waiting for the random searches, then evaluating on fresh seeds")
        for optimizer in config.optimizers:
            task, (make, _) = TASKS[config.task](), OPTIMIZERS[optimizer]
            found = {name: future.result() for name, future in searches[optimizer].items()}
            for name, trials in found.items():
                tracker = JSONL(record, optimizer=optimizer, study=f"random search {name}")
                for rank, trial in enumerate(trials):
                    tracker.log(asdict(trial), rank)
            results[optimizer] = [
                evaluate(task, make(), optimizer, contender, config.steps, config.seeds)
                for contender in contenders(config, optimizer, found, learned[optimizer])
            ]
            tracker = JSONL(record, optimizer=optimizer, study="evaluation")
            for row, judged in enumerate(results[optimizer]):
                tracker.log(table.as_record(judged), row)
    print()
    Console(width=max(console.width, table.WIDTH)).print(table.make(results, config.steps, config.seeds))
    path = figure.save(config.out / "hyperopt.svg", results, histories)
    console.print(f"{perf_counter() - started:.0f} s; figure in {path}, record in {record}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
