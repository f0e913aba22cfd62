"""A tiny MLP on the quantities of Adafactor: cheap enough to run beside hand-designed optimizers.

m, v, row, col: averages of g, g^2, and of g^2 over columns and rows, with learned decays
x = (g, p, m, v, m / sqrt v, 1 / sqrt v, and the same of row and col) / rms over the tensor, tanh(t / s - 1)
d, a = MLP(x)                              p <- p - lr 0.001 d exp(0.001 a)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.functional.optimizer import Params
from metaopt.functional.values import Once
from metaopt.learned.base import LearnedOptimizer, Weights
from metaopt.learned.features import TIMESCALES, averaged, network, register, time_features

DECAYS = (0.9, 0.99, 0.999)
SECOND_MOMENT_DECAYS = (0.999,)
FACTORED_DECAYS = (0.9, 0.99, 0.999)
FEATURES = 28


class AdafactorMLPState(NamedTuple):
    """The averages of each parameter.

    Attributes:
        momenta: (3, *shape).
        second_moment: (1, *shape).
        row: (3, *shape without its largest dimension); of a vector or scalar (3, *shape), the second moments.
        column: (3, *shape without its second largest dimension); of a vector or scalar empty, (3, 0).
    """

    step: Params
    momenta: Params
    second_moment: Params
    row: Params
    column: Params


class AdafactorMLPOptimizer(LearnedOptimizer):
    """The small MLP on Adafactor's features of Metz et al. (``small_fc_lopt``): 39 features, 197 weights.

    The features of an element, in this order; 1 to 28 are divided by ``sqrt(mean of squares over its tensor + 1e-5)``.
    Averages start at 0, uncorrected. ``row`` and ``col`` are averages of g^2 over the largest dimension of a tensor and
    over the second largest, with decays .9, .99, .999; of a vector or scalar both are the average of g^2 itself.

    1. the gradient
    2. the parameter's value
    3. to 5. m: averages of the gradient, decays .9, .99, .999
    6. v: average of g^2, decay .999
    7. to 9. ``m / sqrt(v + 1e-6)``
    10. ``1 / sqrt(v + 1e-6)``
    11. to 13. the gradient as Adafactor scales it, ``g / sqrt(row col / mean of row)``
    14. to 16. row
    17. to 19. col
    20. to 22. ``1 / sqrt(row + 1e-8)``
    23. to 25. ``1 / sqrt(col + 1e-8)``
    26. to 28. m as Adafactor scales it
    29. to 39. ``tanh(t / s - 1)`` for s = 1, 3, 10, 30, ..., 100,000, where t counts the steps taken

    The outputs d and a change the parameter by ``-lr step_scale d exp(magnitude_scale a)``. Untrained, the root mean
    square of d is about .2 (.01 to .87 over 50 seeds): small steps in a random direction.

    The seven decays are learned too, as offsets x that start at 0: ``1 - decay = sigmoid(logit(1 - decay_0) + 10 x)``.
    The published code has ``(1 - decay_0) exp(10 x)``, nearly the same, but clipped at 1 or beyond it.

    Args:
        hidden: units of a hidden layer, >= 1.
        step_scale: the scale of a step.
        magnitude_scale: the scale of its logarithm.
        lr: what every step is multiplied by, >= 0.

    Raises:
        ValueError: ``hidden`` below 1, a negative ``lr``.

    Example:
        >>> opt = AdafactorMLPOptimizer()
        >>> opt
        AdafactorMLPOptimizer(hidden=4, step_scale=0.001, magnitude_scale=0.001, lr=1.0; 197 weights)
        >>> params = {"weight": torch.ones(3, 2)}
        >>> params, state = opt.step(params, {"weight": torch.randn(3, 2)}, opt.init(params))
        >>> state.row["weight"].shape, state.column["weight"].shape
        (torch.Size([3, 2]), torch.Size([3, 3]))

    References:
        Metz et al., Practical Tradeoffs between Memory, Compute, and Performance in Learned Optimizers, CoLLAs 2022,
        section on small_fc_lopt and its appendix. Shazeer & Stern, Adafactor, ICML 2018, algorithm 2.
    """

    State = AdafactorMLPState
    architecture = "adafactor_mlp"

    def __init__(
        self, hidden: int = 4, step_scale: float = 0.001, magnitude_scale: float = 0.001, lr: float = 1.0
    ) -> None:
        super().__init__(lr)
        if hidden < 1:
            raise ValueError(f"hidden must be >= 1, got hidden={hidden}")
        self.hidden, self.step_scale, self.magnitude_scale = hidden, step_scale, magnitude_scale
        register(self, FEATURES + len(TIMESCALES), hidden, hidden, 2)
        self.decays = nn.Parameter(torch.zeros(len(DECAYS)))
        self.second_moment_decays = nn.Parameter(torch.zeros(len(SECOND_MOMENT_DECAYS)))
        self.factored_decays = nn.Parameter(torch.zeros(len(FACTORED_DECAYS)))

    def config(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden,
            "step_scale": self.step_scale,
            "magnitude_scale": self.magnitude_scale,
            "lr": self.lr,
        }

    def init_leaf(self, param: Tensor) -> tuple[Tensor, ...]:
        momenta, second_moment = len(DECAYS), len(SECOND_MOMENT_DECAYS)
        row, column = _factored_shapes(param.shape)
        return (
            param.new_zeros(momenta, *param.shape),
            param.new_zeros(second_moment, *param.shape),
            param.new_zeros(len(FACTORED_DECAYS), *row),
            param.new_zeros(len(FACTORED_DECAYS), *column),
        )

    def change(
        self, param: Tensor, grad: Tensor, step: Tensor, state: tuple[Tensor, ...], weights: Weights, once: Once
    ) -> tuple[Tensor, ...]:
        m, v, row, column = state
        if param.dim() >= 2:
            row, column = self._factor(grad, row, column, _mean_square, weights, once)
        parts = _parts(m, v, row, column)
        new = self.accumulate(grad, parts, weights, once)
        x = self.features(param, grad, (*new, *parts[len(new) :]))
        m, v, row = (*new, row)[:3]
        return self.react(x, None, step, weights, once).view_as(param), m, v, row, column

    # The same in parts, for those who step a large tensor in chunks.

    def share(
        self, grad: Tensor, state: tuple[Tensor, ...], weights: Weights, once: Once
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What needs all of a tensor: the state with its new row and column, and as views that end in its shape."""
        m, v, row, column = state
        if grad.dim() >= 2:
            row, column = self._factor(grad, row, column, _mean_square_in_place, weights, once)
        parts = _parts(m, v, row, column)
        return (m, v, row, column), tuple(part.expand(-1, *grad.shape) for part in parts)

    def accumulate(self, grad: Tensor, parts: tuple[Tensor, ...], weights: Weights, once: Once) -> tuple[Tensor, ...]:
        """The first parts after this gradient: m, v, and row where that is as large."""
        m, v, *rest = parts
        m = averaged(m, grad, once(_momentum_rates, weights["decays"]))
        v = averaged(v, grad.square(), once(_second_moment_rates, weights["second_moment_decays"]))
        if len(rest) > 1:
            return m, v
        return m, v, averaged(rest[0], grad.square() + 1e-30, once(_factored_rates, weights["factored_decays"]))

    def features(self, param: Tensor, grad: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The first 28 features, not yet normalised: (28, n)."""
        m, v, rows, *rest = parts
        if rest:
            columns, mean = rest
            scale = scale_m = _safe_rsqrt(rows / (mean + 1e-9)) * _safe_rsqrt(columns)
            rows, columns = rows.expand_as(m), columns.expand_as(m)
        else:
            columns = rows
            scale, scale_m = _safe_rsqrt(rows + 1e-9), torch.rsqrt(rows + 1e-6)
        root = torch.rsqrt(v + 1e-6)
        x = torch.cat(
            [
                grad.unsqueeze(0), param.unsqueeze(0), m, v, m * root, root, grad * scale,
                rows, columns, torch.rsqrt(rows + 1e-8), torch.rsqrt(columns + 1e-8), m * scale_m,
            ]
        )  # fmt: skip
        return x.reshape(FEATURES, -1)

    def react(self, x: Tensor, squares: Tensor | None, step: Tensor, weights: Weights, once: Once) -> Tensor:
        """What to add to n elements: as `MLPOptimizer.react`."""
        direction, magnitude = network(weights, x, once(time_features, step, x.dtype), squares)
        return -self.step_scale * direction * torch.exp(self.magnitude_scale * magnitude)

    def _factor(
        self,
        grad: Tensor,
        row: Tensor,
        column: Tensor,
        mean_square: Callable[[Tensor, int, torch.dtype], Tensor],
        weights: Weights,
        once: Once,
    ) -> tuple[Tensor, Tensor]:
        smaller, largest = _largest_dimensions(grad.shape)
        rate = once(_factored_rates, weights["factored_decays"])
        return (
            averaged(row, mean_square(grad, largest, row.dtype), rate),
            averaged(column, mean_square(grad, smaller, row.dtype), rate),
        )


def _parts(m: Tensor, v: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, ...]:
    """The state by element: m, v and row of a vector; else m, v, row, column and the mean of row, to be broadcast."""
    if m.dim() < 3:
        return m, v, row
    smaller, largest = _largest_dimensions(m.shape[1:])
    rows, columns = row.unsqueeze(1 + largest), column.unsqueeze(1 + smaller)
    return m, v, rows, columns, rows.mean(1 + smaller, keepdim=True)


def _mean_square(grad: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return (grad.square() + 1e-30).mean(dim)


def _mean_square_in_place(grad: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Without a tensor of the gradient's size; its derivative is NaN at 0."""
    norm: Tensor = torch.linalg.vector_norm(grad, dim=dim, dtype=dtype)
    return norm.square() / grad.shape[dim] + 1e-30


def _largest_dimensions(shape: torch.Size) -> tuple[int, int]:
    """The second largest dimension and the largest; of equal ones the later is the larger."""
    order = sorted(range(len(shape)), key=lambda dim: shape[dim])
    return order[-2], order[-1]


def _factored_shapes(shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if len(shape) < 2:
        return tuple(shape), (0,)
    smaller, largest = _largest_dimensions(shape)
    return (*shape[:largest], *shape[largest + 1 :]), (*shape[:smaller], *shape[smaller + 1 :])


def _momentum_rates(offsets: Tensor) -> Tensor:
    return _rates(DECAYS, offsets)


def _second_moment_rates(offsets: Tensor) -> Tensor:
    return _rates(SECOND_MOMENT_DECAYS, offsets)


def _factored_rates(offsets: Tensor) -> Tensor:
    return _rates(FACTORED_DECAYS, offsets)


def _rates(start: tuple[float, ...], offsets: Tensor) -> Tensor:
    """1 - decay."""
    rates = torch.tensor([1 - decay for decay in start], dtype=offsets.dtype, device=offsets.device)
    return torch.sigmoid(torch.logit(rates) + 10 * offsets)


def _safe_rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x.clamp(min=1e-9))
