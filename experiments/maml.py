"""MAML on sinusoids: an initialisation from which one step of SGD on ten points fits a new wave; and Meta-SGD.

    python -m experiments.maml                  # both, 20,000 iterations each: some four minutes
    python -m experiments.maml --iterations 60000

MAML learns the initial weights. Meta-SGD learns a learning rate for each of them besides, of either sign.

Sources: Finn, Abbeel & Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017, section
5.1. Li, Zhou, Chen & Li, Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017, table 1, which has the
figures for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import metaopt
from experiments.parts.learned_start import FromStart, Start
from experiments.parts.session import ALONE, Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt.tasks import Sinusoids, TaskBatch, Tasks, Wave
from metaopt.unroll.plain import InnerStep

EARLY, LATE = 5_000, 20_000  # iterations at which MAML's error is known from plain torch
TEST_SEED = 1_000_000  # far from those of training
QUICK_ITERATIONS = 200
TESTED_EVERY = 1_000  # iterations


@dataclass(frozen=True)
class Config(Tracked):
    """Learn where SGD starts (MAML) and how far it steps (Meta-SGD), so that one step fits a new sinusoid."""

    quick: bool = False
    """200 iterations, not compiled: whether it learns, not how far."""
    out: Path = Path("runs/papers/maml")
    iterations: int = LATE
    """Meta-steps of each method."""
    tasks: int = 25
    """Per meta-step."""
    shots: int = 10
    """Points that a task is trained on."""
    lr: float = 0.01
    """Of the inner step; where Meta-SGD's rates begin."""
    meta_lr: float = 1e-3
    """Of Adam."""
    test_tasks: int = 2_000
    """Held-out waves."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "tasks", "shots", "test_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        for name in ("lr", "meta_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")


class Score(NamedTuple):
    """A mean over the test tasks, with half of its 95 % confidence interval."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


class Learned(NamedTuple):
    """A start, and the error after one step from it on the test tasks, by the iterations that it took."""

    hyper: Start
    scores: dict[int, Score]

    @property
    def last(self) -> Score:
        return self.scores[max(self.scores)]


@torch.no_grad()
def adapted(hyper: Start, tasks: Tasks, lr: float) -> tuple[InnerStep, Any, dict[str, Any]]:
    """One inner step of all tasks: the step, the carry after it, and the values that it read."""
    step = InnerStep(tasks, metaopt.functional.sgd(lr=lr))
    values = hyper()
    carry, _ = step(step.init(values, None), tasks.batch(0, None), values, 0)
    return step, carry, values


@torch.no_grad()
def score(hyper: Start, family: Sinusoids, waves: Wave, lr: float) -> Score:
    """The mean squared error on the query points after one step on the support points."""
    tasks = Tasks(FromStart(family, hyper), waves)
    _, carry, values = adapted(hyper, tasks, lr)
    errors: Tensor = torch.vmap(lambda wave, p: tasks.single(wave).meta_loss(p, values))(waves, carry.params)
    return Score(errors.mean().item(), 1.96 * errors.std().item() / len(errors) ** 0.5)


def learn(config: Config, session: Session | None = None, *, rates: bool) -> Learned:
    """MAML, or with a learned rate for each weight Meta-SGD; tested now and then."""
    family = Sinusoids(config.shots, queries=config.shots)
    waves = family.sample(config.test_tasks, torch.Generator().manual_seed(TEST_SEED))
    generator = torch.Generator().manual_seed(config.seed)
    hyper = Start(family.initial(generator), config.lr if rates else None)
    task = TaskBatch(FromStart(family, hyper), config.tasks)
    opt = metaopt.functional.sgd(lr=config.lr)
    estimator = metaopt.metagrad.Unrolled(steps=1, compile=not config.quick)
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=config.meta_lr)
    iterations = min(config.iterations, QUICK_ITERATIONS) if config.quick else config.iterations
    every = min(TESTED_EVERY, max(1, iterations // 10))
    scores = {0: score(hyper, family, waves, config.lr)}
    for done in range(every, iterations + 1, every):
        name = "Meta-SGD" if rates else "MAML"
        part = ALONE if session is None else session.part(method=name, iterations=str(done))
        metaopt.meta_train(
            task, opt, hyper, estimator, meta_optimizer, every, generator=generator, progress=False, **part
        )
        scores[done] = score(hyper, family, waves, config.lr)
    return Learned(hyper, scores)


def run(config: Config, session: Session) -> list[Finding]:
    torch.set_num_threads(1)
    maml, meta_sgd = learn(config, session, rates=False), learn(config, session, rates=True)
    save_figure(config.out / "maml.svg", lambda figure: _draw(figure, maml, meta_sgd, config), (10.0, 3.4))
    bounds = {EARLY: 0.70, LATE: 0.45}
    findings = [
        Finding(
            f"MSE after 1 step on {config.shots} points, MAML, {iterations:,} iterations",
            "0.77 ± 0.11 (60,000)",
            f"{maml.scores[iterations]}; below the published one, so the evaluation differs somewhere",
            maml.scores[iterations].mean < bound,
        )
        for iterations, bound in bounds.items()
        if iterations in maml.scores and not config.quick
    ]
    done = max(maml.scores)
    lower = meta_sgd.last.mean < maml.last.mean
    factor = meta_sgd.last.mean / maml.last.mean
    return [
        *findings,
        Finding(f"the same, Meta-SGD, {done:,} iterations", "0.53 ± 0.09 (60,000)", f"{meta_sgd.last}", lower),
        Finding("Meta-SGD / MAML", "0.69", f"{factor:.2f}", lower),
        Finding(
            "MAML before and after meta-training", "-", f"{maml.scores[0]} to {maml.last}",
            maml.last.mean < maml.scores[0].mean,
        ),
    ]  # fmt: skip


def _draw(figure: Figure, maml: Learned, meta_sgd: Learned, config: Config) -> None:
    curves, waves = figure.subplots(1, 2)
    for label, learned in (("MAML", maml), ("Meta-SGD", meta_sgd)):
        means, errors = zip(*learned.scores.values(), strict=True)
        curves.errorbar(list(learned.scores), means, errors, label=label, capsize=2)
    curves.axhline(0.77, color="C0", linestyle=":", label="MAML, published at 60,000")
    curves.axhline(0.53, color="C1", linestyle=":", label="Meta-SGD, published at 60,000")
    curves.set(title=f"{config.test_tasks:,} held-out waves", xlabel="iterations", ylabel="MSE after one step")
    curves.set_yscale("log")
    curves.legend()
    _draw_wave(waves, maml, meta_sgd, config)


def _draw_wave(axes: Any, maml: Learned, meta_sgd: Learned, config: Config) -> None:
    """A held-out wave, the highest of ten: what is seen of it, and what one step makes of that."""
    family = Sinusoids(config.shots, queries=1)
    waves = family.sample(10, torch.Generator().manual_seed(TEST_SEED))
    highest = waves.amplitude.argmax()
    wave = Wave(*(part[highest : highest + 1] for part in waves))
    x = torch.linspace(-5.0, 5.0, 201)[:, None]
    for label, learned in (("MAML", maml), ("Meta-SGD", meta_sgd)):
        _, carry, values = adapted(learned.hyper, Tasks(FromStart(family, learned.hyper), wave), config.lr)
        weights = {name: values["start"][name].detach() + p[0] for name, p in carry.params.items()}
        axes.plot(x, family.predict(weights, x), label=label)
    task = family.task(Wave(*(part[0] for part in wave)))
    axes.plot(x, task.wave(x), color="0.6", linestyle="--", label="a held-out wave")
    axes.plot(*task.batch(0, None), "k.", label=f"its {config.shots} points")
    axes.set(title="after one step", xlabel="x")
    axes.legend()


STUDY = Study(
    name="maml",
    title="MAML on sinusoids",
    source="Finn et al., ICML 2017; Li et al. 2017",
    run=run,
    config=Config,
    shared=True,
)

if __name__ == "__main__":
    STUDY.command_line()
