"""Some consecutive steps of an unroll, and the ways to take them that all modes share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from metaopt.compilation import Trusted, compiled
from metaopt.tasks import Task
from metaopt.unroll.program import Program, Sources, Tensors, blocks, inner_step, rows


class Stretch(NamedTuple):
    """Steps, and what of the objective lies in them.

    Attributes:
        steps: their numbers.
        loss_weight: the weight of each inner loss in the objective.
        meta_weight: the weight of ``meta_loss(params_t)`` for t = 1..T.
    """

    steps: range
    loss_weight: float
    meta_weight: Callable[[int], float]

    @property
    def has_objective(self) -> bool:
        """Whether anything in it is differentiated."""
        return bool(self.loss_weight) or any(self.meta_weight(t + 1) for t in self.steps)


class Unroll:
    """A program with all that it takes to run it.

    Args:
        program: what is unrolled.
        sources: its inputs, as leaves, to which gradients are added.
        task: draws the batches.
        generator: for them.
        compile: compile the steps.
    """

    def __init__(
        self, program: Program, sources: Sources, task: Task, generator: Generator | None, *, compile: bool
    ) -> None:
        self.program, self.sources, self.task, self.generator, self.compile = program, sources, task, generator, compile
        self.shared = sources.leaves.shared
        # Which of the sources are learned.
        self.learned_key = tuple(leaf.requires_grad for part in sources.leaves for leaf in part)
        if program.second_order or not compile:
            self.step = self.maybe_compiled("step", partial(inner_step, program))
        else:
            # Nothing is differentiated in the costly half, and the update with its derivatives by hand is quicker than
            # what the compiler makes of it.
            gradient = self.maybe_compiled("gradient", program.gradient)
            self.step = lambda carry, batch, row, shared: _in_halves(program, gradient, carry, batch, row, shared)

    def maybe_compiled(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of this program, compiled if that is wanted."""
        if not self.compile:
            return function
        return Trusted(compiled((name, self.learned_key, self.program.key), function))

    def rows(self, steps: range) -> dict[int, Tensors]:
        """The rows of some steps, by their numbers; in the graph of the sources where one is recorded."""
        return dict(zip(steps, rows(self.sources.leaves.per_step, steps), strict=True))

    def batch(self, t: int) -> Any:
        return self.task.batch(t, self.generator)

    @torch.no_grad()
    def skip(self, carry: Tensors, steps: range) -> Tensors:
        """Steps that are not differentiated."""
        for block in blocks(steps):
            for t, row in self.rows(block).items():
                carry, _ = self.step(carry, self.batch(t), row, self.shared)
        return carry


def _in_halves(
    program: Program, gradient: Callable[..., Any], carry: Tensors, batch: Any, row: Tensors, shared: Tensors
) -> tuple[Tensors, Tensor]:
    with torch.no_grad():
        grads, loss = gradient(tuple(x.detach() for x in carry), batch, shared)
    return program.update(carry, grads, row, shared), loss


def grown(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term
