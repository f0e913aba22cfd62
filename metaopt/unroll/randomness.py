"""The state of random generators, to draw the same batches twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator


class Snapshot:
    """The state of a generator, or of torch's default ones, at this moment.

    Args:
        generator: None for the default generators of the CPU and, once it is used, of every GPU.

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
        self._state: Any = generator.get_state() if generator is not None else torch.get_rng_state()
        gpus = generator is None and torch.cuda.is_available() and torch.cuda.is_initialized()
        self._gpus = torch.cuda.get_rng_state_all() if gpus else None

    def restore(self) -> None:
        """Go back to it."""
        if self.generator is not None:
            self.generator.set_state(self._state)
            return
        torch.set_rng_state(self._state)
        if self._gpus is not None:
            torch.cuda.set_rng_state_all(self._gpus)
