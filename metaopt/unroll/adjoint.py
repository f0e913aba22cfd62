"""Reverse mode by recomputing: the adjoint method in segments, with memory for a segment and for the segments' starts.

The adjoint of step t, the gradient of the objective with respect to the carry, follows from that of step t + 1 by one
vector-Jacobian product of the step. A first pass keeps the carry before each segment alone; going back, the carries
within a segment are computed again, from the same batches.

References:
    Griewank, Achieving logarithmic growth of temporal and spatial complexity in reverse automatic differentiation,
    Optimization Methods and Software 1992. Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.unroll.program import Tensors, chosen, floating, merged
from metaopt.unroll.randomness import Snapshot
from metaopt.unroll.stretch import Stretch, Unroll, grown
from metaopt.unroll.vjp import learned, make_vjp


def sweep(unroll: Unroll, carry: Tensors, stretch: Stretch, length: int) -> tuple[Tensors, Tensor]:
    """Run a stretch, and add the gradient of its part of the objective to the sources.

    Args:
        unroll: what is run.
        carry: before the stretch.
        stretch: which steps.
        length: of a segment.

    Returns:
        The carry at the end, and the part of the objective.
    """
    segments = [range(start, min(start + length, stretch.steps.stop)) for start in stretch.steps[::length]]
    pullback = Pullback(unroll, stretch)
    total: Tensor | None = None
    kept: list[tuple[Tensors, Snapshot]] = []
    taken: list[Taken] = []
    with torch.no_grad():
        for segment in segments:
            kept.append((carry, Snapshot(unroll.generator)))
            for t, row in unroll.rows(segment).items():
                batch = unroll.batch(t)
                if segment is segments[-1]:  # with which the way back begins
                    taken.append(Taken(t, carry, batch, row))
                carry, loss = unroll.step(carry, batch, row, unroll.shared)
                if stretch.loss_weight:
                    total = grown(total, stretch.loss_weight * loss)
    end, after, here = carry, carry, Snapshot(unroll.generator)

    for segment in reversed(segments):
        carry, drawn = kept.pop()
        if segment is not segments[-1]:
            drawn.restore()
            taken = _again(unroll, carry, segment)
        while taken:
            step = taken.pop()
            if weight := stretch.meta_weight(step.t + 1):
                total = grown(total, pullback.judge(after, weight))
            pullback.step(step)
            after = step.carry
    here.restore()
    pullback.finish(is_start=stretch.steps.start == 0)
    assert total is not None
    return end, total


class Taken(NamedTuple):
    """A step that is to be gone back over: its number, and what went into it."""

    t: int
    carry: Tensors
    batch: Any
    row: Tensors


@torch.no_grad()
def _again(unroll: Unroll, carry: Tensors, segment: range) -> list[Taken]:
    """The steps of a segment, whose last is not taken again: what comes out of it is known."""
    taken: list[Taken] = []
    for t, row in unroll.rows(segment).items():
        if taken:
            carry, _ = unroll.step(carry, taken[-1].batch, taken[-1].row, unroll.shared)
        taken.append(Taken(t, carry, unroll.batch(t), row))
    return taken


class Pullback:
    """The adjoint, as it moves from the last step to the first."""

    def __init__(self, unroll: Unroll, stretch: Stretch) -> None:
        self._unroll = unroll
        self._vjp = make_vjp(unroll, stretch.loss_weight)
        leaves = unroll.sources.leaves
        rows, shared = learned(unroll)
        self._shared = [leaves.shared[i] for i in shared]
        self._adjoint: list[Tensor | None] = [None] * len(leaves.start)
        self._rows = [leaves.per_step[i] for i in rows]
        self._row_bars: list[Tensor | None] = [None] * len(self._rows)

    def judge(self, carry: Tensors, weight: float) -> Tensor:
        """Add the gradient of the weighted meta-loss at a carry, and return it."""
        where = floating(carry)
        ends = [tensor.detach().requires_grad_() for tensor in chosen(carry, where)]
        with torch.enable_grad():
            objective = weight * self._unroll.program.meta_loss(merged(carry, where, ends), self._unroll.shared)
        if not objective.requires_grad:
            return objective
        grads = torch.autograd.grad(objective, [*ends, *self._shared], allow_unused=True)
        for index, grad in zip(where, grads, strict=False):
            if grad is not None:
                self._adjoint[index] = grown(self._adjoint[index], grad)
        self._unroll.sources.add(self._shared, grads[len(ends) :])
        return objective.detach()

    def step(self, taken: Taken) -> None:
        """Go back over a step."""
        bars = self._vjp(taken.carry, taken.batch, taken.row, self._adjoint)
        self._adjoint = list(bars.carry)
        for index, bar in enumerate(bars.row):
            if bar is not None:
                table = self._row_bars[index]
                table = self._row_bars[index] = torch.zeros_like(self._rows[index]) if table is None else table
                table[taken.t] += bar
        self._unroll.sources.add(self._shared, bars.shared)

    def finish(self, *, is_start: bool) -> None:
        """Hand what has been added up to the sources."""
        self._unroll.sources.add(self._rows, self._row_bars)
        if is_start:
            starts = zip(self._unroll.sources.leaves.start, self._adjoint, strict=True)
            pairs = [(leaf, bar) for leaf, bar in starts if leaf.requires_grad]
            self._unroll.sources.add([leaf for leaf, _ in pairs], [bar for _, bar in pairs])
