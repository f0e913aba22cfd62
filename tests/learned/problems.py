"""The designs under test, and a small smooth problem with a coordinate that nothing depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.learned import AdafactorMLPOptimizer, LearnedOptimizer, LSTMOptimizer, MLPOptimizer

DESIGNS = (LSTMOptimizer, MLPOptimizer, AdafactorMLPOptimizer)


def big_steps(design: type[LearnedOptimizer], dtype: torch.dtype = torch.float64) -> LearnedOptimizer:
    """One whose steps are large enough for the weights to matter."""
    scales = {} if design is LSTMOptimizer else {"step_scale": 0.1, "magnitude_scale": 0.1}
    return design(**scales, lr=0.7).to(dtype)


def start(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    matrix, vector = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((3, 2), (4,))
    )
    return {"layer": {"matrix": matrix}, "vector": vector}


def loss(params: Mapping[str, Any]) -> Tensor:
    """Does not read ``vector[1]``."""
    matrix, vector = params["layer"]["matrix"], params["vector"]
    alive = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=vector.dtype)
    return (matrix.square() * (1 + matrix[:, :1])).sum() + torch.sin(alive * vector).sum() + matrix.sum() * vector[0]


def meta_loss(params: Mapping[str, Any]) -> Tensor:
    """Reads everything."""
    return params["layer"]["matrix"].square().sum() + (params["vector"] * torch.arange(1, 5)).square().sum()


def unroll(opt: LearnedOptimizer, params: Any, steps: int, **hyper: Any) -> tuple[Any, Any]:
    state = opt.init(params, **hyper)
    for _ in range(steps):
        params, state = opt.step(params, torch.func.grad(loss)(params), state, **hyper)
    return params, state
