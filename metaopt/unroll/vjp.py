"""The vector-Jacobian product of one step: by autograd, or compiled in one piece with the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.unroll.program import Tensors, chosen, floating, inner_step, merged
from metaopt.unroll.stretch import Unroll

Bars = Sequence[Tensor | None]  # gradients; None where nothing depends on the tensor


class Cotangents(NamedTuple):
    """Gradients with respect to what goes into a step; ``row`` and ``shared`` have one for each that is learned."""

    carry: Bars
    row: Bars
    shared: Bars


# (carry, batch, row, adjoint after the step) to the cotangents before it
VJP = Callable[[Tensors, Any, Tensors, Bars], Cotangents]


def make_vjp(unroll: Unroll, loss_weight: float) -> VJP:
    """The product for the steps of an unroll whose objective has each inner loss with this weight."""
    return _compiled(unroll, loss_weight) if unroll.compile else _eager(unroll, loss_weight)


def learned(unroll: Unroll) -> tuple[list[int], list[int]]:
    """Which entries of a row, and of what is shared, are learned or depend on what is."""
    leaves = unroll.sources.leaves
    rows, shared = ([i for i, leaf in enumerate(part) if leaf.requires_grad] for part in leaves[1:])
    return rows, shared


def _eager(unroll: Unroll, loss_weight: float) -> VJP:
    program, shared = unroll.program, unroll.shared
    in_rows, in_shared = learned(unroll)

    def vjp(carry: Tensors, batch: Any, row: Tensors, adjoint: Bars) -> Cotangents:
        carry = tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in carry)
        row = tuple(c.detach().requires_grad_(i in in_rows) for i, c in enumerate(row))
        with torch.enable_grad():
            after, loss = inner_step(program, carry, batch, row, shared)
            if loss_weight and not program.second_order:
                loss = program.loss(carry, batch, shared)
        ends = [(x, bar) for x, bar in zip(after, adjoint, strict=True) if bar is not None and x.requires_grad]
        if loss_weight:
            ends.append((loss, torch.full_like(loss, loss_weight)))
        in_carry = floating(carry)
        inputs = [*chosen(carry, in_carry), *(row[i] for i in in_rows), *(shared[i] for i in in_shared)]
        grads: Bars = [None] * len(inputs)
        if ends:
            grads = torch.autograd.grad([x for x, _ in ends], inputs, [bar for _, bar in ends], allow_unused=True)
        cut = len(in_carry), len(in_carry) + len(in_rows)
        bars = merged([None] * len(carry), in_carry, grads[: cut[0]])
        return Cotangents(bars, grads[cut[0] : cut[1]], grads[cut[1] :])

    return vjp


def _compiled(unroll: Unroll, loss_weight: float) -> VJP:
    program, shared = unroll.program, unroll.shared
    in_rows, in_shared = learned(unroll)
    in_objective, count = loss_weight != 0.0, len(shared)

    def pull(
        carry: Tensors,
        batch: Any,
        row: Tensors,
        moving: Tensors,
        still: Tensors,
        adjoint: Tensors,
        weight: Tensor,
    ) -> tuple[Tensors, Tensors, Tensors]:
        in_carry = floating(carry)

        def step(carry_moving: Tensors, row_moving: Tensors, moving: Tensors) -> tuple[Tensors, Tensor]:
            before = merged(carry, in_carry, carry_moving)
            whole_row = merged(row, in_rows, row_moving)
            rest = iter(still)
            whole = merged([None if i in in_shared else next(rest) for i in range(count)], in_shared, moving)
            after, loss = inner_step(program, before, batch, whole_row, whole)
            if in_objective and not program.second_order:
                loss = program.loss(before, batch, whole)
            return chosen(after, in_carry), loss if in_objective else torch.zeros_like(loss)

        (_, loss), product, *_ = torch.func.vjp(step, chosen(carry, in_carry), chosen(row, in_rows), moving)
        return product((chosen(adjoint, in_carry), weight.to(loss.dtype)))  # type: ignore[no-any-return]

    run = unroll.maybe_compiled(f"vjp {in_objective}", pull)
    moving = tuple(shared[i].detach() for i in in_shared)
    weight = torch.tensor(loss_weight, dtype=torch.float64, device=unroll.sources.leaves.start[0].device)
    still = tuple(tensor.detach() for i, tensor in enumerate(shared) if i not in in_shared)

    def vjp(carry: Tensors, batch: Any, row: Tensors, adjoint: Bars) -> Cotangents:
        bars = tuple(torch.zeros_like(x) if bar is None else bar for x, bar in zip(carry, adjoint, strict=True))
        with torch.no_grad():
            from_carry, from_row, from_shared = run(carry, batch, row, moving, still, bars, weight)
        return Cotangents(merged([None] * len(carry), floating(carry), from_carry), from_row, from_shared)

    return vjp
