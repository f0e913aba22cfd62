r"""The coordinatewise LSTM: a small recurrent network per element, all of one set of weights.

h, c <- LSTM(LSTM(preprocess(g)), h, c)            p <- p + lr 0.1 (w h + b)
preprocess(g) = (log|g| / 10, sign g)   where |g| >= e^-10,   (-1, e^10 g)   elsewhere
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.functional.optimizer import Params
from metaopt.functional.values import Once
from metaopt.learned.base import LearnedOptimizer, Weights

LAYERS = 2


class LSTMState(NamedTuple):
    """``hidden`` and ``cell``: (2 layers, units, *shape) for each parameter."""

    step: Params
    hidden: Params
    cell: Params


class LSTMOptimizer(LearnedOptimizer):
    """The LSTM of Andrychowicz et al.: two layers of 20 units for every element, 5,141 weights.

    It reads the size and the sign of the gradient, see `preprocess`. The step is its output times ``output_scale``.
    Weights are uniform between ``-1 / sqrt(units)`` and ``1 / sqrt(units)``, as in torch.nn.LSTM; untrained, the output
    has a root mean square of about .1 (.004 to .23 over 50 seeds), most of it the same whatever the gradient.

    As published, but for two things: a gate has one bias and not two; and the derivative of the inner gradients is
    kept, as everywhere in this package, where the paper drops it.

    Args:
        units: of each layer, >= 1.
        output_scale: of the step.
        lr: what every step is multiplied by, >= 0.

    Raises:
        ValueError: ``units`` below 1, a negative ``lr``.

    Example:
        >>> opt = LSTMOptimizer()
        >>> opt
        LSTMOptimizer(units=20, output_scale=0.1, lr=1.0; 5,141 weights)
        >>> params = {"weight": torch.ones(3, 2)}
        >>> params, state = opt.step(params, {"weight": torch.randn(3, 2)}, opt.init(params))
        >>> state.hidden["weight"].shape
        torch.Size([2, 20, 3, 2])

    References:
        Andrychowicz et al., Learning to Learn by Gradient Descent by Gradient Descent, NeurIPS 2016, section 2.1 and
        appendix A.
    """

    State = LSTMState
    architecture = "lstm"
    coordinatewise = True  # `change` may be called on any part of a tensor

    def __init__(self, units: int = 20, output_scale: float = 0.1, lr: float = 1.0) -> None:
        super().__init__(lr)
        if units < 1:
            raise ValueError(f"units must be >= 1, got units={units}")
        self.units, self.output_scale = units, output_scale
        # Rows of a layer's matrix: input, forget, cell and output gates; columns: its inputs, then its hidden state.
        shapes = {
            "gates1": (4 * units, 2 + units),
            "gates1_bias": (4 * units,),
            "gates2": (4 * units, 2 * units),
            "gates2_bias": (4 * units,),
            "output": (1, units),
            "output_bias": (1,),
        }
        bound = 1 / math.sqrt(units)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def config(self) -> dict[str, Any]:
        return {"units": self.units, "output_scale": self.output_scale, "lr": self.lr}

    def init_leaf(self, param: Tensor) -> tuple[Tensor, Tensor]:
        shape = (LAYERS, self.units, *param.shape)
        return param.new_zeros(shape), param.new_zeros(shape)

    def change(
        self, param: Tensor, grad: Tensor, step: Tensor, state: tuple[Tensor, ...], weights: Weights, once: Once
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, cell = state
        x = preprocess(grad.reshape(-1))
        after = []
        for layer, h, c in zip((1, 2), _elements(hidden), _elements(cell), strict=True):
            gates = weights[f"gates{layer}"] @ torch.cat([x, h]) + weights[f"gates{layer}_bias"][:, None]
            i, f, g, o = gates.chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(c)
            after.append((x, c))
        change = self.output_scale * (weights["output"] @ x + weights["output_bias"][:, None])
        hidden, cell = (torch.stack(part).view_as(hidden) for part in zip(*after, strict=True))
        return change.view_as(param), hidden, cell


def preprocess(grad: Tensor, p: float = 10.0) -> Tensor:
    """The size of a gradient on a logarithmic scale, and its sign; smooth where it is tiny.

    Args:
        grad: (n,).
        p: gradients below ``e^-p`` are tiny.

    Returns:
        Shape (2, n): ``(log|g| / p, sign g)``, or ``(-1, e^p g)`` where the gradient is tiny.

    Example:
        >>> preprocess(torch.tensor([0.0, 1.0, -math.e**5]))
        tensor([[-1.0000,  0.0000,  0.5000],
                [ 0.0000,  1.0000, -1.0000]])
    """
    size = grad.abs()
    large = size >= math.exp(-p)
    # The logarithm of a zero would be NaN in the backward pass, selected or not.
    log = torch.log(torch.where(large, size, 1.0)) / p
    return torch.stack([torch.where(large, log, -1.0), torch.where(large, torch.sign(grad), math.exp(p) * grad)])


def _elements(state: Tensor) -> tuple[Tensor, ...]:
    """Per layer, (units, n)."""
    return state.reshape(LAYERS, state.shape[1], -1).unbind()
