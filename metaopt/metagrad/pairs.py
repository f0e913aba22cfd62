"""Antithetic pairs of unrolls: what evolution strategies evaluate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.metagrad.objective import Objective, whole
from metaopt.metagrad.perturbation import Noise, Perturbation
from metaopt.tasks import Runs, Task, TaskBatch
from metaopt.tasks.family import drawn
from metaopt.tasks.runs import stack
from metaopt.unroll.make import make_program
from metaopt.unroll.particles import Particles, selected
from metaopt.unroll.program import Split, Tensors


class Pairs:
    """N pairs of unrolls; the two of a pair share everything but the sign of their perturbation.

    Args:
        task: what they train, drawn anew for each pair from a `TaskBatch`.
        opt: the inner optimizer.
        hyper: the module whose parameters are perturbed.
        std: of the perturbations.
        pairs: N.
        steps: the horizon.
        objective: what is measured.
        compile: compile the step.
        ends: where each pair's first unroll ends, if not at the horizon.

    Attributes:
        owners: task, optimizer and hyper.
        perturbation: of the hyperparameters.
    """

    def __init__(
        self,
        task: Task | TaskBatch,
        opt: Optimizer,
        hyper: nn.Module,
        std: float,
        pairs: int,
        steps: int,
        objective: Objective,
        *,
        compile: bool,
        ends: list[int] | None = None,
    ) -> None:
        self.owners = (task, opt, hyper)
        self.perturbation = Perturbation(opt, hyper, std, pairs)
        self._task, self._opt, self._steps, self._compile = task, opt, steps, compile
        self._whole = whole(objective, steps)
        self._ends = ends or [steps] * pairs
        self._at = list(self._ends)  # all are over: none has begun
        self._tasks: list[Any] = [None] * pairs
        self._params: list[Any] = [None] * pairs
        self._starts: Any = None  # parameters and configurations of all particles
        self._config: Tensors = ()
        self._carry: Tensors | None = None
        self._particles: Particles | None = None
        self._values: Split | None = None  # of the particles' program

    def renew(self, generator: Generator | None) -> list[int]:
        """Let the pairs that are over start afresh, and say which they are."""
        over = [index for index, (at, end) in enumerate(zip(self._at, self._ends, strict=True)) if at >= end]
        for index in over:
            if self._tasks[index] is not None:
                self._ends[index] = self._steps
            self._tasks[index] = drawn(self._task, generator)
            self._params[index] = self._tasks[index].init(generator)
            self._at[index] = 0
        if over:
            self._starts = _twice(stack(self._params))
            self._config = _twice(stack([_config(task) for task in self._tasks]))
        return over

    def run(self, noise: Noise, window: int, generator: Generator | None, *, go_on: bool = True) -> Tensor:
        """Take a window of steps, or what is left of it before the next end.

        Args:
            noise: the perturbation of each pair.
            window: how many steps.
            generator: for the batches.
            go_on: whether the next window begins at the end of this one, or where this one began.

        Returns:
            Each particle's part of the objective, shape (2 N,), in the order of `Perturbation.values`.
        """
        window = min(window, *(end - at for end, at in zip(self._ends, self._at, strict=True)))
        device = pytree.tree_leaves(self._starts)[0].device
        begins = torch.tensor(self._at, device=device).repeat(2)
        steps = begins[:, None] + torch.arange(window, device=device)
        values = self.perturbation.exact()
        if self._particles is None or self._values is None or self._values.differs(Split(values)):
            self._values = Split(values)
            program = make_program(self._tasks[0], self._opt, self._params[0], values, self._steps)
            self._particles = Particles(program, compile=self._compile)
        inputs = self._particles.inputs(self.perturbation.values(noise), self._config, self._starts, steps)
        carry = inputs.start if self._carry is None else selected(begins == 0, inputs.start, self._carry)

        def batches(k: int) -> Any:
            return _twice(stack([task.batch(t + k, generator) for task, t in zip(self._tasks, self._at, strict=True)]))

        carry, losses = self._particles.run(carry, inputs, batches, steps, self._whole)
        if go_on:
            self._carry, self._at = carry, [at + window for at in self._at]
        return losses


def _twice(tree: Any) -> Any:
    """For both of a pair."""
    return pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]), tree)


def _config(task: Task) -> Tensors:
    return Split(task.config if isinstance(task, Runs) else ()).tensors
