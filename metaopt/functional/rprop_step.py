r"""The step of Rprop with its derivatives by hand.

    r = g prev        f = eta+ where r > 0, eta- where r < 0, else 1        x = f size
    size' = clamp(x, lo, hi)     prev' = g (0 where r < 0)     p' = p - sign(prev') size'

One autograd.Function keeps g, prev and size by reference, 12 bytes a float32 element. With P, Q, S for the cotangents
of p', prev' and size', everything but Q reaches its source through B = S - P sign(prev'). On a GPU, and for many
elements on a CPU, the step and a first derivative that is not differentiated again are a kernel each.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.kernels.differentiable import alike, fits, kernels, transformed


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
    step = _Kernels if not transformed() and fits(inputs[:4], inputs[4:]) else _Step
    result: Result = step.apply(*inputs)
    return result


def composed(i: Inputs) -> Result:
    """The step in torch's operations."""
    kept, flipped = _agreement(i)
    # In two, because torch.clamp gives neither bound a derivative where they are equal.
    step_size = torch.clamp(torch.clamp(i.step_size * _factor(i, kept, flipped), min=i.smallest), max=i.largest)
    grad = i.grad.masked_fill(flipped > 0, 0.0)
    return i.param - torch.sign(grad) * step_size, grad, step_size


def _agreement(i: Inputs) -> tuple[Tensor, Tensor]:
    """1 where the gradient has kept its sign, and 1 where it has flipped; else 0."""
    sign = torch.sign((i.grad * i.prev).detach())
    return torch.clamp(sign, min=0.0), torch.clamp(-sign, min=0.0)


def _factor(i: Inputs, kept: Tensor, flipped: Tensor) -> Tensor:
    """eta+, eta- or 1: a sum of which one term is not 0, hence exact, and several times quicker than torch.where."""
    return kept * i.eta_plus + flipped * i.eta_minus + (1.0 - kept - flipped)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Result:
        i = Inputs(*inputs)
        return _launched(i) if fits(i[:4], i[4:]) else composed(i)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        param, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(param, *tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Result, tuple[int, int, int]]:
        return torch.vmap(lambda *batched: composed(Inputs(*batched)), in_dims)(*inputs), (0, 0, 0)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        to_p, to_prev, to_size = cotangents
        i = Inputs(to_p, *ctx.saved_tensors)  # the parameter itself is not read
        if not torch.is_grad_enabled() and alike(cotangents, i.grad) and fits(i[1:4], i[4:]):
            return _pulled_back(ctx, i, cotangents)
        wanted = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))
        kept, flipped = _agreement(i)
        factor = _factor(i, kept, flipped)
        scaled = i.step_size * factor
        through = to_size - to_p * (torch.sign(i.grad) * (1.0 - flipped))
        below, above = scaled < i.smallest, scaled > i.largest
        inside = through.masked_fill(below | above, 0.0)

        def summed(name: str, product: Tensor) -> Tensor:
            coefficient: Tensor = getattr(i, name)
            return product.sum_to_size(coefficient.shape)

        return (
            to_p,
            to_prev.masked_fill(flipped > 0, 0.0) if wanted["grad"] else None,
            torch.zeros_like(i.prev) if wanted["prev"] else None,
            inside * factor if wanted["step_size"] else None,
            summed("eta_minus", inside * i.step_size * flipped) if wanted["eta_minus"] else None,
            summed("eta_plus", inside * i.step_size * kept) if wanted["eta_plus"] else None,
            summed("smallest", through.masked_fill(~below, 0.0)) if wanted["smallest"] else None,
            summed("largest", through.masked_fill(~above, 0.0)) if wanted["largest"] else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Result:
        i, d = Inputs(*ctx.saved_tensors), Inputs(*tangents)
        kept, flipped = _agreement(i)
        factor = _factor(i, kept, flipped)
        scaled = i.step_size * factor
        zeros = torch.zeros_like(i.param)

        def of(tangent: Tensor | None) -> Tensor:
            return zeros if tangent is None else tangent.expand_as(zeros)

        to_scaled = of(d.step_size) * factor + i.step_size * (kept * of(d.eta_plus) + flipped * of(d.eta_minus))
        to_size = torch.where(scaled < i.smallest, of(d.smallest), to_scaled)
        to_size = torch.where(scaled > i.largest, of(d.largest), to_size)
        sign = torch.sign(i.grad) * (1.0 - flipped)
        return of(d.param) - sign * to_size, of(d.grad).masked_fill(flipped > 0, 0.0), to_size


class _Kernels(torch.autograd.Function):
    """The same for what goes to kernels directly: torch binds no arguments and asks for no transforms."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Result:
        ctx.save_for_backward(*inputs[1:])
        return _launched(Inputs(*inputs))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or not alike(cotangents, cotangents[0]):
            return _Step.backward(ctx, *cotangents)
        return _pulled_back(ctx, Inputs(cotangents[0], *ctx.saved_tensors), cotangents)


def _launched(i: Inputs) -> Result:
    launch, kernel = kernels("rprop_step", i.param)
    result: Result = launch.forward(kernel.forward, i)
    return result


def _pulled_back(ctx: Any, i: Inputs, cotangents: Any) -> tuple[Any, ...]:
    launch, kernel = kernels("rprop_step", i.grad)
    grads: tuple[Any, ...] = launch.backward(kernel.backward, i, cotangents, ctx.needs_input_grad, param_as_is=True)
    return grads


_Step.forward.__signature__ = inspect.signature(_Step.forward)  # type: ignore[attr-defined]  # torch asks at each step
