"""Where a differentiable step can run as a kernel, forward and backward; elsewhere torch's operations stand for it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaopt.kernels.support import interpreted, refusal

# Elements, on a CPU: fewer are not worth some ten seconds of compiling, once for an installation.
LEAST = 4096


def fits(tensors: Sequence[Tensor], coefficients: Sequence[Tensor | None]) -> bool:
    """Whether a kernel can take them, and nothing that transforms the step would be lost on it.

    Args:
        tensors: what the step reads, an element of each for an element of the parameter.
        coefficients: None where an operation is left out.

    Example:
        >>> fits([torch.zeros(3, dtype=torch.float16)] * 4, [])  # nor three elements of any dtype on a CPU
        False
    """
    first = tensors[0]
    device, dtype, shape, count = first.device, first.dtype, first.shape, first.numel()
    if dtype not in (torch.float32, torch.float64) or count == 0:
        return False
    if not first.is_cuda and (count < LEAST or not first.is_cpu) and not interpreted():
        return False
    if refusal(first) is not None:
        return False
    given = [c for c in coefficients if c is not None]
    single = all(c.dim() == 0 for c in given)
    for c in given:  # else values of their own for every parameter, in an unroll of all in one vector
        if c.dtype not in (dtype, torch.bool) or not (c.device == device or (single and c.is_cpu)):
            return False
        if not (single or (c.shape == shape and c.is_contiguous())):
            return False
    return plain(given) and alike(tensors, first) and all(t.is_contiguous() for t in tensors)


def transformed() -> bool:
    """Whether a transform of torch.func is at work, for which a step needs more than a kernel."""
    return bool(torch._C._are_functorch_transforms_active())


def alike(tensors: Sequence[Tensor], like: Tensor) -> bool:
    """Whether plain tensors of any strides, as cotangents have, are of one shape, dtype and device with another."""
    device, dtype, shape = like.device, like.dtype, like.shape
    for t in tensors:
        if t.shape != shape or t.dtype != dtype or t.device != device:
            return False
    return plain(tensors)


_PLAIN = (Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether their memory is all there is to them: no subclass, no batch of vmap, no tangent of forward mode."""
    forward_mode = forward_ad._current_level >= 0
    for t in tensors:
        if type(t) not in _PLAIN or _is_wrapped(t) or _is_batched(t) or t.is_neg() or t._is_zerotensor():
            return False
        if forward_mode and forward_ad.unpack_dual(t).tangent is not None:
            return False
    return True


def kernels(step: str, like: Tensor) -> tuple[Any, Any]:
    """What runs the kernels of a step on a tensor's device (``forward``, ``backward``), and the module of the kernels.

    Args:
        step: its module's name.
        like: a tensor for which ``fits`` is true.
    """
    return _modules(step, "gpu" if like.is_cuda or interpreted() else "cpu")


@functools.cache
def _modules(step: str, device: str) -> tuple[Any, Any]:
    room = f"metaopt.kernels.{device}"
    return importlib.import_module(f"{room}.differentiable"), importlib.import_module(f"{room}.{step}")
