"""Running the compiled passes over the tensors of many parameters, on as many threads as torch uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaopt.kernels import layout
from metaopt.kernels.cpu import radam, rprop
from metaopt.kernels.cpu.threads import BLOCK, parallel

TYPES = {
    torch.float32: np.float32,
    torch.complex64: np.float32,
    torch.float64: np.float64,
    torch.complex128: np.float64,
}


def step(
    algorithm: str,
    kind: layout.Kind,
    table: layout.Rows,
    values: tuple[Any, ...],
    flags: dict[str, bool],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    cache: dict[Any, Any],
) -> None:
    """Update the parameters of a table in place: the arguments are those of ``gpu.launch.step``, on the CPU."""
    if found_inf is not None and found_inf.item() != 0:
        return
    numbers = [float(value) for value in values]
    precision = TYPES[kind[1]]
    scale = precision(0.0 if grad_scale is None else grad_scale.item())
    owners = layout.owners(table, BLOCK)
    if algorithm == "radam":
        lr, beta1, beta2, _, weight_decay = numbers
        coefficients = np.zeros((len(table), 3))
        radam.prepare(table, coefficients, beta1, beta2)
        scalars = np.array([*numbers, 1 - beta1, 1 - beta2, 1 - lr * weight_decay], dtype=precision)
        arguments = (coefficients.astype(precision), scalars, scale, flags["maximize"], flags["decoupled"])
        parallel(partial(radam.update, table, owners, *arguments), len(owners))
    else:
        rprop.prepare(table)
        scalars = np.array(numbers, dtype=precision)
        parallel(partial(rprop.update, table, owners, scalars, scale, flags["maximize"]), len(owners))
