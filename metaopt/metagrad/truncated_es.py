"""Truncated evolution strategies: biased, and here to be compared with.

estimator = metaopt.metagrad.TruncatedES(steps=1000, truncation=20, std=0.1, pairs=32)
"""

from __future__ import annotations

from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.evolution import Windowed
from metaopt.metagrad.objective import Objective, check_objective, check_truncation
from metaopt.metagrad.pairs import Pairs
from metaopt.metagrad.perturbation import check_perturbation
from metaopt.tasks import Task, TaskBatch
from metaopt.unroll.randomness import Snapshot


class TruncatedES(Windowed):
    """Evolution strategies over one window a call: what a perturbation does after its window is not seen.

    Each pair has one unroll that goes on without perturbations; in every window its two particles start from there.
    `PES` is as cheap and has no such bias, `ES` none either. After an exception in a window all unrolls start again.

    Args:
        steps: inner steps, the horizon T >= 1, after which the unrolls start again.
        truncation: steps of a window, in 1..T; the last may be shorter.
        std: of the perturbations, > 0.
        pairs: N >= 1.
        objective: as for `metaopt.metagrad.Unrolled`; each window has its share of it.
        compile: compile the step of all particles.

    Raises:
        TypeError: an argument that is no number, or no whole one.
        ValueError: an argument outside its range.

    Example:
        >>> import torch, metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> estimator = TruncatedES(steps=10, truncation=5, std=0.1, pairs=16)
        >>> loss = estimator.backward(task, opt, hyper, torch.Generator().manual_seed(0))
        >>> hyper.lr.grad.item() < 0
        True

    References:
        Vicol, Metz & Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
        Evolution Strategies, ICML 2021, algorithm 1.
    """

    def __init__(
        self,
        steps: int,
        truncation: int,
        std: float,
        pairs: int,
        objective: Objective = "mean",
        compile: bool = False,
    ) -> None:
        check_objective(steps, objective)
        check_truncation(steps, truncation)
        check_perturbation(std, pairs)
        self.steps, self.truncation, self.std, self.pairs = steps, truncation, std, pairs
        self.objective, self.compile = objective, compile

    def __repr__(self) -> str:
        return (
            f"TruncatedES(steps={self.steps}, truncation={self.truncation}, std={self.std}, pairs={self.pairs}, "
            f"objective={self.objective!r})"
        )

    def _begin(self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, rows: range) -> Pairs:
        of = (task, opt, hyper, self.std, self.pairs, self.steps, self.objective)
        return Pairs(*of, compile=self.compile, rows=rows)

    def _window(self, run: Pairs, generator: Generator | None) -> Tensor:
        noise = run.perturbation.draw(generator)
        here = Snapshot(generator)
        losses = run.run(noise, self.truncation, generator, go_on=False)
        here.restore()  # the unperturbed steps see the same batches
        run.run(run.perturbation.zeros(), self.truncation, generator)
        run.perturbation.deliver(noise, losses)
        return losses
