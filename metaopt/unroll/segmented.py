"""Reverse mode by recording one segment at a time: a graph of a segment, and the carries before the others.

A first pass keeps the carry before each segment; going back, each segment is run again, from the same batches, and
recorded. One pass less than the adjoint method takes within a segment, for the memory of a segment's graph.

References:
    Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.unroll.program import Tensors, chosen, floating, merged
from metaopt.unroll.randomness import Snapshot
from metaopt.unroll.recorded import graph
from metaopt.unroll.stretch import Stretch, Unroll, grown


def retrace(unroll: Unroll, carry: Tensors, stretch: Stretch, length: int) -> tuple[Tensors, Tensor]:
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
    kept: list[tuple[Tensors, Snapshot]] = []
    for segment in segments:
        kept.append((carry, Snapshot(unroll.generator)))
        if segment is not segments[-1]:  # which is run once, recorded
            carry = unroll.skip(carry, segment)
    end = carry

    learned = [leaf for part in unroll.sources.leaves[1:] for leaf in part if leaf.requires_grad]
    adjoint: list[Tensor | None] = [None] * len(end)
    total: Tensor | None = None
    for segment in reversed(segments):
        carry, drawn = kept.pop()
        drawn.restore()
        where = floating(carry)
        starts = [tensor.detach().requires_grad_() for tensor in chosen(carry, where)]
        with torch.enable_grad():
            after, terms = graph(unroll, merged(carry, where, starts), stretch._replace(steps=segment))
            if segment is segments[-1]:
                end, here = tuple(x.detach() for x in after), Snapshot(unroll.generator)
            ends = [(x, bar) for x, bar in zip(after, adjoint, strict=True) if bar is not None and x.requires_grad]
            ends += [(term, torch.ones_like(term)) for term in terms if term.requires_grad]
        for term in terms:
            total = grown(total, term.detach())
        adjoint = [None] * len(end)
        if not ends:
            continue
        grads = torch.autograd.grad(
            [x for x, _ in ends], [*starts, *learned], [bar for _, bar in ends], allow_unused=True
        )
        adjoint = list(merged(adjoint, where, grads[: len(starts)]))
        unroll.sources.add(learned, grads[len(starts) :])
    here.restore()
    if stretch.steps.start == 0:
        reached = [(leaf, bar) for leaf, bar in zip(unroll.sources.leaves.start, adjoint, strict=True)]
        pairs = [(leaf, bar) for leaf, bar in reached if leaf.requires_grad]
        unroll.sources.add([leaf for leaf, _ in pairs], [bar for _, bar in pairs])
    assert total is not None
    return end, total
