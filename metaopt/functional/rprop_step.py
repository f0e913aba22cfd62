r"""The step of Rprop with its derivatives by hand.

    r = g prev        f = eta+ where r > 0, eta- where r < 0, else 1        x = f size
    size' = clamp(x, lo, hi)     prev' = g (0 where r < 0)     p' = p - sign(prev') size'

One autograd.Function keeps g, prev and size by reference, 12 bytes a float32 element. With P, Q, S for the cotangents
of p', prev' and size', everything but Q reaches its source through B = S - P sign(prev').
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What a step reads; coefficients broadcast against the parameter."""

    param: Tensor
    grad: Tensor  # negated already where one ascends
    prev: Tensor
    step_size: Tensor
    eta_minus: Tensor
    eta_plus: Tensor
    smallest: Tensor
    largest: Tensor


Result = tuple[Tensor, Tensor, Tensor]


def rprop_step(inputs: Inputs) -> Result:
    """The new parameter, last gradient and step size: of real tensors of one dtype."""
    if torch.compiler.is_compiling():
        return composed(inputs)
    result: Result = _Step.apply(*inputs)
    return result


def composed(i: Inputs) -> Result:
    """The step in torch's operations."""
    scaled, _, flipped = _scaled(i)
    # In two, because torch.clamp gives neither bound a derivative where they are equal.
    step_size = torch.clamp(torch.clamp(scaled, min=i.smallest), max=i.largest)
    grad = torch.where(flipped, 0.0, i.grad)
    return i.param - torch.sign(grad) * step_size, grad, step_size


def _scaled(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The step size before it is clamped; where the gradient has kept its sign, and where it has flipped."""
    agreement = i.grad * i.prev
    kept, flipped = agreement > 0, agreement < 0
    return i.step_size * _factor(i, kept, flipped), kept, flipped


def _factor(i: Inputs, kept: Tensor, flipped: Tensor) -> Tensor:
    return torch.where(kept, i.eta_plus, torch.where(flipped, i.eta_minus, 1.0))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Result:
        return composed(Inputs(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        param, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(param, *tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Result, tuple[int, int, int]]:
        return torch.vmap(lambda *batched: composed(Inputs(*batched)), in_dims)(*inputs), (0, 0, 0)

    @staticmethod
    def backward(ctx: Any, to_p: Any, to_prev: Any, to_size: Any) -> tuple[Any, ...]:
        i = Inputs(to_p, *ctx.saved_tensors)  # the parameter itself is not read
        wanted = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))
        scaled, kept, flipped = _scaled(i)
        through = to_size - to_p * torch.sign(torch.where(flipped, 0.0, i.grad))
        below, above = scaled < i.smallest, scaled > i.largest
        inside = torch.where(below | above, 0.0, through)

        def summed(name: str, where: Tensor, product: Tensor) -> Tensor | None:
            if not wanted[name]:
                return None
            coefficient: Tensor = getattr(i, name)
            return torch.where(where, product, 0.0).sum_to_size(coefficient.shape)

        of_factor = inside * i.step_size if wanted["eta_minus"] or wanted["eta_plus"] else inside
        return (
            to_p,
            torch.where(flipped, 0.0, to_prev) if wanted["grad"] else None,
            torch.zeros_like(i.prev) if wanted["prev"] else None,
            inside * _factor(i, kept, flipped) if wanted["step_size"] else None,
            summed("eta_minus", flipped, of_factor),
            summed("eta_plus", kept, of_factor),
            summed("smallest", below & (i.smallest <= i.largest), through),
            summed("largest", above | (below & (i.smallest > i.largest)), through),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Result:
        i, d = Inputs(*ctx.saved_tensors), Inputs(*tangents)
        scaled, kept, flipped = _scaled(i)
        zeros = torch.zeros_like(i.param)

        def of(tangent: Tensor | None) -> Tensor:
            return zeros if tangent is None else tangent.expand_as(zeros)

        to_scaled = of(d.step_size) * _factor(i, kept, flipped) + i.step_size * torch.where(
            kept, of(d.eta_plus), torch.where(flipped, of(d.eta_minus), 0.0)
        )
        to_size = torch.where(scaled < i.smallest, of(d.smallest), to_scaled)
        to_size = torch.where(torch.clamp(scaled, min=i.smallest) > i.largest, of(d.largest), to_size)
        sign = torch.sign(torch.where(flipped, 0.0, i.grad))
        return of(d.param) - sign * to_size, torch.where(flipped, 0.0, of(d.grad)), to_size
