"""The state of random generators, to draw the same batches twice."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator


class Snapshot:
    """The state of every generator that a task may draw from, at this moment.

    Those are the one that it is given, and the default ones of torch (of the CPU and, once it is used, of every GPU),
    numpy and Python.

    Args:
        generator: the one that tasks are given; None is torch's default one.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> here = Snapshot(generator)
        >>> drawn = torch.rand(3, generator=generator)
        >>> here.restore()
        >>> torch.equal(torch.rand(3, generator=generator), drawn)
        True
    """

    def __init__(self, generator: Generator | None) -> None:
        self.generator = generator
        self._state = None if generator is None else generator.get_state()
        self._torch = torch.get_rng_state()
        gpus = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._gpus = torch.cuda.get_rng_state_all() if gpus else []
        self._numpy: Any = np.random.get_state()  # noqa: NPY002 the one that tasks of others may draw from
        self._python = random.getstate()

    def restore(self) -> None:
        """Go back to it."""
        if self.generator is not None and self._state is not None:
            self.generator.set_state(self._state)
        torch.set_rng_state(self._torch)
        if self._gpus:
            torch.cuda.set_rng_state_all(self._gpus)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""
        name, keys, *rest = self._numpy
        version, internal, gauss = self._python
        return {
            "generator": self._state,
            "torch": self._torch,
            "gpus": self._gpus,
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "python": [version, list(internal), gauss],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the states from a `state_dict`, to be restored."""
        self._state, self._torch, self._gpus = state["generator"], state["torch"], state["gpus"]
        name, keys, *rest = state["numpy"]
        self._numpy = (name, keys.numpy().astype(np.uint32), *rest)
        version, internal, gauss = state["python"]
        self._python = (version, tuple(internal), gauss)
