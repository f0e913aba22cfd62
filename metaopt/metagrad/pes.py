"""Meta-gradients by persistent evolution strategies: truncated, and unbiased all the same.

estimator = metaopt.metagrad.PES(steps=1000, truncation=20, std=0.1, pairs=32)
"""

from __future__ import annotations

from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.evolution import Windowed
from metaopt.metagrad.objective import Objective, check_objective, check_truncation
from metaopt.metagrad.pairs import Pairs
from metaopt.metagrad.perturbation import check_perturbation
from metaopt.tasks import Task, TaskBatch


class PES(Windowed):
    """Persistent evolution strategies: one window of the unrolls a call, new perturbations in every window.

    A pair keeps its two unrolls between calls, and the sum ``xi`` of the perturbations that they have seen:

        g = 1 / (2 N std^2) sum_i xi_i (L_window(hyper + e_i) - L_window(hyper - e_i)),    xi_i <- xi_i + e_i

    The estimates of all windows of an unroll add up to an unbiased one for the smoothed objective of the whole
    horizon: no truncation bias, an update every ``truncation`` steps, and a variance that grows with the number of
    windows behind. An unroll that has reached the horizon starts again; all do after an exception in a window.

    Args:
        steps: inner steps, the horizon T >= 1.
        truncation: steps of a window, in 1..T; the last may be shorter.
        std: of the perturbations, > 0.
        pairs: N >= 1.
        objective: as for `metaopt.metagrad.Unrolled`; each window has its share of it.
        stagger: spread the pairs over the horizon, so that every estimate sees early and late steps: the first unroll
            of a pair is cut short. ``truncation`` must divide ``steps``.
        compile: compile the step of all particles.

    Raises:
        TypeError: an argument that is no number, or no whole one.
        ValueError: an argument outside its range.

    Example:
        >>> import torch, metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> estimator = PES(steps=10, truncation=5, std=0.1, pairs=16)
        >>> generator = torch.Generator().manual_seed(0)
        >>> losses = [estimator.backward(task, opt, hyper, generator) for window in range(2)]
        >>> hyper.lr.grad.item() < 0
        True

    References:
        Vicol, Metz & Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
        Evolution Strategies, ICML 2021, algorithm 2.
    """

    def __init__(
        self,
        steps: int,
        truncation: int,
        std: float,
        pairs: int,
        objective: Objective = "mean",
        stagger: bool = False,
        compile: bool = False,
    ) -> None:
        check_objective(steps, objective)
        check_truncation(steps, truncation)
        check_perturbation(std, pairs)
        if stagger and steps % truncation:
            raise ValueError(f"stagger=True needs a truncation that divides steps={steps}, got truncation={truncation}")
        self.steps, self.truncation, self.std, self.pairs = steps, truncation, std, pairs
        self.objective, self.stagger, self.compile = objective, stagger, compile

    def __repr__(self) -> str:
        return (
            f"PES(steps={self.steps}, truncation={self.truncation}, std={self.std}, pairs={self.pairs}, "
            f"objective={self.objective!r}{', stagger=True' if self.stagger else ''})"
        )

    def _begin(self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, rows: range) -> Pairs:
        windows = self.steps // self.truncation
        missing = [self.truncation * (index % windows) if self.stagger else 0 for index in range(self.pairs)]
        ends = [self.steps - cut for cut in missing]
        of = (task, opt, hyper, self.std, self.pairs, self.steps, self.objective)
        return Pairs(*of, compile=self.compile, ends=ends, rows=rows)

    def _window(self, run: Pairs, generator: Generator | None) -> Tensor:
        noise = run.perturbation.draw(generator)
        losses = run.run(noise, self.truncation, generator)
        run.perturbation.deliver(run.seen, losses)
        return losses
