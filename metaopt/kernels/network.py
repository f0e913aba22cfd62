"""Where the network of a learned optimizer can run as one kernel; elsewhere torch's products stand for it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.kernels.differentiable import LEAST, plain
from metaopt.kernels.support import refusal

WIDTH = 16  # units of a hidden layer: of fewer torch's products are quicker


def fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a kernel can take features, (k, n), with the weights of a network, and nothing is differentiated.

    Args:
        x: the features.
        weights: the weight and the bias of each layer in turn.

    Example:
        >>> layer = [torch.zeros(32, 32), torch.zeros(32)]
        >>> fits(torch.zeros(32, 10_000, requires_grad=True), layer)
        False
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.shape[1] < LEAST or not serves(weights[0]):
        return False
    tensors = (x, *weights)
    alike = all(t.dtype == torch.float32 and t.is_cpu for t in tensors)
    return alike and x.is_contiguous() and plain(tensors)


def serves(hidden: Tensor) -> bool:
    """Whether there is a kernel for networks with hidden layers of this many units, dtype and device.

    Args:
        hidden: has the units of a hidden layer in its first dimension.
    """
    return hidden.is_cpu and hidden.dtype == torch.float32 and len(hidden) >= WIDTH and refusal(hidden) is None


def run(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The network's two outputs, (2, n), for what ``fits``: of weights (out, in) and biases (out,) of three layers."""
    outputs: Tensor = _kernel().run(layers, x)
    return outputs


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("metaopt.kernels.cpu.network")
