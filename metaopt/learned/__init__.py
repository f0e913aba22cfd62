"""Learned optimizers: modules that are functional optimizers, and whose weights any estimator can learn."""

from metaopt.learned.adafactor_mlp import AdafactorMLPOptimizer, AdafactorMLPState
from metaopt.learned.base import LearnedOptimizer
from metaopt.learned.lstm import LSTMOptimizer, LSTMState
from metaopt.learned.mlp import MLPOptimizer, MLPState

__all__ = [
    "AdafactorMLPOptimizer",
    "AdafactorMLPState",
    "LSTMOptimizer",
    "LSTMState",
    "LearnedOptimizer",
    "MLPOptimizer",
    "MLPState",
]
