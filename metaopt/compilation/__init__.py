"""torch.compile for pure functions that are called often: one level above torch alone."""

from metaopt.compilation.cache import Remembered
from metaopt.compilation.inductor import compiled
from metaopt.compilation.trusted import Trusted

__all__ = ["Remembered", "Trusted", "compiled"]
