"""Hyperparameters learned by gradient descent through training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaopt import functional, learned, metagrad, optim, tasks, tracking
    from metaopt.hyper import Hyperparameters, PerParameter
    from metaopt.schedule import Schedule
    from metaopt.suggestion import suggest
    from metaopt.train import meta_train
    from metaopt.unroll import inner_loop

__version__ = "0.1.0"

# name -> module; a module's own name stands for the module itself. Loaded at first use, so that importing is quick.
_HOMES = {
    "functional": "metaopt.functional",
    "learned": "metaopt.learned",
    "metagrad": "metaopt.metagrad",
    "optim": "metaopt.optim",
    "tasks": "metaopt.tasks",
    "tracking": "metaopt.tracking",
    "Hyperparameters": "metaopt.hyper",
    "PerParameter": "metaopt.hyper",
    "Schedule": "metaopt.schedule",
    "inner_loop": "metaopt.unroll",
    "meta_train": "metaopt.train",
    "suggest": "metaopt.suggestion",
}

__all__ = [
    "Hyperparameters",
    "PerParameter",
    "Schedule",
    "functional",
    "inner_loop",
    "learned",
    "meta_train",
    "metagrad",
    "optim",
    "suggest",
    "tasks",
    "tracking",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'metaopt' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if module.__name__ == f"metaopt.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
