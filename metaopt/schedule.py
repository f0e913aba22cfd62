"""One value per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Schedule:
    """A hyperparameter with one value per step, callable on the step.

    Steps count from 0; after the last one its value is held.

    Args:
        steps: how many values, >= 1.
        init: the value of every step, or a sequence or 1-d tensor with one value per step.

    Attributes:
        values: tensor of shape (steps,).

    Raises:
        ValueError: ``steps`` is below 1, or ``init`` has another length.

    Example:
        >>> warm_up = Schedule(steps=3, init=[0.1, 0.2, 0.4])
        >>> [round(float(warm_up(step)), 2) for step in range(5)]
        [0.1, 0.2, 0.4, 0.4, 0.4]
        >>> float(warm_up(torch.tensor(1)))
        0.2
    """

    def __init__(self, steps: int, init: float | Sequence[float] | Tensor) -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got steps={steps}")
        values = torch.as_tensor(init, dtype=torch.float64)
        if values.dim() and values.shape != (steps,):
            raise ValueError(
                f"init must be one value or one per step ({steps}), got init of shape {tuple(values.shape)}"
            )
        self.values: Tensor = values.expand(steps)

    @classmethod
    def of(cls, values: Tensor) -> Schedule:
        """A schedule of these values, shape (steps,): differentiable with respect to them."""
        schedule = cls.__new__(cls)
        schedule.values = values
        return schedule

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, step: int | Tensor) -> Tensor:
        """The value at a step: an int, or an integer tensor of any shape (also batched by vmap)."""
        last = len(self) - 1
        if isinstance(step, Tensor):
            if step.is_floating_point():
                raise TypeError(f"step must be an int or an integer tensor, got dtype {step.dtype}")
            index = step.to(torch.int64).clamp(0, last)
            return self.values.index_select(0, index.reshape(-1)).reshape(index.shape)
        if step < 0:
            raise ValueError(f"step must be >= 0, got step={step}")
        return self.values[min(step, last)]

    def __repr__(self) -> str:
        first, last = self.values.detach()[[0, -1]].tolist()
        return f"Schedule(steps={len(self)}, {first:.4g} to {last:.4g})"


def _flatten(schedule: Schedule) -> tuple[list[Tensor], Any]:
    return [schedule.values], None


def _flatten_with_keys(schedule: Schedule) -> tuple[list[tuple[Any, Tensor]], Any]:
    return [(pytree.GetAttrKey("values"), schedule.values)], None


def _unflatten(values: Any, context: Any) -> Schedule:
    return Schedule.of(next(iter(values)))


# So that torch.func transforms and pytree functions see the tensor inside a mapping of hyperparameter values.
pytree.register_pytree_node(
    Schedule,
    _flatten,
    _unflatten,
    serialized_type_name="metaopt.Schedule",
    flatten_with_keys_fn=_flatten_with_keys,
)
