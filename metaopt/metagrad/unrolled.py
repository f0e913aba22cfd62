"""Meta-gradients by differentiating through the unrolled inner loop.

estimator = metaopt.metagrad.Unrolled(steps=60)
meta_optimizer.zero_grad()
meta_loss = estimator.backward(task, opt, hyper, generator)
meta_optimizer.step()
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.estimator import Leaves
from metaopt.tasks import Task
from metaopt.unroll.plain import Carry, InnerStep, cut

Objective = Literal["final", "mean", "inner"]


class Unrolled:
    """Reverse-mode differentiation of the whole inner loop: exact, with memory that grows with the horizon.

    Args:
        steps: inner steps, the horizon T >= 1.
        objective: ``"final"`` is ``meta_loss(params_T)``; ``"mean"`` the mean over t = 1..T of ``meta_loss(params_t)``;
            ``"inner"`` the mean over t = 0..T-1 of the inner losses ``loss(params_t, batch_t)``.
        truncation: cut the graph every so many steps, and add up the gradients of the windows: less memory and tamer
            gradients, at the price of a bias. The last window is shorter where it does not divide ``steps``. With
            ``"final"`` only the last window has an objective. None for no cuts.
        segments: not available yet.
        compile: not available yet.

    Raises:
        ValueError: ``steps`` below 1, an unknown objective, ``truncation`` outside 1..steps, or an option that is not
            available yet.

    Example:
        >>> import metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> loss = Unrolled(steps=10).backward(task, opt, hyper, torch.Generator().manual_seed(0))
        >>> hyper.lr.grad.item() < 0
        True

    References:
        Maclaurin et al., Gradient-Based Hyperparameter Optimization through Reversible Learning, ICML 2015.
        Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML 2017.
    """

    def __init__(
        self,
        steps: int,
        objective: Objective = "final",
        truncation: int | None = None,
        segments: int | Literal["sqrt"] | None = None,
        compile: bool = False,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got steps={steps}")
        if objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {get_args(Objective)}, got objective={objective!r}")
        if truncation is not None and not 1 <= truncation <= steps:
            raise ValueError(f"truncation must be in 1..steps ({steps}), got truncation={truncation}")
        if segments is not None:
            raise ValueError(f"segments={segments!r} is not available in this version; use segments=None")
        if compile:
            raise ValueError("compile=True is not available in this version; use compile=False")
        self.steps = steps
        self.objective = objective
        self.truncation = truncation

    def __repr__(self) -> str:
        return f"Unrolled(steps={self.steps}, objective={self.objective!r}, truncation={self.truncation})"

    def backward(self, task: Task, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None) -> Tensor:
        """Accumulate the hypergradient into ``.grad`` of hyper's parameters, and return the meta-loss.

        Args:
            task: what is learned on; `metaopt.tasks.Replicas` of one for several runs at once.
            opt: the inner optimizer.
            hyper: a module whose call returns a mapping of values, such as `metaopt.Hyperparameters`.
            generator: for the task's randomness; None is torch's default generator.

        Returns:
            The meta-loss, 0-d and detached.

        Raises:
            ValueError: a learned value on which the meta-loss does not depend. No ``.grad`` has been touched then.
        """
        leaves = Leaves(hyper)
        step = InnerStep(task, opt)
        total: Tensor | None = None
        window = self.truncation or self.steps
        with torch.enable_grad():
            carry = step.init(leaves.values, generator)
            for start in range(0, self.steps, window):
                stop = min(start + window, self.steps)
                if start:
                    carry = cut(carry)
                carry, objective = self._run(step, carry, leaves.values, range(start, stop), generator)
                if objective is not None:
                    leaves.add(objective)
                    total = objective.detach() if total is None else total + objective.detach()
        leaves.deliver()
        assert total is not None
        return total

    def _run(
        self, step: InnerStep, carry: Carry, values: dict[str, Any], window: range, generator: Generator | None
    ) -> tuple[Carry, Tensor | None]:
        """Run a window; its share of the objective, None if it has none."""
        everything = step.complete(values)
        final_here = self.objective == "final" and window.stop == self.steps
        terms: list[Tensor] = []
        with torch.set_grad_enabled(self.objective != "final" or final_here):
            for t in window:
                batch = step.task.batch(t, generator)
                if self.objective == "inner":
                    carry, loss = step.with_loss(carry, batch, values, t)
                    terms.append(loss / self.steps)
                else:
                    carry, _ = step(carry, batch, values, t)
                if self.objective == "mean":
                    terms.append(step.task.meta_loss(carry.params, everything) / self.steps)
            if final_here:
                terms.append(step.task.meta_loss(carry.params, everything))
        return carry, torch.stack(terms).sum() if terms else None
