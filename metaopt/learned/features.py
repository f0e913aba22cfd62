"""What learned optimizers read: features (k, n) of the n elements of a parameter; and small networks of these.

Features come first, so that every one of them is a contiguous vector.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from metaopt.kernels import network as kernel
from metaopt.learned.base import Weights

TIMESCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)


def averaged(average: Tensor, value: Tensor, rate: Tensor) -> Tensor:
    """Running averages at several rates: ``average + rate (value - average)``.

    Args:
        average: (k, *shape).
        value: (*shape).
        rate: 1 - decay, (k,).
    """
    rate = rate.view(-1, *[1] * value.dim())
    if torch.is_grad_enabled() or average.dtype != value.dtype:
        return average + rate * (value - average)
    return torch.lerp(average, value, rate)  # in one pass


def time_features(step: Tensor, dtype: torch.dtype) -> Tensor:
    """``tanh(t / s - 1)`` for the time scales s = 1, 3, 10, ..., 100,000: shape (11,).

    Args:
        step: t, 0-d.
        dtype: of the result.

    Example:
        >>> time_features(torch.tensor(30.0), torch.float32)[:5]
        tensor([ 1.0000,  1.0000,  0.9640,  0.0000, -0.6044])
    """
    return torch.tanh(step.to(dtype) / torch.tensor(TIMESCALES, dtype=dtype, device=step.device) - 1)


def register(module: nn.Module, *sizes: int) -> None:
    """Give a module the weights of a network: ``weight1`` (out, in), ``bias1`` (out,), and so on.

    Weights are drawn from a normal distribution of variance 1 / in, cut at two deviations; biases are 0.
    """
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), start=1):
        std = 1 / math.sqrt(fan_in)
        weight = nn.init.trunc_normal_(torch.empty(fan_out, fan_in), 0, std, -2 * std, 2 * std)
        module.register_parameter(f"weight{layer}", nn.Parameter(weight))
        module.register_parameter(f"bias{layer}", nn.Parameter(torch.zeros(fan_out)))


def network(weights: Weights, x: Tensor, time: Tensor, squares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two hidden layers of rectifiers on normalised features and the time: two outputs, each of shape (n,).

    Args:
        weights: as `register` makes them.
        x: features (k, n). Each is divided by its root mean square over the elements.
        time: features that all elements share (m,).
        squares: the mean squares: (k,) if the n elements are a part of their tensor, (k, n) if they are of several.
    """
    k = x.shape[0]
    scale = torch.rsqrt((x.square().mean(1) if squares is None else squares) + 1e-5)
    # A scale and a shared feature enter through the first layer: nothing of size n is made for them.
    first, bias = weights["weight1"][:, :k], weights["weight1"][:, k:] @ time + weights["bias1"]
    if scale.dim() == 2:
        x = x * scale
    else:
        first = first * scale
    layers = [(first, bias), *((weights[f"weight{layer}"], weights[f"bias{layer}"]) for layer in (2, 3))]
    if kernel.fits(x, [part for layer in layers for part in layer]):
        direction, magnitude = kernel.run(layers, x)
        return direction, magnitude
    h = torch.addmm(bias[:, None], first, x).relu_()
    h = torch.addmm(weights["bias2"][:, None], weights["weight2"], h).relu_()
    direction, magnitude = torch.addmm(weights["bias3"][:, None], weights["weight3"], h)
    return direction, magnitude
