"""A learned optimizer on random quadratics, meta-trained through truncated unrolls.

    python -m experiments.learned_quadratics        # some two minutes

Every meta-gradient is that of fresh tasks: f(x) = |W x - y|^2 in ten dimensions, W and y normal, as in the first study
of learned optimizers; windows of 20 of 200 steps.

Source: Andrychowicz et al., Learning to Learn by Gradient Descent by Gradient Descent, NeurIPS 2016, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

import metaopt
from experiments.parts.meta_optimizer import annealed_adam
from experiments.parts.session import ALONE, Part, Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt import functional
from metaopt.functional import Optimizer
from metaopt.learned import MLPOptimizer
from metaopt.metagrad import Unrolled
from metaopt.tasks import RandomQuadratics, TaskBatch, Tasks
from metaopt.unroll import InnerStep

HELD_OUT_SEED = 1_000_000
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of Adam, beside it


@dataclass(frozen=True)
class Config(Tracked):
    """Meta-train the per-parameter MLP on random quadratics."""

    meta_steps: int = 400
    steps: int = 200
    """Inner steps, the horizon."""
    truncation: int = 20
    tasks: int = 64
    """Per meta-step."""
    meta_lr: float = 3e-3
    """Adam's, annealed to 0 along a cosine."""
    clip: float = 0.1
    """Largest norm of a meta-gradient."""
    held_out: int = 512
    """Tasks of the evaluation."""
    seed: int = 0
    quick: bool = False
    """40 meta-steps through 60 steps, not compiled."""
    out: Path = Path("runs/papers/learned_quadratics")

    def __post_init__(self) -> None:
        for name in ("meta_steps", "steps", "truncation", "tasks", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        for name in ("meta_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")


FAMILY = RandomQuadratics(10, start=0.3)


@torch.no_grad()
def curve(opt: Optimizer, config: Config, lr: float | None = None) -> list[float]:
    """The mean loss of the held-out tasks before training and after each step."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    tasks = Tasks(FAMILY, FAMILY.sample(config.held_out, generator))
    step, values = InnerStep(tasks, opt), {} if lr is None else {"lr": lr}
    carry = step.init(values, generator)
    losses = [tasks.meta_loss(carry.params, {}).item()]
    for t in range(config.steps):
        carry, _ = step(carry, tasks.batch(t, generator), values, t)
        losses.append(tasks.meta_loss(carry.params, {}).item())
    return losses


def meta_train(config: Config, part: Part = ALONE) -> MLPOptimizer:
    torch.manual_seed(config.seed)
    learned = MLPOptimizer(step_scale=0.1, magnitude_scale=1.0)
    meta_optimizer, annealing = annealed_adam(learned, config.meta_lr, config.meta_steps, config.clip)
    metaopt.meta_train(
        TaskBatch(FAMILY, config.tasks),
        learned,
        learned,
        Unrolled(config.steps, "mean", truncation=config.truncation, compile=not config.quick),
        meta_optimizer,
        steps=config.meta_steps,
        generator=torch.Generator().manual_seed(config.seed),
        scheduler=annealing,
        progress=False,
        **part,
    )
    return learned


def run(config: Config, session: Session) -> list[Finding]:
    """Meta-train, and compare with Adam at its best learning rate on the same tasks."""
    torch.set_num_threads(1)
    if config.quick:
        config = replace(config, meta_steps=40, steps=60, tasks=32)
    learned = curve(meta_train(config, session.part()), config)
    adam = min((curve(functional.adam(), config, lr) for lr in RATES), key=lambda losses: losses[-1])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(learned, label="learned MLP")
        axes.plot(adam, label="Adam, best of seven rates")
        axes.set(xlabel="step", ylabel="mean loss of held-out tasks", yscale="log", title="Random quadratics")
        axes.legend()

    save_figure(config.out / "learned_quadratics.svg", draw, (5, 3.2))
    ends, ways = (learned[-1], adam[-1]), (sum(learned) / len(learned), sum(adam) / len(adam))
    better = "a learned optimizer does better than hand-designed ones"
    return [
        Finding(
            f"mean loss after {config.steps} steps, {config.meta_steps} meta-steps", better, _beside(*ends, learned[0])
        ),
        Finding("mean loss on the way", better, _beside(*ways), ways[0] < ways[1]),
    ]


def _beside(learned: float, adam: float, start: float | None = None) -> str:
    before = "" if start is None else f"{start:.1f} -> "
    return f"{before}{learned:.3f}; Adam at its best rate {adam:.3f}"


STUDY = Study(
    "learned_quadratics",
    "Learned optimizer on quadratics",
    "Andrychowicz et al., NeurIPS 2016",
    run,
    Config,
    shared=True,
)

if __name__ == "__main__":
    STUDY.command_line()
