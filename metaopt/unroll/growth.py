"""How fast a small change of the hyperparameters grows along an unroll: why hypergradients explode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.functional import Optimizer
from metaopt.tasks import Task
from metaopt.unroll.make import make_program
from metaopt.unroll.program import Sources, Tensors, floating
from metaopt.unroll.stretch import Unroll
from metaopt.unroll.tangents import inputs_along, rows_along, tangent_step


@torch.no_grad()
def growth(
    task: Task, opt: Optimizer, params: Any, values: Mapping[str, Any], steps: int, generator: Generator | None
) -> float:
    """The factor by which the effect of a change grows in an inner step, over the second half of the unroll.

    Below 1 changes die out; near 1 they add up; above 1 they grow exponentially, and with them the hypergradient
    (`Metz et al. 2019`_). Measured by a tangent that travels with the carry, in the memory of a few steps.

    Args:
        task: what is trained.
        opt: the inner optimizer.
        params: where training starts.
        values: all values; the change is one of every tensor among them that is learned (requires grad).
        steps: inner steps.
        generator: for the batches.

    .. _Metz et al. 2019: Understanding and Correcting Pathologies in the Training of Learned Optimizers, section 3.
    """
    program = make_program(task, opt, params, values, steps)
    directions = [torch.full_like(value, float(value.requires_grad))[None] for value in program.values]
    inputs, dots = inputs_along(program, tuple(value.detach() for value in program.values), directions)
    unroll = Unroll(program, Sources(inputs), task, generator, compile=False)
    step = tangent_step(program, 1)
    carry, carry_dot = inputs.start, dots.start
    sizes = [_size(carry_dot, carry)]
    for t, row, row_dot in rows_along(inputs.per_step, dots.per_step, range(steps)):
        carry, carry_dot, _, _ = step(carry, carry_dot, unroll.batch(t), row, row_dot, inputs.shared, dots.shared)
        sizes.append(_size(carry_dot, carry))
    finite = [size for size in sizes[1:] if math.isfinite(size) and size > 0]
    if len(finite) < 2:
        return 1.0
    late = finite[len(finite) // 2 :] if len(finite) > 2 else finite
    return float((late[-1] / late[0]) ** (1 / max(1, len(late) - 1)))


def _size(tangents: Tensors, carry: Tensors) -> float:
    """The norm of a tangent of the carry."""
    dots: list[Tensor] = [dot.to(torch.float64) for dot, _ in zip(tangents, floating(carry), strict=True)]
    return float(torch.nn.utils.get_total_norm(dots)) if dots else 0.0
