"""Launching the differentiable steps: one kernel forward, and one backward with the end of its sums.

A step's inputs go to its kernels as the NamedTuple that they are: a parameter, what else has an element for each of
its elements, then coefficients; a switch among them goes as a constant. What a kernel writes backward is a NamedTuple
of the same fields, None where no gradient is asked for. As everywhere in this package the host waits for nothing:
coefficients on the device are read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

BLOCK = 512  # 4 elements of each tensor a thread: one 128-bit load in float32, two in float64
WARPS = 4
PER_ELEMENT = 4  # of the fields, those before the coefficients
ALIGNED = 16  # blocks' partial sums of each coefficient begin at a multiple of so many: kernels are compiled once


def forward(kernel: Any, inputs: Any, **flags: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The new parameter and the new states.

    Args:
        kernel: of the step.
        inputs: of the step, for which ``kernels.differentiable.fits`` is true.
        flags: switches of the kernel, in its capitals.
    """
    new = tuple(torch.empty_like(inputs[0]) for _ in range(3))
    _launch(kernel, inputs, (new,), flags)
    return new[0], new[1], new[2]


def backward(
    kernel: Any, inputs: Any, cotangents: Sequence[Tensor], wanted: Sequence[bool], param_as_is: bool, **flags: bool
) -> tuple[Tensor | None, ...]:
    """The gradients with respect to the inputs.

    A coefficient that stands for all elements gets the sum over them: each block writes its part, in the dtype of the
    tensors, and the parts are added in float64 and always in one order.

    Args:
        kernel: of the step, backward.
        inputs: of the step.
        cotangents: of its three results; any strides.
        wanted: for each input, whether its gradient is asked for.
        param_as_is: whether the parameter's gradient is its cotangent, which the kernel then need not write.
        flags: switches of the kernel.
    """
    cotangents = tuple(cotangent.contiguous() for cotangent in cotangents)
    like, fields = cotangents[0], inputs._fields
    names = [name for name, want in zip(fields, wanted, strict=True) if want]
    if param_as_is and wanted[0]:
        names.remove(fields[0])
    summed = [] if _each(inputs) else [name for name in names if name in fields[PER_ELEMENT:]]
    blocks = triton.cdiv(like.numel(), BLOCK)
    parts = like.new_empty(len(summed), triton.cdiv(blocks, ALIGNED) * ALIGNED)
    to = dict(zip(summed, parts.unbind(), strict=True))
    to |= {name: torch.empty_like(like) for name in names if name not in summed}
    _launch(kernel, inputs, (cotangents, inputs._make(map(to.get, fields))), flags)
    if summed:
        to |= zip(summed, parts[:, :blocks].sum(1, dtype=torch.float64).to(like.dtype).unbind(), strict=True)
    return (like if param_as_is else to.get(fields[0]), *map(to.get, fields[1:]))


def _launch(kernel: Any, inputs: Any, others: tuple[Any, ...], flags: dict[str, bool]) -> None:
    param = inputs[0]
    placed = inputs._make(_at(x, param.device) if isinstance(x, Tensor) else None for x in inputs)
    with torch.cuda.device(param.device.index if param.is_cuda else -1):  # -1: none
        kernel[(triton.cdiv(param.numel(), BLOCK),)](
            placed, *others, param.numel(), **flags, EACH=_each(inputs), BLOCK=BLOCK, num_warps=WARPS
        )


def _at(x: Tensor, device: torch.device) -> Tensor:
    """A coefficient on the CPU goes to the device as the value of a fill, which waits for nothing as a copy would."""
    return x if x.device == device else torch.full((), x.item(), dtype=x.dtype, device=device)


def _each(inputs: Any) -> bool:
    """Whether coefficients have a value for each element."""
    return any(isinstance(c, Tensor) and c.dim() > 0 for c in inputs[PER_ELEMENT:])
