"""A meta-training run as what a checkpoint holds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Generator, nn

from metaopt.functional import Optimizer
from metaopt.metagrad import Estimator, Ranks
from metaopt.train.checkpoint import CheckpointError, Checkpoints
from metaopt.train.result import Best, MetaTrainResult
from metaopt.train.signal import SignalToNoise
from metaopt.unroll.randomness import Snapshot

# A checkpoint is written when this many times its writing has passed: it costs a twentieth of the time at most.
_PATIENCE = 20


@dataclass
class Parts:
    """All of a run that changes, or that a resumed run must share.

    Attributes:
        ranks: the processes that share it; what is saved does not depend on their number.
        skipping: how many of the last meta-steps in a row were skipped.
    """

    opt: Optimizer
    hyper: nn.Module
    estimator: Estimator
    meta_optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    generator: Generator | None
    result: MetaTrainResult = field(default_factory=MetaTrainResult)
    signal: SignalToNoise = field(default_factory=SignalToNoise)
    skipping: int = 0
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not differ between a run and its continuation."""
        return {
            "hyper": {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in self.hyper.state_dict().items()},
            "opt": _described(self.opt),
            "estimator": _described(self.estimator),
            "meta_optimizer": type(self.meta_optimizer).__qualname__ + self._groups(),
            "scheduler": None if self.scheduler is None else type(self.scheduler).__qualname__,
            "generator": None if self.generator is None else self.generator.device.type,
        }

    def _groups(self) -> str:
        """How the meta-optimizer's parameters are grouped, unless they are one group of all."""
        sizes = [len(group["params"]) for group in self.meta_optimizer.param_groups]
        return "" if sizes == [len(list(self.hyper.parameters()))] else f" with groups of {sizes} parameters"

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for the first process to save."""
        estimator: Any = self.estimator
        result = self.result
        return {
            "identity": self.identity,
            "hyper": dict(self.hyper.state_dict()),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "estimator": self.ranks.whole(estimator.state_dict()) if hasattr(estimator, "state_dict") else {},
            "randomness": Snapshot(self.generator).state_dict(),
            "losses": list(result.losses),
            "history": list(result.history),
            "best": None if result.best is None else list(result.best),
            "signal": self.signal.state_dict(),
            "skipping": self.skipping,
        }

    def load(self, state: Mapping[str, Any], folder: object) -> None:
        """Go back to a state.

        Raises:
            CheckpointError: it is of another run. Nothing has changed then.
        """
        if not isinstance(state, Mapping) or "identity" not in state:
            raise CheckpointError(f"checkpoint={str(folder)!r} holds something else than a meta-training run")
        for name, here in self.identity.items():
            there = state["identity"][name]
            if here != there:
                raise CheckpointError(
                    f"checkpoint={str(folder)!r} holds a run with another {name}: {there}, not {here}; "
                    "take another folder, or remove this one"
                )
        estimator: Any = self.estimator
        self.hyper.load_state_dict(state["hyper"])
        _load(self.meta_optimizer, state["meta_optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if hasattr(estimator, "load_state_dict"):
            estimator.load_state_dict(self.ranks.own(state["estimator"]))
        randomness = Snapshot(self.generator)
        randomness.load_state_dict(self.ranks.randomness(state["randomness"]))
        randomness.restore()
        best = None if state["best"] is None else Best(*state["best"])
        self.result = MetaTrainResult(list(state["losses"]), list(state["history"]), best)
        self.signal.load_state_dict(state["signal"])
        self.skipping = state["skipping"]


class Saver:
    """Writes the checkpoints of a run as often as that is cheap.

    Args:
        checkpoints: their folder.
        parts: of the run.
    """

    def __init__(self, checkpoints: Checkpoints, parts: Parts) -> None:
        self._checkpoints, self._parts = checkpoints, parts
        self._saved_step = -1
        self._due = 0.0
        self._warned = False

    def resume(self) -> int:
        """Go back to the last checkpoint, or write the first; the meta-steps that are behind."""
        found = self._parts.ranks.of_first(self._checkpoints.latest)
        if found is None:
            self.save(0)
            return 0
        step, state = found
        self._parts.load(state, self._checkpoints.folder)
        self._saved_step = step
        return step

    @property
    def due(self) -> bool:
        """Whether it is time for one."""
        return perf_counter() >= self._due

    def save_or_warn(self, step: int, *, last: bool) -> None:
        """Write one. A full disk is no reason to end a run, nor to say so at every step."""
        try:
            self.save(step)
            self._warned = False
        except CheckpointError as error:
            if self._parts.ranks.first and (last or not self._warned):
                goes_on = "" if last else "; the run goes on, and tries again"
                warnings.warn(f"{error}{goes_on}", stacklevel=4)
            self._warned = True

    def save(self, step: int) -> None:
        """Write one, unless it is there. All processes take part."""
        if step == self._saved_step:
            return
        started = perf_counter()
        state = self._parts.state()
        self._parts.ranks.of_first(lambda: self._checkpoints.save(step, state))
        self._saved_step = step
        ended = perf_counter()
        self._due = ended + _PATIENCE * (ended - started)


def _load(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state as it was: torch casts what it can to the parameters' dtype (NAdam's mu_product)."""
    optimizer.load_state_dict(dict(state))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        loaded = optimizer.state[params[index]]
        for name, value in saved.items():
            if isinstance(value, torch.Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.clone().to(loaded[name].device)


def _described(thing: object) -> str:
    """Its repr if it has one of its own, which is the same in another process."""
    return repr(thing) if type(thing).__repr__ is not object.__repr__ else type(thing).__qualname__
