"""What evolution strategies share: pairs of unrolls, all at once or a window a call, by one process or by several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.ongoing import Resumable
from metaopt.metagrad.pairs import Pairs
from metaopt.tasks import Task, TaskBatch


class Evolution(ABC):
    """An estimator from antithetic pairs.

    Attributes:
        pairs: how many.
    """

    pairs: int

    @final
    def backward(
        self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        """Accumulate the estimate into ``.grad`` of hyper's parameters, and return the mean loss of all particles.

        Args:
            task: what is learned on; a `metaopt.tasks.TaskBatch` draws new tasks for every unroll of a pair.
            opt: the inner optimizer.
            hyper: a module whose call returns a mapping of values.
            generator: for the perturbations and the task's randomness; None is torch's default generator.

        Returns:
            The mean over particles of the smoothed objective, or of the window's part of it; 0-d.
        """
        return self.backward_share(range(self.pairs), task, opt, hyper, generator)

    @abstractmethod
    def backward_share(
        self, rows: range, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        """The same from some of the pairs alone, as one of several processes; it draws what all of them draw.

        Args:
            rows: which pairs.
            task, opt, hyper, generator: as for `backward`.
        """


class Windowed(Evolution, Resumable):
    """One that goes over its unrolls in windows, one a call.

    Attributes:
        steps: the horizon.
        truncation: the length of a window.
    """

    steps: int
    truncation: int

    @property
    def windows(self) -> int:
        """How many calls go over the horizon."""
        return math.ceil(self.steps / self.truncation)

    @final
    @torch.no_grad()
    def backward_share(
        self, rows: range, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        owners = (task, opt, hyper, rows)
        run = self._going_on(
            owners,
            lambda: self._begin(*owners),
            lambda state: self._begin(*owners).restored(state, generator),
        )
        self._run = None  # until the window is done: an exception on the way lets the next call begin new unrolls
        run.renew(generator)
        losses = self._window(run, generator)
        self._run = run
        return losses.mean()

    @abstractmethod
    def _begin(self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, rows: range) -> Pairs:
        """New unrolls, none of which has begun."""

    @abstractmethod
    def _window(self, run: Pairs, generator: Generator | None) -> Tensor:
        """Take a window, deliver its estimate, and return the particles' losses."""
