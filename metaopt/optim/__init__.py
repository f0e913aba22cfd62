"""Drop-ins for ``torch.optim``: swap the import, and nothing else. And learned optimizers, as one more of its kind."""

from metaopt.optim.learned import Learned
from metaopt.optim.radam import RAdam
from metaopt.optim.rprop import Rprop

__all__ = ["Learned", "RAdam", "Rprop"]
