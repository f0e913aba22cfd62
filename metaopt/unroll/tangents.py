"""Forward mode through an unroll: tangents travel with the carry, and nothing is kept.

Exact, in memory that does not depend on the horizon, at the price of one more pass per learned number.

References:
    Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML 2017, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaopt.unroll.program import Inputs, Program, Tensors, blocks, chosen, floating, inner_step, merged, rows
from metaopt.unroll.stretch import Stretch, Unroll, grown

TangentStep = Callable[..., tuple[Tensors, Tensors, Tensor, Tensor]]


def basis(values: Sequence[Tensor]) -> list[Tensor]:
    """A tangent for every number in the values that require grad: of value i, shape (K, *shape of i)."""
    count = sum(value.numel() for value in values if value.requires_grad)
    tangents, first = [], 0
    for value in values:
        tangent = torch.zeros(count, value.numel(), dtype=value.dtype, device=value.device)
        if value.requires_grad:
            index = torch.arange(value.numel())
            tangent[first + index, index] = 1.0
            first += value.numel()
        tangents.append(tangent.reshape(count, *value.shape))
    return tangents


def forward(unroll: Unroll, values: Tensors, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Run an unroll with a tangent for every learned number.

    Args:
        unroll: what is run.
        values: what ``program.inputs`` is a function of; those that require grad are learned.
        stretch: all of its steps.

    Returns:
        The objective, and its gradient: shape (K,), the learned values laid flat in order.
    """
    program = unroll.program
    tangents = basis(values)
    count = len(tangents[0])
    with torch.no_grad():
        inputs, dots = inputs_along(program, tuple(value.detach() for value in values), tangents)
        judged = bool(stretch.loss_weight)
        carry, carry_dot = inputs.start, dots.start
        inputs, dots = inputs._replace(start=()), dots._replace(start=())  # which the first step may let go of
        step = tangent_step(program, count)
        if unroll.compile:
            step = _replacing(unroll.maybe_compiled(f"tangents {count}", _written(step)))
            carry, carry_dot = _copies(carry), _copies(carry_dot)
        total: Tensor | None = None
        gradient: Tensor | None = None
        for t, row, row_dot in rows_along(inputs.per_step, dots.per_step, stretch.steps):
            batch = unroll.batch(t)
            if judged and not program.second_order:  # the step has no derivative of the loss, and may write over these
                before = _along(partial(_loss, program, batch), carry, carry_dot, inputs, dots)
            carry, carry_dot, *loss_along = step(carry, carry_dot, batch, row, row_dot, inputs.shared, dots.shared)
            if judged:
                loss, loss_dot = loss_along if program.second_order else before
                total = grown(total, stretch.loss_weight * loss)
                gradient = grown(gradient, stretch.loss_weight * loss_dot)
            if weight := stretch.meta_weight(t + 1):
                meta_loss, slope = _along(program.meta_loss, carry, carry_dot, inputs, dots)
                total = grown(total, weight * meta_loss)
                gradient = grown(gradient, weight * slope)
    assert total is not None
    assert gradient is not None
    return total, gradient


def _loss(program: Program, batch: Any, carry: Tensors, shared: Tensors) -> Tensor:
    return program.loss(carry, batch, shared)


def inputs_along(program: Program, values: Tensors, tangents: Sequence[Tensor]) -> tuple[Inputs, Inputs]:
    """The inputs of the program, and the tangents of those that are floating, with a leading dimension K."""

    where = floating(values)

    def differentiable(*given: Tensor) -> tuple[list[Tensors], Inputs]:
        inputs = program.inputs(merged(values, where, given))
        return [chosen(part, floating(part)) for part in inputs], inputs

    def along(*directions: Tensor) -> Any:
        return torch.func.jvp(differentiable, chosen(values, where), directions, has_aux=True)[1:]

    directions = chosen(tangents, where)
    if len(directions[0]) == 1:  # without vmap's overhead
        dots, inputs = along(*(direction[0] for direction in directions))
        return inputs, Inputs(*(tuple(dot[None] for dot in part) for part in dots))
    dots, inputs = torch.vmap(along, out_dims=(0, None))(*directions)  # type: ignore[arg-type]
    return inputs, Inputs(*dots)


def tangent_step(program: Program, count: int) -> TangentStep:
    """A step that carries ``count`` tangents along: the carry after it, its tangents, the loss and its tangents."""

    def step(
        carry: Tensors,
        carry_dot: Tensors,
        batch: Any,
        row: Tensors,
        row_dot: Tensors,
        shared: Tensors,
        shared_dot: Tensors,
    ) -> tuple[Tensors, Tensors, Tensor, Tensor]:
        in_carry, in_row, in_shared = floating(carry), floating(row), floating(shared)
        primals = (chosen(carry, in_carry), chosen(row, in_row), chosen(shared, in_shared))

        def once(c: Tensors, r: Tensors, s: Tensors) -> tuple[tuple[Tensors, Tensor], Tensors]:
            after, loss = inner_step(
                program, merged(carry, in_carry, c), batch, merged(row, in_row, r), merged(shared, in_shared, s)
            )
            return (chosen(after, in_carry), loss), after

        def along(*directions: Tensors) -> Any:
            return torch.func.jvp(once, primals, directions, has_aux=True)

        if count == 1:  # without vmap's overhead
            first = [tuple(dot[0] for dot in dots) for dots in (carry_dot, row_dot, shared_dot)]
            (_, loss), (after_dot, loss_dot), after = along(*first)
            return after, tuple(dot[None] for dot in after_dot), loss, loss_dot[None]
        (_, loss), (after_dot, loss_dot), after = torch.vmap(along, out_dims=(None, 0, None))(  # type: ignore[arg-type]
            carry_dot, row_dot, shared_dot
        )
        return after, after_dot, loss, loss_dot

    return step


def _written(step: TangentStep) -> Callable[..., Any]:
    """The step, for the compiler: it writes over the carry before it what fits there, and returns None in its place."""

    def in_place(carry: Tensors, carry_dot: Tensors, *others: Any) -> Any:
        after, after_dot, loss, loss_dot = step(carry, carry_dot, *others)
        # Copies, which the compiler sees through where it can: a result may be what is about to be overwritten.
        after, after_dot, (loss, loss_dot) = (_copies(part) for part in (after, after_dot, (loss, loss_dot)))
        return _over(carry, after), _over(carry_dot, after_dot), loss, loss_dot

    return in_place


def _over(old: Tensors, new: Tensors) -> tuple[Tensor | None, ...]:
    rest: list[Tensor | None] = []
    for x, y in zip(old, new, strict=True):
        # What is written to a double without dimensions is lost: the compiler takes that for a Python number.
        fits = bool(x.dim()) and x.shape == y.shape and x.dtype == y.dtype
        rest.append(None if fits else y)
        if fits:
            x.copy_(y)
    return tuple(rest)


def _replacing(step: Callable[..., Any]) -> TangentStep:
    """The step again, from one that has written over what it returns None for."""

    def replacing(carry: Tensors, carry_dot: Tensors, *others: Any) -> Any:
        after, after_dot, loss, loss_dot = step(carry, carry_dot, *others)
        return _or(after, carry), _or(after_dot, carry_dot), loss, loss_dot

    return replacing


def _or(new: Sequence[Tensor | None], old: Tensors) -> Tensors:
    return tuple(x if y is None else y for x, y in zip(old, new, strict=True))


def _copies(tensors: Tensors) -> Tensors:
    """For results that are overwritten, or are not the unroll's own."""
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)


def _along(
    function: Callable[[Tensors, Tensors], Tensor], carry: Tensors, carry_dot: Tensors, inputs: Inputs, dots: Inputs
) -> tuple[Tensor, Tensor]:
    """A scalar and its K directional derivatives, by one reverse pass and K inner products."""
    in_carry, in_shared = floating(carry), floating(inputs.shared)
    ends = [
        tensor.detach().requires_grad_() for tensor in (*chosen(carry, in_carry), *chosen(inputs.shared, in_shared))
    ]
    with torch.enable_grad():
        value = function(
            merged(carry, in_carry, ends[: len(in_carry)]), merged(inputs.shared, in_shared, ends[len(in_carry) :])
        )
    if not value.requires_grad:
        return value, torch.zeros(len((*carry_dot, *dots.shared)[0]), dtype=torch.float64, device=value.device)
    grads = torch.autograd.grad(value, ends, allow_unused=True)
    slope = torch.zeros(len((*carry_dot, *dots.shared)[0]), dtype=torch.float64, device=value.device)
    for grad, dot in zip(grads, (*carry_dot, *dots.shared), strict=True):
        if grad is not None:
            slope += (dot.reshape(len(dot), -1).to(grad.dtype) @ grad.conj().flatten()).real
    return value.detach().clone(), slope  # what it was computed from may be overwritten


def rows_along(per_step: Tensors, tangents: Tensors, steps: range) -> Iterator[tuple[int, Tensors, Tensors]]:
    """The number of each step, its row, and of the tangents, of shape (K, T, ...), those of its row."""
    for block in blocks(steps):
        # In this order strides do not tell T, for which the compiler would compile again.
        dots = tuple(tangent[:, block.start : block.stop].transpose(0, 1).contiguous() for tangent in tangents)
        yield from zip(block, rows(per_step, block), rows(dots, range(len(block))), strict=True)
