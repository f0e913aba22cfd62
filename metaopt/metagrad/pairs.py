"""Antithetic pairs of unrolls: what evolution strategies evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.metagrad.objective import Objective, whole
from metaopt.metagrad.ongoing import Start, config
from metaopt.metagrad.perturbation import Noise, Perturbation
from metaopt.tasks import Task, TaskBatch
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
        rows: which of the pairs are trained; all are drawn. None for all.

    Attributes:
        owners: task, optimizer, hyper and rows.
        perturbation: of the hyperparameters.
        seen: the sum of the perturbations that each pair has seen in its present unroll.
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
        rows: range | None = None,
    ) -> None:
        rows = range(pairs) if rows is None else rows
        self.owners = (task, opt, hyper, rows)
        self.perturbation = Perturbation(opt, hyper, std, pairs, rows)
        self._rows = rows
        self._task, self._opt, self._steps, self._compile = task, opt, steps, compile
        self._whole = whole(objective, steps)
        self._ends = ends or [steps] * pairs
        self._at = list(self._ends)  # all are over: none has begun
        self.seen: Noise = self.perturbation.zeros()
        self._each: list[Start | None] = [None] * pairs
        self._starts: Any = None  # parameters and configurations of all particles
        self._config: Tensors = ()
        self._carry: Tensors | None = None
        self._particles: Particles | None = None
        self._values: Split | None = None  # of the particles' program

    def renew(self, generator: Generator | None) -> None:
        """Let the pairs that are over start afresh."""
        over = [index for index, (at, end) in enumerate(zip(self._at, self._ends, strict=True)) if at >= end]
        for index in over:
            if self._each[index] is not None:
                self._ends[index] = self._steps
            self._each[index] = Start.draw(self._task, generator)
            self._at[index] = 0
        if over:
            mine = [index - self._rows.start for index in over if index in self._rows]
            where = torch.tensor(mine, dtype=torch.int64)
            self.seen = [seen.index_fill(0, where.to(seen.device), 0.0) for seen in self.seen]
            self._line_up()

    def _line_up(self) -> None:
        starts = self._own(self._started())
        self._starts = _twice(stack([start.params for start in starts]))
        self._config = _twice(stack([config(start.task).tensors for start in starts]))

    def _started(self) -> list[Start]:
        """One a pair, once all have begun."""
        return [start for start in self._each if start is not None]

    def _own(self, each: list[Any]) -> list[Any]:
        """Those of the pairs that are trained."""
        return each[self._rows.start : self._rows.stop]

    def state(self) -> dict[str, Any]:
        """Where they stand, to be saved."""
        return {
            "at": list(self._at),
            "ends": list(self._ends),
            "each": [start.state() for start in self._started()],
            "rows": {"seen": list(self.seen), "carry": [_by_pair(tensor) for tensor in self._carry or ()]},
        }

    def restored(self, state: Mapping[str, Any], generator: Generator | None) -> Pairs:
        """These, standing where others stood.

        Raises:
            ValueError: the others were not as many, or of another task.
        """
        if len(state["each"]) != len(self._each):
            raise ValueError(f"what was saved are {len(state['each'])} pairs of unrolls, not {len(self._each)}")
        self._at, self._ends = list(state["at"]), list(state["ends"])
        self._each = [Start.restored(saved, self._task, generator) for saved in state["each"]]
        self._line_up()
        rows, device = state["rows"], pytree.tree_leaves(self._starts)[0].device
        self.seen = [seen.to(zero) for seen, zero in zip(rows["seen"], self.seen, strict=True)]
        self._carry = tuple(_by_sign(tensor).to(device) for tensor in rows["carry"]) or None
        return self

    def run(self, noise: Noise, window: int, generator: Generator | None, *, go_on: bool = True) -> Tensor:
        """Take a window of steps, or what is left of it before the next end.

        Args:
            noise: the perturbation of each pair, added to what it has `seen`.
            window: how many steps.
            generator: for the batches.
            go_on: whether the next window begins at the end of this one, or where this one began.

        Returns:
            Each particle's part of the objective, shape (2 rows,), in the order of `Perturbation.values`.
        """
        window = min(window, *(end - at for end, at in zip(self._ends, self._at, strict=True)))
        device = pytree.tree_leaves(self._starts)[0].device
        begins = torch.tensor(self._own(self._at), device=device).repeat(2)
        steps = begins[:, None] + torch.arange(window, device=device)
        values = self.perturbation.exact()
        if self._particles is None or self._values is None or self._values.differs(Split(values)):
            self._values, first = Split(values), self._started()[0]
            program = make_program(first.task, self._opt, first.params, values, self._steps)
            self._particles = Particles(program, compile=self._compile)
        inputs = self._particles.inputs(self.perturbation.values(noise), self._config, self._starts, steps)
        carry = inputs.start if self._carry is None else selected(begins == 0, inputs.start, self._carry)

        tasks = [start.task for start in self._started()]

        def batches(k: int) -> Any:
            drawn = [task.batch(t + k, generator) for task, t in zip(tasks, self._at, strict=True)]
            return _twice(stack(self._own(drawn)))

        self.seen = [seen + e for seen, e in zip(self.seen, noise, strict=True)]
        carry, losses = self._particles.run(carry, inputs, batches, steps, self._whole)
        if go_on:
            self._carry, self._at = carry, [at + window for at in self._at]
        return losses


def _twice(tree: Any) -> Any:
    """For both of a pair."""
    return pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]), tree)


def _by_pair(particles: Tensor) -> Tensor:
    """A row for each pair, with its two: shape (rows, 2, ...)."""
    pairs: Tensor = particles.unflatten(0, (2, -1)).transpose(0, 1).contiguous()
    return pairs


def _by_sign(pairs: Tensor) -> Tensor:
    """The particles again: first those with +noise, then those with -noise."""
    particles: Tensor = pairs.transpose(0, 1).flatten(0, 1)
    return particles
