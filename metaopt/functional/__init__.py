"""Pure optimizers, through which autograd reaches every hyperparameter.

`REGISTRY` lists them all; a new optimizer is one file and one line here, and the registry-driven tests pick it up.
"""

from metaopt.functional.adam import Adam, AdamState, adam, adamw
from metaopt.functional.clipping import clip_by_norm
from metaopt.functional.optimizer import Elementwise, Optimizer
from metaopt.functional.radam import RAdam, RAdamState, radam
from metaopt.functional.rprop import Rprop, RpropState, rprop
from metaopt.functional.sgd import SGD, SGDState, sgd
from metaopt.functional.values import Domain

REGISTRY = {"radam": radam, "rprop": rprop, "adam": adam, "adamw": adamw, "sgd": sgd}

__all__ = [
    "REGISTRY",
    "SGD",
    "Adam",
    "AdamState",
    "Domain",
    "Elementwise",
    "Optimizer",
    "RAdam",
    "RAdamState",
    "Rprop",
    "RpropState",
    "SGDState",
    "adam",
    "adamw",
    "clip_by_norm",
    "radam",
    "rprop",
    "sgd",
]
