"""Running the differentiable steps: one compiled pass forward, and one backward with its sums.

A step's inputs go to its pass as addresses, in the order of their NamedTuple; an operation that is left out is 0 there,
and a switch 0 or 1. So do the gradients that are written: 0 where none is asked for. The functions are those of
``gpu.differentiable``, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaopt.kernels.cpu.threads import BLOCK, parallel

PER_ELEMENT = 4  # of the fields, those before the coefficients
ONE = {torch.float32: np.float32(1), torch.float64: np.float64(1)}


def forward(kernel: Any, inputs: Any, **flags: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The new parameter and the new states.

    Args:
        kernel: of the step.
        inputs: of the step, for which ``kernels.differentiable.fits`` is true.
        flags: among the inputs too, and not read.
    """
    param = inputs[0]
    new = torch.empty_like(param), torch.empty_like(param), torch.empty_like(param)
    _launch(kernel, inputs, new)
    return new


def backward(
    kernel: Any, inputs: Any, cotangents: Sequence[Tensor], wanted: Sequence[bool], param_as_is: bool, **flags: bool
) -> tuple[Tensor | None, ...]:
    """The gradients with respect to the inputs.

    A coefficient that stands for all elements gets the sum over them, whose terms have the dtype of the tensors and are
    added in float64.

    Args:
        kernel: of the step, backward.
        inputs: of the step.
        cotangents: of its three results; any strides.
        wanted: for each input, whether its gradient is asked for.
        param_as_is: whether the parameter's gradient is its cotangent, which the pass then need not write.
        flags: not read.
    """
    cotangents = [cotangent.contiguous() for cotangent in cotangents]
    like, each = cotangents[0], _each(inputs)
    written = len(wanted) if each else PER_ELEMENT
    to: list[Any] = [torch.empty_like(like) if want else None for want in wanted[:written]]
    if param_as_is:
        to[0] = None
    sums = _launch(kernel, inputs, cotangents, [*to, *wanted[written:]])
    if param_as_is and wanted[0]:
        to[0] = like
    if not each:
        total = (sums[0] if len(sums) == 1 else sum(sums)).tolist()
        to += [like.new_tensor(total[at]) if want else None for at, want in enumerate(wanted) if at >= written]
    return tuple(to)


def _launch(kernel: Any, inputs: Any, *others: Sequence[Any]) -> list[Any]:
    param = inputs[0]
    count = param.numel()
    addresses = [tuple([_address(x) for x in group]) for group in (inputs, *others)]
    return parallel(partial(kernel, *addresses, _each(inputs), count, ONE[param.dtype]), -(-count // BLOCK))


def _each(inputs: Any) -> bool:
    """Whether coefficients have a value for each element: all, or none."""
    return bool(inputs[PER_ELEMENT].dim())


def _address(x: Tensor | bool | None) -> int:
    return x.data_ptr() if isinstance(x, Tensor) else int(x or 0)
