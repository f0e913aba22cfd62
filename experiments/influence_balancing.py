"""Influence balancing: a hyperparameter whose effect changes its sign with the horizon.

    s <- A s + theta v,   loss = (s[0] - 1)^2 / 2

The first ten entries of v are positive and reach s[0] soon, the others are negative and reach it late. Short windows
see the first alone and push theta the wrong way; PES, which carries influence from window to window, finds the optimum
theta = -1/6, and so do windows of 100 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

import metaopt
from experiments.parts.session import ALONE, Part, Session, Tracked
from experiments.parts.study import Finding, Study, save_figure
from metaopt.metagrad import PES, Estimator, TruncatedES, Unrolled
from metaopt.tasks.task import Values

OPTIMUM = -1.0 / 6.0
FINDS = {"TBPTT-1": False, "TBPTT-10": False, "TBPTT-100": True, "ES": False, "PES": True}


@dataclass(frozen=True)
class Config(Tracked):
    """Influence balancing by truncated backpropagation, by ES and by PES."""

    iterations: int = 3000
    """Meta-steps, of one window each."""
    lr: float = 1e-4
    """Of SGD on theta, for the loss of a step."""
    std: float = 0.1
    particles: int = 1000
    """Of ES and PES, antithetic pairs of two."""
    seed: int = 0
    quick: bool = False
    """300 iterations."""
    out: Path = Path("runs/papers/influence_balancing")

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.particles < 2 or self.particles % 2:
            raise ValueError(
                "iterations must be >= 1 and particles even, "
                f"got iterations={self.iterations} and particles={self.particles}"
            )


class LinearSystem:
    """The system as a functional optimizer, whose step does not look at a gradient.

    Its parameters are the state, and behind it a clock.
    """

    hyperparameters = ("theta",)
    defaults: Mapping[str, Any] = {"theta": 0.5}
    differentiates_gradients = False

    def __init__(self, size: int = 23, positive: int = 10) -> None:
        self.transition = 0.5 * torch.eye(size) + 0.5 * torch.diag(torch.ones(size - 1), 1)
        self.direction = torch.where(torch.arange(size) < positive, 1.0, -1.0)

    def init(self, params: Tensor, **hyper: Any) -> tuple[()]:
        return ()

    def step(self, params: Tensor, grads: Any, state: Any, **hyper: Any) -> tuple[Tensor, Any]:
        moved = self.transition @ params[:-1] + hyper["theta"] * self.direction
        return torch.cat([moved, params[-1:] + 1.0]), state


class FirstEntry:
    """The task: the system starts at ones, and its first entry should stay at 1.

    Args:
        every: how often that is looked at: the study judges a window by its end.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def init(self, generator: Generator | None) -> Tensor:
        return torch.cat([torch.ones(23), torch.zeros(1)])

    def batch(self, step: int, generator: Generator | None) -> tuple[()]:
        return ()

    def loss(self, params: Tensor, batch: tuple[()], hyper: Values) -> Tensor:
        return self.meta_loss(params, hyper)

    def meta_loss(self, params: Tensor, hyper: Values) -> Tensor:
        due = (params[-1].detach() % self.every == 0).to(params)
        return due * 0.5 * (params[0] - 1.0) ** 2


class Theta(nn.Module):
    """The hyperparameter, without a domain."""

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start))

    def forward(self) -> dict[str, Tensor]:
        return {"theta": self.theta}

    def numbers(self) -> dict[str, float]:
        return {"theta": self.theta.item()}


def learn(config: Config, name: str, part: Part = ALONE) -> list[float]:
    """theta after each meta-step."""
    window = int(name.split("-")[1]) if "-" in name else 1
    steps, pairs = config.iterations * window, config.particles // 2
    estimator: Estimator
    if name == "PES":
        estimator = PES(steps, window, config.std, pairs)
    elif name == "ES":
        estimator = TruncatedES(steps, window, config.std, pairs)
    else:
        estimator = Unrolled(steps, "mean", truncation=window, carry=True)
    hyper = Theta()
    # The objective is a mean over the horizon, of which a window has its share; the study's is the loss itself.
    meta_optimizer = torch.optim.SGD(hyper.parameters(), lr=config.lr * steps)
    result = metaopt.meta_train(
        FirstEntry(every=window),
        LinearSystem(),
        hyper,
        estimator,
        meta_optimizer,
        steps=config.iterations,
        generator=torch.Generator().manual_seed(config.seed),
        progress=False,
        **part,
    )
    return [*(record["hyper"]["theta"] for record in result.history[1:]), hyper.theta.item()]


@torch.no_grad()
def loss(theta: float, steps: int = 500) -> float:
    """After an unroll."""
    opt, task = LinearSystem(), FirstEntry()
    state = task.init(None)
    for _ in range(steps):
        state, _ = opt.step(state, None, (), theta=torch.tensor(theta))
    return float(task.meta_loss(state, {}))


def run(config: Config, session: Session) -> list[Finding]:
    """Learn theta by each estimator; the optimum is a closed form."""
    if config.quick:
        config = replace(config, iterations=300, particles=100)
    paths = {
        name: learn(config, name, session.part(estimator=name))
        for name in ("TBPTT-1", "TBPTT-10", "TBPTT-100", "ES", "PES")
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, path in paths.items():
            axes.plot(path, label=name)
        axes.axhline(OPTIMUM, color="black", linestyle=":", label="optimum")
        axes.set(xlabel="meta-step", ylabel="theta", title="Influence balancing", ylim=(-1.0, 2.0))
        axes.legend()

    save_figure(config.out / "influence_balancing.svg", draw, (5, 3.2))
    ends = {name: path[-1] for name, path in paths.items()}
    return [
        *(
            Finding(
                f"loss of a 500-step unroll, {name}",
                "goes to 0" if finds else "does not",
                f"{loss(ends[name]):.2g} (theta {ends[name]:.7f})",
                abs(ends[name] - OPTIMUM) < 1e-4 if finds else loss(ends[name]) > 1.0,
            )
            for name, finds in FINDS.items()
        ),
    ]


STUDY = Study(
    "influence_balancing", "Influence balancing", "Tallec & Ollivier 2017; Vicol et al., ICML 2021", run, Config
)

if __name__ == "__main__":
    STUDY.command_line()
