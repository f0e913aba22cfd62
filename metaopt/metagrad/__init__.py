"""Estimators of meta-gradients: one signature, ``backward(task, opt, hyper, generator)``."""

from metaopt.metagrad.estimator import Estimator
from metaopt.metagrad.forward import Forward
from metaopt.metagrad.unrolled import Unrolled

__all__ = ["Estimator", "Forward", "Unrolled"]
