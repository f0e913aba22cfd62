"""What a task is: something to train, and a judgement of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Generator, Tensor

Params = Any  # a pytree of tensors
Batch = Any  # a pytree of tensors
Values = Mapping[str, Any]


@runtime_checkable
class Task(Protocol):
    """What is learned on.

    Randomness enters through ``init`` and ``batch`` alone (a dropout mask is drawn there), so that ``loss`` and
    ``meta_loss`` are pure and can be vmapped and compiled.
    """

    def init(self, generator: Generator | None) -> Params:
        """Fresh parameters: a pytree of tensors. None is torch's default generator."""

    def batch(self, step: int, generator: Generator | None) -> Batch:
        """What inner step ``step`` (from 0) trains on: a pytree of tensors."""

    def loss(self, params: Params, batch: Batch, hyper: Values) -> Tensor:
        """The inner loss, 0-d. ``hyper`` holds all values, also those that are not the optimizer's."""

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        """The outer loss, 0-d."""
