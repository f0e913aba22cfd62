"""Networks as pure functions of a dict of weights, whose initialisation can be vmapped.

A module draws its weights in place, which vmap cannot make different for each task; these draw them by torch.rand:

    >>> net = Dense(40, 32, 10)
    >>> draws = torch.vmap(lambda _: net.init(None), randomness="different")(torch.zeros(5))
    >>> draws["w1"].shape
    torch.Size([5, 40, 32])
    >>> net(net.init(None), torch.zeros(7, 40)).shape
    torch.Size([7, 10])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

Params = dict[str, Tensor]


class Network(Protocol):
    """Weights, and what they make of inputs of shape (n, ...)."""

    def init(self, generator: Generator | None) -> Params: ...

    def __call__(self, params: Params, x: Tensor) -> Tensor: ...


def _uniform(shape: tuple[int, ...], fan_in: int, generator: Generator | None) -> Tensor:
    """Torch's default for layers: uniform between ``-1 / sqrt(fan_in)`` and ``1 / sqrt(fan_in)``."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)


class Dense:
    """Linear layers with an activation between: weights ``w1`` (in, out), ``b1`` (out,), and so on.

    Args:
        sizes: of the (flattened) input, of each hidden layer, of the output.
        activation: between the layers.

    Raises:
        ValueError: fewer than two sizes, or one below 1.

    Example:
        >>> {name: tuple(p.shape) for name, p in Dense(1, 40, 1).init(None).items()}
        {'w1': (1, 40), 'b1': (40,), 'w2': (40, 1), 'b2': (1,)}
    """

    def __init__(self, *sizes: int, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more, each >= 1, got sizes={sizes}")
        self.sizes = sizes
        self.activation = activation

    def init(self, generator: Generator | None) -> Params:
        """Weights and biases, as torch.nn.Linear distributes them."""
        params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False), start=1):
            params[f"w{layer}"] = _uniform((fan_in, fan_out), fan_in, generator)
            params[f"b{layer}"] = _uniform((fan_out,), fan_in, generator)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Shape (n, out) for inputs of shape (n, ...)."""
        x = x.flatten(1)
        for layer in range(1, len(self.sizes)):
            x = x @ params[f"w{layer}"] + params[f"b{layer}"]
            if layer < len(self.sizes) - 1:
                x = self.activation(x)
        return x


class Conv:
    """3x3 convolutions of stride 2 with ReLU, and a linear layer on what is left: weights ``w1``, ``b1``, and so on.

    Args:
        channels: of the input, and of each convolution.
        side: pixels a side of the input.
        outputs: of the linear layer.

    Raises:
        ValueError: fewer than two channels, or a number below 1.

    Example:
        >>> net = Conv(1, 16, 32, side=20, outputs=5)
        >>> net(net.init(None), torch.zeros(7, 1, 20, 20)).shape
        torch.Size([7, 5])
    """

    def __init__(self, *channels: int, side: int, outputs: int) -> None:
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(f"channels must be two or more, each >= 1, got channels={channels}")
        if side < 1 or outputs < 1:
            raise ValueError(f"side and outputs must be >= 1, got side={side} and outputs={outputs}")
        self.channels = channels
        self.outputs = outputs
        for _ in channels[1:]:
            side = (side + 1) // 2
        self.features = channels[-1] * side**2

    def init(self, generator: Generator | None) -> Params:
        """Weights and biases, as torch.nn.Conv2d and torch.nn.Linear distribute them."""
        params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(self.channels, self.channels[1:], strict=False), start=1):
            params[f"w{layer}"] = _uniform((fan_out, fan_in, 3, 3), 9 * fan_in, generator)
            params[f"b{layer}"] = _uniform((fan_out,), 9 * fan_in, generator)
        last = len(self.channels)
        params[f"w{last}"] = _uniform((self.features, self.outputs), self.features, generator)
        params[f"b{last}"] = _uniform((self.outputs,), self.features, generator)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Shape (n, outputs) for images of shape (n, channels, side, side)."""
        last = len(self.channels)
        for layer in range(1, last):
            x = torch.relu(nn.functional.conv2d(x, params[f"w{layer}"], params[f"b{layer}"], stride=2, padding=1))
        return x.flatten(1) @ params[f"w{last}"] + params[f"b{last}"]
