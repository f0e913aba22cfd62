"""Reverse mode by recording: one graph of all steps. The fastest way, with memory for every step."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.unroll.program import Tensors
from metaopt.unroll.stretch import Stretch, Unroll


def record(unroll: Unroll, carry: Tensors, stretch: Stretch) -> tuple[Tensors, Tensor]:
    """Run a stretch, and add the gradient of its part of the objective to the sources.

    Args:
        unroll: what is run.
        carry: before the stretch; the leaves of the sources, if it is the first.
        stretch: which steps.

    Returns:
        The carry at the end, cut off, and the part of the objective, detached.
    """
    if unroll.compile:  # or the first step, whose carry is not part of the graph yet, would be compiled separately
        carry = tuple(x if x.requires_grad else x.detach().requires_grad_(x.is_floating_point()) for x in carry)
    with torch.enable_grad():
        carry, terms = graph(unroll, carry, stretch)
        objective = torch.stack(terms).sum()
    if objective.requires_grad:
        leaves = unroll.sources.differentiable
        unroll.sources.add(leaves, torch.autograd.grad(objective, leaves, allow_unused=True))
    return tuple(tensor.detach() for tensor in carry), objective.detach()


def graph(unroll: Unroll, carry: Tensors, stretch: Stretch) -> tuple[Tensors, list[Tensor]]:
    """Run a stretch in grad mode: the carry at the end, and the terms of the objective."""
    program, shared = unroll.program, unroll.shared
    terms: list[Tensor] = []
    table = unroll.rows(stretch.steps)
    for t in stretch.steps:
        batch, before = unroll.batch(t), carry
        carry, loss = unroll.step(before, batch, table[t], shared)
        if stretch.loss_weight:
            # Where the step has no second-order graph, its loss is none either.
            loss = loss if program.second_order else program.loss(before, batch, shared)
            terms.append(stretch.loss_weight * loss)
        if weight := stretch.meta_weight(t + 1):
            terms.append(weight * program.meta_loss(carry, shared))
    return carry, terms
