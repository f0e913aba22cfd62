"""Meta-gradients by differentiating through the unrolled inner loop.

estimator = metaopt.metagrad.Unrolled(steps=60)
meta_optimizer.zero_grad()
meta_loss = estimator.backward(task, opt, hyper, generator)
meta_optimizer.step()
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.estimator import Leaves
from metaopt.metagrad.objective import Objective, check_objective, whole, windows
from metaopt.tasks import Task
from metaopt.unroll.adjoint import sweep
from metaopt.unroll.dependence import dependence
from metaopt.unroll.make import make_program
from metaopt.unroll.program import Sources
from metaopt.unroll.recorded import record
from metaopt.unroll.segmented import retrace
from metaopt.unroll.stretch import Unroll, grown


class Unrolled:
    """Reverse-mode differentiation of the whole inner loop: exact, with memory that grows with the horizon.

    Args:
        steps: inner steps, the horizon T >= 1.
        objective: ``"final"`` is ``meta_loss(params_T)``; ``"mean"`` the mean over t = 1..T of ``meta_loss(params_t)``;
            ``"inner"`` the mean over t = 0..T-1 of the inner losses ``loss(params_t, batch_t)``.
        truncation: cut the graph every so many steps, and add up the gradients of the windows: less memory and tamer
            gradients, at the price of a bias. The last window is shorter where it does not divide ``steps``. With
            ``"final"`` only the last window has an objective. None for no cuts.
        segments: keep the carry (parameters and state) before every so many steps only, and compute the steps of a
            segment again on the way back: one more pass, and memory for one segment. ``"sqrt"`` is the square root of
            the horizon (or truncation), for the least memory. The generator's state is replayed: all randomness of the
            task must come from it.
        compile: compile the inner step, once for all unrolls of this task and optimizer (some ten seconds). The loss
            must be pure torch code. Warns once, and has no effect, where there is no compiler.

    Raises:
        ValueError: ``steps`` below 1, an unknown objective, ``truncation`` outside 1..steps, ``segments`` below 1.

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
        check_objective(steps, objective)
        if truncation is not None and not 1 <= truncation <= steps:
            raise ValueError(f"truncation must be in 1..steps ({steps}), got truncation={truncation}")
        length = isinstance(segments, int) and not isinstance(segments, bool) and segments >= 1
        if segments not in (None, "sqrt") and not length:
            raise ValueError(f"segments must be None, 'sqrt' or a length >= 1, got segments={segments!r}")
        self.steps = steps
        self.objective = objective
        self.truncation = truncation
        self.segments = segments
        self.compile = compile

    def __repr__(self) -> str:
        options = {"truncation": self.truncation, "segments": self.segments, "compile": self.compile or None}
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"Unrolled(steps={self.steps}, objective={self.objective!r}{given})"

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
        with torch.enable_grad():
            program = make_program(task, opt, leaves.values, self.steps, generator)
            sources = Sources(program.inputs(program.values))
        unroll = Unroll(program, sources, task, generator, compile=self.compile)
        total: Tensor | None = None
        carry = sources.leaves.start
        for stretch in windows(self.objective, self.steps, self.truncation or self.steps):
            if not stretch.has_objective:
                carry = unroll.skip(carry, stretch.steps)
                continue
            if self.segments is None:
                carry, part = record(unroll, carry, stretch)
            else:
                # Compiled, a step and its product are one piece of code, and need no graph.
                backwards = sweep if self.compile else retrace
                carry, part = backwards(unroll, carry, stretch, self._segment_length(len(stretch.steps)))
            total = grown(total, part)
        if self.compile:  # compiled steps return 0 where a recorded graph has nothing
            sources.keep(dependence(unroll, whole(self.objective, self.truncation or self.steps)))
        leaves.add(sources.gradient(leaves.tensors))
        leaves.deliver()
        assert total is not None
        return total

    def _segment_length(self, steps: int) -> int:
        return max(1, math.isqrt(steps)) if self.segments == "sqrt" else min(int(self.segments or 1), steps)
