"""Meta-gradients by evolution strategies: unbiased for the smoothed meta-loss, whatever that is made of.

estimator = metaopt.metagrad.ES(steps=100, std=0.1, pairs=32)
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.evolution import Evolution
from metaopt.metagrad.objective import Objective, check_objective
from metaopt.metagrad.pairs import Pairs
from metaopt.metagrad.perturbation import check_perturbation
from metaopt.tasks import Task, TaskBatch


class ES(Evolution):
    """Antithetic evolution strategies over the whole horizon.

    Estimates the gradient of ``E_e[L(hyper + e)]``, ``e ~ N(0, std^2)`` in hyper's unconstrained parameters, by

        g = 1 / (2 N std^2) sum_i e_i (L(hyper + e_i) - L(hyper - e_i))

    from N pairs. The two of a pair share initialisation, tasks and batches. Nothing is differentiated: the meta-loss
    may be an accuracy, and smoothing tames unrolls whose gradients explode. The variance grows with the number of
    learned numbers. All 2 N unrolls run at once, and take the memory of as many sets of parameters and states.

    Args:
        steps: inner steps, the horizon T >= 1.
        std: of the perturbations, > 0.
        pairs: N >= 1.
        objective: as for `metaopt.metagrad.Unrolled`.
        compile: compile the step of all particles.

    Raises:
        TypeError: an argument that is no number, or no whole one.
        ValueError: an argument outside its range.

    Example:
        >>> import metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> loss = ES(steps=10, std=0.1, pairs=16).backward(task, opt, hyper, torch.Generator().manual_seed(0))
        >>> hyper.lr.grad.item() < 0
        True

    References:
        Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning, 2017.
        Metz et al., Understanding and Correcting Pathologies in the Training of Learned Optimizers, ICML 2019.
    """

    def __init__(
        self, steps: int, std: float, pairs: int, objective: Objective = "final", compile: bool = False
    ) -> None:
        check_objective(steps, objective)
        check_perturbation(std, pairs)
        self.steps, self.std, self.pairs, self.objective, self.compile = steps, std, pairs, objective, compile

    def __repr__(self) -> str:
        return f"ES(steps={self.steps}, std={self.std}, pairs={self.pairs}, objective={self.objective!r})"

    @torch.no_grad()
    def backward_share(
        self, rows: range, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        pairs = Pairs(
            task, opt, hyper, self.std, self.pairs, self.steps, self.objective, compile=self.compile, rows=rows
        )
        pairs.renew(generator)
        noise = pairs.perturbation.draw(generator)
        losses = pairs.run(noise, self.steps, generator)
        pairs.perturbation.deliver(noise, losses)
        return losses.mean()
