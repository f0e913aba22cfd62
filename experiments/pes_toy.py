"""The 2-d toy regression of PES: a learning-rate schedule whose good values only a long view finds.

    f(x) = sqrt(x0^2 + 5) - sqrt(5) + sin(x1)^2 exp(-5 x0^2) + |x1 - 100| / 4,     x from (1, 1)
    lr_t = exp(th0) (T - t) / T + exp(th1) t / T

Windows of 10 of the 100 steps see the small hill that sin^2 makes where x0 is 0, and not what lies behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

import metaopt
from experiments.parts.session import ALONE, Part, Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt.metagrad import PES, Estimator, TruncatedES, Unrolled
from metaopt.tasks.task import Values

STEPS, WINDOW = 100, 10


@dataclass(frozen=True)
class Config(Tracked):
    """The 2-d toy problem by PES, truncated ES and truncated backpropagation."""

    iterations: int = 4500
    """Meta-steps, of one window each."""
    particles: int = 128
    """Of PES and ES, antithetic pairs of two."""
    std: float = 0.2
    meta_lr: float = 1e-3
    """Of Adam."""
    seeds: int = 4
    """Of PES, whose end differs from seed to seed."""
    quick: bool = False
    """100 iterations of one seed."""
    out: Path = Path("runs/papers/pes_toy")

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.seeds < 1 or self.particles < 2 or self.particles % 2:
            raise ValueError(
                "iterations and seeds must be >= 1 and particles even, "
                f"got iterations={self.iterations}, seeds={self.seeds} and particles={self.particles}"
            )


class Toy:
    """The function, without noise."""

    def init(self, generator: Generator | None) -> Tensor:
        return torch.ones(2)

    def batch(self, step: int, generator: Generator | None) -> tuple[()]:
        return ()

    def loss(self, params: Tensor, batch: tuple[()], hyper: Values) -> Tensor:
        return self.meta_loss(params, hyper)

    def meta_loss(self, params: Tensor, hyper: Values) -> Tensor:
        x0, x1 = params.unbind()
        hill = torch.sin(x1) ** 2 * torch.exp(-5.0 * x0**2)
        value: Tensor = hill + torch.sqrt(x0**2 + 5.0) - math.sqrt(5.0) + 0.25 * torch.abs(x1 - 100.0)
        return value


class LinearInTime(nn.Module):
    """The schedule between two learned learning rates."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = nn.Parameter(torch.zeros(2))

    def forward(self) -> dict[str, metaopt.Schedule]:
        first, last = self.ends.exp().unbind()
        share = torch.arange(STEPS) / STEPS
        return {"lr": metaopt.Schedule.of(first * (1.0 - share) + last * share)}

    def numbers(self) -> dict[str, list[float]]:
        """The learned numbers, logarithms of the two."""
        return {"ends": self.ends.tolist()}


@torch.no_grad()
def total(ends: list[float]) -> float:
    """The sum of the losses after each step of training, by the logarithms of the first and the last rate."""
    hyper = LinearInTime()
    hyper.ends.copy_(torch.tensor(ends))
    task, opt, lr = Toy(), metaopt.functional.sgd(), hyper()["lr"]
    params = task.init(None)
    state = opt.init(params)
    losses = 0.0
    for t in range(STEPS):
        grads = torch.func.grad(task.meta_loss)(params, {})
        params, state = opt.step(params, grads, state, lr=lr(t))
        losses += task.meta_loss(params, {}).item()
    return losses


def estimator(name: str, config: Config) -> Estimator:
    pairs = config.particles // 2
    if name == "PES":
        return PES(STEPS, WINDOW, config.std, pairs, compile=True)
    if name == "ES":
        return TruncatedES(STEPS, WINDOW, config.std, pairs, compile=True)
    return Unrolled(STEPS, "mean", truncation=WINDOW, carry=True)


def learn(config: Config, name: str, seed: int = 0, every: int = 50, part: Part = ALONE) -> list[tuple[int, float]]:
    """The total loss of training after some of the meta-steps."""
    hyper = LinearInTime()
    result = metaopt.meta_train(
        TASK,
        OPT,
        hyper,
        estimator(name, config),
        torch.optim.Adam(hyper.parameters(), lr=config.meta_lr),
        steps=config.iterations,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
        **part,
    )
    ends = [*(record["hyper"]["ends"] for record in result.history), hyper.ends.tolist()]
    return [(done, total(ends[done])) for done in sorted({*range(0, config.iterations, every), config.iterations})]


TASK, OPT = Toy(), metaopt.functional.sgd()


def run(config: Config, session: Session) -> list[Finding]:
    """Learn the schedule by each estimator."""
    if config.quick:
        config = replace(config, iterations=100, seeds=1)
    paths = {name: [learn(config, name, part=session.part(estimator=name))] for name in ("TBPTT", "ES")}
    paths["PES"] = [
        learn(config, "PES", seed, part=session.part(estimator="PES", seed=str(seed))) for seed in range(config.seeds)
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for color, (name, runs) in enumerate(paths.items()):
            for index, path in enumerate(runs):
                axes.plot(*zip(*path, strict=True), f"C{color}", label=None if index else name)
        axes.set(xlabel="meta-step", ylabel="sum of the losses", title="2-d toy problem of PES")
        axes.legend()

    save_figure(config.out / "pes_toy.svg", draw, (5, 3.2))
    start = paths["PES"][0][0][1]
    ends = {name: [path[-1][1] for path in runs] for name, runs in paths.items()}
    mean = sum(ends["PES"]) / config.seeds
    after = f"at {config.iterations} iterations"
    reached = (
        f"{start:.1f} -> {mean:.1f}, mean of {min(ends['PES']):.1f} to {max(ends['PES']):.1f} ({config.seeds} seeds)"
    )
    return [
        Finding(f"sum of the losses {after}, PES", "2423.5 -> 602.4", reached, mean < 610),
        *(
            Finding(f"the same, {name} in windows of 10", "stays", f"{start:.1f} -> {end:.1f}", end > 2000)
            for name in ("TBPTT", "ES")
            for end in ends[name]
        ),
    ]


STUDY = Study("pes_toy", "2-d toy problem of PES", "Vicol et al., ICML 2021", run, Config)

if __name__ == "__main__":
    STUDY.command_line()
