"""What a meta-training run did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn


class Best(NamedTuple):
    """The hyperparameters with the lowest meta-loss so far.

    Attributes:
        step: the meta-step that measured it.
        meta_loss: what it measured; noisy where the task is.
        hyper: ``hyper.state_dict()`` then.
    """

    step: int
    meta_loss: float
    hyper: dict[str, Any]


@dataclass
class MetaTrainResult:
    """What a meta-training run did.

    Attributes:
        losses: the meta-loss at each meta-step, measured with the hyperparameters before it; where the estimator goes
            over one window a call, the window's part of it (0 if the objective is elsewhere).
        history: for each meta-step the record that trackers get:

            - ``meta_loss``;
            - ``grad_norm``: of the meta-gradient, in unconstrained coordinates; ``grad_norms``: of each parameter of
              ``hyper``; ``grad_snr``: of each, its signal-to-noise over the last ten meta-steps or so;
            - ``hyper``: the numbers of a `metaopt.Hyperparameters`, or of another module that has ``numbers()``;
            - ``seconds``, and ``memory_mib``, of the process and of its GPU;
            - ``skipped``, if that is what was done: the meta-gradient was not finite;
            - now and then, with a tracker: ``train``, ``validation`` and ``test`` figures at the end of an unroll.
        best: the hyperparameters with the lowest meta-loss.
    """

    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None

    @property
    def skipped(self) -> int:
        """How many meta-steps had a meta-gradient that was not finite, and were skipped."""
        return sum(record.get("skipped", False) for record in self.history)

    def add(self, record: dict[str, Any], hyper: nn.Module) -> None:
        """Add a meta-step, before its update."""
        loss = record["meta_loss"]
        if not record.get("skipped") and (self.best is None or loss < self.best.meta_loss):
            values = {name: tensor.detach().clone() for name, tensor in hyper.state_dict().items()}
            self.best = Best(len(self.losses), loss, values)
        self.losses.append(loss)
        self.history.append(record)
