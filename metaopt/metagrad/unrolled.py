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
from metaopt.metagrad.objective import Objective, check_objective, check_truncation, whole, window_at, windows
from metaopt.metagrad.ongoing import Ongoing, Resumable
from metaopt.tasks import Task, TaskBatch
from metaopt.unroll.adjoint import sweep
from metaopt.unroll.dependence import dependence
from metaopt.unroll.make import make_program
from metaopt.unroll.program import Sources, Tensors
from metaopt.unroll.recorded import record
from metaopt.unroll.segmented import retrace
from metaopt.unroll.stretch import Stretch, Unroll, grown


class Unrolled(Resumable):
    """Reverse-mode differentiation of the whole inner loop: exact, with memory that grows with the horizon.

    Args:
        steps: inner steps, the horizon T >= 1.
        objective: ``"final"`` is ``meta_loss(params_T)``; ``"mean"`` the mean over t = 1..T of ``meta_loss(params_t)``;
            ``"inner"`` the mean over t = 0..T-1 of the inner losses ``loss(params_t, batch_t)``.
        truncation: cut the graph every so many steps, and add up the gradients of the windows: less memory and tamer
            gradients, at the price of a bias. The last window is shorter where it does not divide ``steps``. With
            ``"final"`` only the last window has an objective. None for no cuts.
        carry: one window a call, going on where the last call ended, with the hyperparameters of this one; the
            gradients of ``steps / truncation`` calls add up to those of a call without. A new unroll begins after the
            last window, and for another task, optimizer or ``hyper``.
        segments: keep the carry (parameters and state) before every so many steps only, and compute the steps of a
            segment again on the way back: one more pass, and memory for one segment. ``"sqrt"`` is the square root of
            the horizon (or truncation), for the least memory. The generator's state is replayed: all randomness of the
            task must come from it.
        compile: compile the inner step, once for all unrolls of this task and optimizer (some ten seconds). The loss
            must be pure torch code. Warns once, and has no effect, where there is no compiler.

    Raises:
        ValueError: ``steps`` below 1, an unknown objective, ``truncation`` outside 1..steps, ``segments`` below 1,
            ``carry`` without ``truncation``.

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
        carry: bool = False,
    ) -> None:
        check_objective(steps, objective)
        if truncation is not None:
            check_truncation(steps, truncation)
        if carry and truncation is None:
            raise ValueError("carry=True needs a truncation: the length of the window that a call goes on")
        length = isinstance(segments, int) and not isinstance(segments, bool) and segments >= 1
        if segments not in (None, "sqrt") and not length:
            raise ValueError(f"segments must be None, 'sqrt' or a length >= 1, got segments={segments!r}")
        self.steps = steps
        self.objective = objective
        self.truncation = truncation
        self.segments = segments
        self.compile = compile
        self.carry = carry

    def __repr__(self) -> str:
        options = {
            "truncation": self.truncation,
            "segments": self.segments,
            "compile": self.compile or None,
            "carry": self.carry or None,
        }
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"Unrolled(steps={self.steps}, objective={self.objective!r}{given})"

    @property
    def windows(self) -> int:
        """How many calls go over the horizon."""
        return math.ceil(self.steps / (self.truncation or self.steps)) if self.carry else 1

    def backward(
        self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        """Accumulate the hypergradient into ``.grad`` of hyper's parameters, and return the meta-loss.

        Args:
            task: what is learned on: a task, `metaopt.tasks.Replicas` of one, or a `metaopt.tasks.TaskBatch`, which
                draws new ones for every unroll.
            opt: the inner optimizer.
            hyper: a module whose call returns a mapping of values, such as `metaopt.Hyperparameters`.
            generator: for the task's randomness; None is torch's default generator.

        Returns:
            The meta-loss, 0-d and detached.

        Raises:
            ValueError: a learned value on which the meta-loss does not depend. No ``.grad`` has been touched then.
        """
        leaves = Leaves(hyper)
        owners = (task, opt, hyper)
        run = self._going_on(
            owners,
            lambda: Ongoing.begin(owners, generator),
            lambda state: Ongoing.restored(state, owners, generator),
        )
        trained = run.start.task
        with torch.enable_grad():
            program = make_program(trained, opt, run.start.params, leaves.values, self.steps)
            sources = Sources(program.inputs(program.values))
        unroll = Unroll(program, sources, trained, generator, compile=self.compile)
        carry = sources.leaves.start if run.carry is None else run.carry
        length = self.truncation or self.steps
        if self.carry:
            stretches = [window_at(self.objective, self.steps, run.step, length)]
        else:
            stretches = windows(self.objective, self.steps, length)
        total: Tensor | None = None
        for stretch in stretches:
            if not stretch.has_objective:
                carry = unroll.skip(carry, stretch.steps)
                continue
            carry, part = self._differentiated(unroll, carry, stretch)
            total = grown(total, part)
        if self.compile:  # compiled steps return 0 where a recorded graph has nothing
            sources.keep(dependence(unroll, whole(self.objective, length)))
        if self.carry:  # what is read in another window has no gradient in this one
            sources.add_zeros(dependence(unroll, whole(self.objective, self.steps)))
        leaves.add(sources.gradient(leaves.tensors))
        leaves.deliver()
        if self.carry:
            self._run = run.at(carry, stretches[-1].steps.stop, self.steps)
        return torch.zeros((), device=carry[0].device) if total is None else total

    def _differentiated(self, unroll: Unroll, carry: Tensors, stretch: Stretch) -> tuple[Tensors, Tensor]:
        if self.segments is None:
            return record(unroll, carry, stretch)
        # Compiled, a step and its product are one piece of code, and need no graph.
        backwards = sweep if self.compile else retrace
        return backwards(unroll, carry, stretch, self._segment_length(len(stretch.steps)))

    def _segment_length(self, steps: int) -> int:
        return max(1, math.isqrt(steps)) if self.segments == "sqrt" else min(int(self.segments or 1), steps)
