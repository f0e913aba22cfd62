"""Which inputs of an unroll its objective depends on.

A recorded graph tells a derivative that is 0 from one that does not exist. Compiled products and forward mode return
zeros for both, so the question is put to a recorded graph of the first steps, once for each program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.compilation import Remembered
from metaopt.unroll.program import inner_step
from metaopt.unroll.randomness import Snapshot
from metaopt.unroll.stretch import Stretch, Unroll

_REMEMBERED = Remembered(64)


def dependence(unroll: Unroll, stretch: Stretch) -> tuple[bool, ...]:
    """For each learned leaf of the sources (``sources.differentiable``): whether the objective depends on it.

    Args:
        unroll: what is run; its generator is left as it was.
        stretch: the whole unroll.
    """
    judged = any(stretch.meta_weight(t + 1) for t in stretch.steps)
    leaves = unroll.sources.differentiable
    what = (judged, stretch.loss_weight != 0.0, len(stretch.steps[:2]))
    key = ("dependence", *what, unroll.learned_key, unroll.program.key)
    return _REMEMBERED(key, lambda: _probed(unroll, stretch, judged, leaves))


def _probed(unroll: Unroll, stretch: Stretch, judged: bool, leaves: list[Tensor]) -> tuple[bool, ...]:
    here = Snapshot(unroll.generator)
    program, shared = unroll.program, unroll.shared
    carry = unroll.sources.leaves.start
    terms = []
    with torch.enable_grad():
        table = unroll.rows(stretch.steps[:2])
        for t in stretch.steps[:2]:  # the second step reads what the first has written
            batch = unroll.batch(t)
            if stretch.loss_weight:
                terms.append(program.loss(carry, batch, shared))
            carry, _ = inner_step(program, carry, batch, table[t], shared)
        if judged:
            terms.append(program.meta_loss(carry, shared))
        objective = torch.stack(terms).sum()
    here.restore()
    if not objective.requires_grad:
        return (False,) * len(leaves)
    return tuple(grad is not None for grad in torch.autograd.grad(objective, leaves, allow_unused=True))
