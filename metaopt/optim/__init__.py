"""Drop-ins for ``torch.optim``: swap the import, and nothing else."""

from metaopt.optim.radam import RAdam
from metaopt.optim.rprop import Rprop

__all__ = ["RAdam", "Rprop"]
