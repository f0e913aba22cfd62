"""Many unrolls at once, each with hyperparameters of its own: what evolution strategies evaluate.

A particle is one unroll. All take a step together, by vmap, and nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.compilation import Trusted, compiled
from metaopt.unroll.program import Inputs, Program, Tensors, inner_step
from metaopt.unroll.stretch import Stretch


class Particles:
    """The functions of a program for many particles: every argument and result has a leading dimension P.

    Args:
        program: of one of them.
        compile: compile the step.
    """

    def __init__(self, program: Program, *, compile: bool) -> None:
        self._program = program
        self._step: Callable[..., Any] = torch.vmap(partial(inner_step, program))
        self._compile = compile
        if compile:
            self._step = compiled(("particles", program.key), self._step)
        self._meta_loss = torch.vmap(program.meta_loss)

    def inputs(self, values: Sequence[Tensor], config: Tensors, params: Any, steps: Tensor) -> Inputs:
        """The tensors of the unrolls.

        Args:
            values: the tensors among the hyperparameters' values.
            config: those of the tasks' configurations.
            params: where the unrolls start.
            steps: the window that each takes, int64 of shape (P, K).
        """
        made = torch.vmap(self._program.inputs)(tuple(values), params, steps)
        return made._replace(shared=(*made.shared[: len(values)], *config))

    def run(
        self, carry: Tensors, inputs: Inputs, batches: Callable[[int], Any], steps: Tensor, whole: Stretch
    ) -> tuple[Tensors, Tensor]:
        """Take a window of steps.

        Args:
            carry: before it.
            inputs: made for these steps.
            batches: what the particles train on in the k-th step of the window.
            steps: as for `inputs`.
            whole: the horizon with its objective.

        Returns:
            The carry after it, and each particle's part of the objective, shape (P,).
        """
        total = torch.zeros(len(steps), dtype=torch.float64, device=steps.device)
        weights = torch.tensor([[whole.meta_weight(t + 1) for t in row] for row in steps.tolist()], dtype=torch.float64)
        step = Trusted(self._step) if self._compile else self._step
        for k in range(steps.shape[1]):
            row = tuple(table[:, k] for table in inputs.per_step)
            carry, loss = step(carry, batches(k), row, inputs.shared)
            if whole.loss_weight:
                total += whole.loss_weight * loss
            if weights[:, k].any():
                weight = weights[:, k].to(total.device)
                # Not a plain product: what does not count may be NaN.
                total += torch.where(weight != 0.0, weight * self._meta_loss(carry, inputs.shared), 0.0)
        return carry, total


def selected(where: Tensor, some: Any, others: Any) -> Any:
    """Trees of particles put together: those ``where`` a flag is set, shape (P,), from the first."""
    return pytree.tree_map(lambda a, b: torch.where(where.view(-1, *[1] * (a.dim() - 1)), a, b), some, others)
