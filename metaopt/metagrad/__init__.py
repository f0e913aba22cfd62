"""Estimators of meta-gradients: one signature, ``backward(task, opt, hyper, generator)``."""

from metaopt.metagrad.comparison import Comparison, Record, compare, measure
from metaopt.metagrad.es import ES
from metaopt.metagrad.estimator import Estimator
from metaopt.metagrad.forward import Forward
from metaopt.metagrad.implicit import Implicit
from metaopt.metagrad.online import Online
from metaopt.metagrad.pes import PES
from metaopt.metagrad.ranks import Ranks
from metaopt.metagrad.truncated_es import TruncatedES
from metaopt.metagrad.unrolled import Unrolled

__all__ = [
    "ES",
    "PES",
    "Comparison",
    "Estimator",
    "Forward",
    "Implicit",
    "Online",
    "Ranks",
    "Record",
    "TruncatedES",
    "Unrolled",
    "compare",
    "measure",
]
