"""Where a differentiable step can run as a kernel, forward and backward; elsewhere torch's operations stand for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaopt.kernels.support import interpreted, refusal


def fits(tensors: Sequence[Tensor], coefficients: Sequence[Tensor | None], cotangents: Sequence[Tensor] = ()) -> bool:
    """Whether a kernel can take them, and nothing that transforms the step would be lost on it.

    Args:
        tensors: what the step reads, an element of each for an element of the parameter.
        coefficients: None where an operation is left out.
        cotangents: of the results; any strides.

    Example:
        >>> fits([torch.zeros(3, dtype=torch.float16)] * 4, [])  # nor anything on a CPU, but in Triton's interpreter
        False
    """
    first = tensors[0]
    if not (first.is_cuda or interpreted()) or first.dtype not in (torch.float32, torch.float64):
        return False
    if refusal(first) is not None or first.numel() == 0:
        return False
    given = [c for c in coefficients if c is not None]
    per_element = (*tensors, *cotangents)
    if all(c.dim() == 0 for c in given):
        placed = all(c.device in (first.device, _CPU) for c in given)
    else:  # values of their own for every parameter, in an unroll of all in one vector
        placed = all(c.shape == first.shape and c.device == first.device and c.is_contiguous() for c in given)
    return (
        placed
        and all((t.shape, t.dtype, t.device) == (first.shape, first.dtype, first.device) for t in per_element)
        and all(t.is_contiguous() for t in tensors)
        and all(_is_its_memory(t) for t in (*per_element, *given))
    )


_CPU = torch.device("cpu")


def _is_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor's memory is all there is to it: no subclass, no batch of vmap, no tangent of forward mode."""
    functorch = torch._C._functorch
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not functorch.is_functorch_wrapped_tensor(tensor)
        and not functorch.is_legacy_batchedtensor(tensor)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and forward_ad.unpack_dual(tensor).tangent is None
    )
