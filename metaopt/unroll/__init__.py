"""Running inner steps: in place of a live training loop, and as a pure function of a task."""

from metaopt.unroll.loop import InnerModel, InnerOptimizer, inner_loop
from metaopt.unroll.plain import InnerStep

__all__ = ["InnerModel", "InnerOptimizer", "InnerStep", "inner_loop"]
