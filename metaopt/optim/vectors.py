"""A learned optimizer's update of vectors of elements: all that a step computes, on whatever is in a chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from metaopt.functional.values import Once
from metaopt.optim.chunks import Piece, Slot, gather, packed, pieces, scatter

Weights = Mapping[str, Tensor]
State = tuple[Tensor, ...]


@runtime_checkable
class Coordinatewise(Protocol):
    """A design that treats each element by itself, so that ``change`` may be called on any part of a tensor."""

    @property
    def coordinatewise(self) -> bool: ...

    def change(
        self, param: Tensor, grad: Tensor, step: Tensor, state: State, weights: Weights, once: Once
    ) -> tuple[Tensor, ...]: ...


@runtime_checkable
class Normalized(Protocol):
    """A design whose elements share only the mean squares of their features."""

    def accumulate(self, grad: Tensor, state: State, once: Once) -> State: ...

    def features(self, param: Tensor, grad: Tensor, state: State) -> Tensor: ...

    def react(self, x: Tensor, squares: Tensor | None, step: Tensor, weights: Weights, once: Once) -> Tensor: ...


@dataclass
class Update:
    """One step of the parameters of one group, device, dtype and age.

    Attributes:
        dtype: that is computed in.
        step: the steps taken before, 0-d.
        weights: in that dtype, on the parameters' device.
        lr: what the step is multiplied by; negative where ``maximize`` has turned ... 
    """

    dtype: torch.dtype
    step: Tensor
    weights: Weights
    lr: float | Tensor
    maximize: bool
    once: Once
