"""Learned optimizers: modules that are functional optimizers, and whose weights any estimator can learn."""

from metaopt.learned.base import LearnedOptimizer
from metaopt.learned.mlp import MLPOptimizer, MLPState

__all__ = ["LearnedOptimizer", "MLPOptimizer", "MLPState"]
