"""Estimators of meta-gradients, behind one signature: ``backward(task, opt, hyper, generator)``."""

from metaopt.metagrad.estimator import Estimator
from metaopt.metagrad.unrolled import Unrolled

__all__ = ["Estimator", "Unrolled"]
