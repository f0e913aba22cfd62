r"""The step of Adam and RAdam with its derivatives by hand.

    h  = s g + wd p               m' = b1 m + w1 h              v' = b2 v + w2 h^2
    d  = sqrt(v') / k + eps       u  = m' / d  (m' where a RAdam step is not rectified)
    p' = dk p - sd u

One autograd.Function keeps p, g, m and v by reference, 16 bytes a float32 element; recorded operation by operation the
same step keeps about twice that, and runs slower. The formulas below are those of its vector-Jacobian product, with P,
M, V for the cotangents of p', m', v', and of its Jacobian-vector product; both are made of torch operations, so that
derivatives of any order follow. Under torch.compile, which makes its own, and under vmap, the operations stand for
themselves; on a GPU, and for many elements on a CPU, the step and a first derivative that is not differentiated again
are a kernel each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.kernels.differentiable import alike, fits, kernels, transformed
from metaopt.numerics import safe_sqrt


class Inputs(NamedTuple):
    """What a step reads; coefficients broadcast against the parameter, and None leaves an operation out."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    beta1: Tensor  # b1
    weight1: Tensor  # w1 = 1 - b1
    beta2: Tensor  # b2
    weight2: Tensor  # w2 = 1 - b2
    step_size: Tensor  # sd
    eps: Tensor
    root_correction: Tensor | None  # k, of Adam
    weight_decay: Tensor | None  # wd
    shrink: Tensor | None  # dk
    rectified: Tensor | None  # a flag, of RAdam
    maximize: bool  # s = -1


class _Gradients(NamedTuple):
    """A gradient or a tangent for each of them; None is 0."""

    param: Tensor | None
    grad: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    beta1: Tensor | None
    weight1: Tensor | None
    beta2: Tensor | None
    weight2: Tensor | None
    step_size: Tensor | None
    eps: Tensor | None
    root_correction: Tensor | None
    weight_decay: Tensor | None
    shrink: Tensor | None
    rectified: None
    maximize: None


Result = tuple[Tensor, Tensor, Tensor]


def moments_step(inputs: Inputs) -> Result:
    """The new parameter and moments: of real tensors of one dtype."""
    if torch.compiler.is_compiling():
        return composed(inputs)
    step = _Kernels if not transformed() and fits(inputs[:4], inputs[4:-1]) else _Step
    result: Result = step.apply(*inputs)
    return result


def composed(i: Inputs, root: Callable[[Tensor], Tensor] = safe_sqrt) -> Result:
    """The step in torch's operations, with a square root that can be differentiated at 0."""
    param, h = i.param, _ascent(i)
    exp_avg = i.beta1 * i.exp_avg + i.weight1 * h
    # torch's order of products, which overflows where torch does and not earlier; so do the derivatives below.
    exp_avg_sq = i.beta2 * i.exp_avg_sq + (i.weight2 * h) * h
    # Here too: a small step size first, and then a small denominator.
    plain = i.step_size * exp_avg
    change = plain / _denominator(i, root(exp_avg_sq))
    if i.rectified is not None:
        change = torch.where(i.rectified, change, plain)
    if i.shrink is not None:
        param = i.shrink * param
    return param - change, exp_avg, exp_avg_sq


def _ascent(i: Inputs) -> Tensor:
    grad = -i.grad if i.maximize else i.grad
    return grad if i.weight_decay is None else grad + i.weight_decay * i.param


def _denominator(i: Inputs, root: Tensor) -> Tensor:
    return (root if i.root_correction is None else root / i.root_correction) + i.eps


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Result:
        i = Inputs(*inputs)  # under a transform what the step is given may not fit, and what arrives here does
        return _launched(i) if fits(i[:4], i[4:-1]) else composed(i, root=torch.sqrt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.maximize = inputs
        # The moments cost nothing to keep: the next step keeps them too.
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Result, tuple[int, int, int]]:
        return torch.vmap(lambda *batched: composed(Inputs(*batched)), in_dims)(*inputs), (0, 0, 0)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        *tensors, exp_avg, exp_avg_sq = ctx.saved_tensors
        i = Inputs(*(*tensors, ctx.maximize))
        if not torch.is_grad_enabled() and alike(cotangents, i.param) and fits(i[:4], i[4:-1]):
            return _pulled_back(ctx, i, cotangents)
        to_p, to_m, to_v = cotangents
        h = _ascent(i)
        moved = i.step_size * to_p
        # Through the direction: where it is m' / d, into d and m'; else into m' alone.
        adaptive = _known(i.rectified)
        to_eps: Tensor | None = None
        to_k: Tensor | None = None
        if adaptive is False:
            direction, to_m = exp_avg, to_m - moved
        else:
            root = _root(exp_avg_sq)
            denominator = _denominator(i, root)
            ratio = exp_avg / denominator
            through = moved / denominator
            to_eps = through * ratio
            if adaptive is None:
                assert i.rectified is not None
                direction = torch.where(i.rectified, ratio, exp_avg)
                to_m = to_m - torch.where(i.rectified, through, moved)
                to_eps = torch.where(i.rectified, to_eps, 0.0)
            else:
                direction, to_m = ratio, to_m - through
            to_root = to_eps
            if i.root_correction is not None:
                to_root = to_eps / i.root_correction
                to_k = -to_root * root / i.root_correction
            to_v = to_v + _through_root(to_root, exp_avg_sq, root)
        to_h = i.weight1 * to_m + 2.0 * ((i.weight2 * h) * to_v)
        to_param = to_p if i.shrink is None else i.shrink * to_p
        if i.weight_decay is not None:
            to_param = to_param + i.weight_decay * to_h
        wanted = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))

        def summed(name: str, *factors: Tensor) -> Tensor | None:
            """The cotangent of a coefficient: over all elements that it stands for."""
            if not wanted[name]:
                return None
            coefficient: Tensor = getattr(i, name)
            product = factors[0] if len(factors) == 1 else factors[0] * factors[1]
            return product.sum_to_size(coefficient.shape)

        return _Gradients(
            param=to_param,
            grad=-to_h if i.maximize else to_h,
            exp_avg=i.beta1 * to_m,
            exp_avg_sq=i.beta2 * to_v,
            beta1=summed("beta1", to_m, i.exp_avg),
            weight1=summed("weight1", to_m, h),
            beta2=summed("beta2", to_v, i.exp_avg_sq),
            weight2=summed("weight2", to_v * h, h) if wanted["weight2"] else None,
            step_size=summed("step_size", -to_p, direction) if wanted["step_size"] else None,
            eps=torch.zeros_like(i.eps) if to_eps is None else summed("eps", to_eps),
            root_correction=None if to_k is None else summed("root_correction", to_k),
            weight_decay=summed("weight_decay", to_h, i.param),
            shrink=summed("shrink", to_p, i.param),
            rectified=None,
            maximize=None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        i = Inputs(*(*ctx.saved_tensors, ctx.maximize))
        d = _Gradients(*tangents)
        h = _ascent(i)
        to_h = _product(i.weight_decay, d.param, d.weight_decay, i.param)
        if d.grad is not None:
            to_h = _sum(to_h, -d.grad if i.maximize else d.grad)
        exp_avg = i.beta1 * i.exp_avg + i.weight1 * h
        exp_avg_sq = i.beta2 * i.exp_avg_sq + (i.weight2 * h) * h
        to_m = _sum(_product(i.beta1, d.exp_avg, d.beta1, i.exp_avg), _product(i.weight1, to_h, d.weight1, h))
        to_v = _sum(
            _product(i.beta2, d.exp_avg_sq, d.beta2, i.exp_avg_sq),
            _product(
                i.weight2 * h, None if to_h is None else 2.0 * to_h, None if d.weight2 is None else d.weight2 * h, h
            ),
        )
        root = _root(exp_avg_sq)
        denominator = _denominator(i, root)
        ratio = exp_avg / denominator
        to_root = None if to_v is None else _through_root(to_v, exp_avg_sq, root)
        if i.root_correction is not None:
            to_root = _sum(
                None if to_root is None else to_root / i.root_correction,
                None if d.root_correction is None else -d.root_correction * root / i.root_correction**2,
            )
        to_d = _sum(to_root, d.eps)
        to_ratio = _sum(to_m, None if to_d is None else -ratio * to_d)
        to_ratio = None if to_ratio is None else to_ratio / denominator
        direction = ratio
        if i.rectified is not None:
            direction = torch.where(i.rectified, ratio, exp_avg)
            zeros = torch.zeros_like(exp_avg)
            to_ratio = torch.where(
                i.rectified, zeros if to_ratio is None else to_ratio, zeros if to_m is None else to_m
            )
        to_p = d.param if i.shrink is None else _product(i.shrink, d.param, d.shrink, i.param)
        step = _product(i.step_size, to_ratio, d.step_size, direction)
        to_p = _sum(to_p, None if step is None else -step)
        return tuple(
            torch.zeros_like(like) if tangent is None else tangent.expand_as(like)
            for tangent, like in ((to_p, i.param), (to_m, i.exp_avg), (to_v, i.exp_avg_sq))
        )


class _Kernels(torch.autograd.Function):
    """The same for what goes to kernels directly: torch binds no arguments and asks for no transforms."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Result:
        *tensors, ctx.maximize = inputs
        result = _launched(Inputs(*inputs))
        ctx.save_for_backward(*tensors, *result[1:])
        return result

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or not alike(cotangents, cotangents[0]):
            return _Step.backward(ctx, *cotangents)
        *tensors, _, _ = ctx.saved_tensors
        return _pulled_back(ctx, Inputs(*(*tensors, ctx.maximize)), cotangents)


def _launched(i: Inputs) -> Result:
    launch, kernel = kernels("moments_step", i.param)
    result: Result = launch.forward(kernel.forward, i, MAXIMIZE=i.maximize)
    return result


def _pulled_back(ctx: Any, i: Inputs, cotangents: Any) -> tuple[Any, ...]:
    launch, kernel = kernels("moments_step", i.param)
    as_is, flags = i.shrink is None and i.weight_decay is None, {"MAXIMIZE": i.maximize}
    grads: tuple[Any, ...] = launch.backward(kernel.backward, i, cotangents, ctx.needs_input_grad, as_is, **flags)
    return grads


_Step.forward.__signature__ = inspect.signature(_Step.forward)  # type: ignore[attr-defined]  # torch asks at each step


def _root(x: Tensor) -> Tensor:
    return safe_sqrt(x) if torch.is_grad_enabled() else torch.sqrt(x)


def _through_root(slope: Tensor, x: Tensor, root: Tensor) -> Tensor:
    """``slope / (2 root)``, and 0 where ``x`` is: there the slope of the root is taken as 0."""
    if torch.is_grad_enabled():  # differentiated again: the quotient must be finite before it is replaced
        dead = x == 0
        return torch.where(dead, 0.0, slope / (2.0 * torch.where(dead, 1.0, root)))
    return (slope / (root + root)).masked_fill_(x == 0, 0.0)


def _known(rectified: Tensor | None) -> bool | None:
    """Whether every element's step is adaptive, where that can be read without waiting for a device."""
    if rectified is None:
        return True
    if rectified.dim() == 0 and rectified.device.type == "cpu":
        try:
            return bool(rectified)
        except RuntimeError:  # batched by vmap
            return None
    return None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _product(x: Tensor | None, to_y: Tensor | None, to_x: Tensor | None, y: Tensor) -> Tensor | None:
    """The tangent of ``x y``; None is 0."""
    return _sum(None if to_y is None or x is None else x * to_y, None if to_x is None else to_x * y)
