"""The outer loop."""

from metaopt.train.checkpoint import CheckpointError, Checkpoints
from metaopt.train.diagnosis import NonFiniteError
from metaopt.train.interruption import Stopped
from metaopt.train.loop import meta_train
from metaopt.train.result import Best, MetaTrainResult

__all__ = [
    "Best",
    "CheckpointError",
    "Checkpoints",
    "MetaTrainResult",
    "NonFiniteError",
    "Stopped",
    "meta_train",
]
