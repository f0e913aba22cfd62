"""The state of every random generator that a run may draw from, as tensors and plain values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator


def state(generator: Generator | None) -> dict[str, Any]:
    """Of the generator, and of the default ones of torch, numpy and Python."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 a task may use the old interface
    version, internal, gauss = random.getstate()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "generator": None if generator is None else generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": gpus,
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def restore(saved: Mapping[str, Any], generator: Generator | None) -> None:
    """Put all of them back."""
    if generator is not None:
        generator.set_state(saved["generator"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
    keys, *rest = saved["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
