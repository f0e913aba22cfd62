"""Fused updates for runs in which nothing is differentiated: Triton on a GPU, numba on a CPU.

Imported by ``metaopt.optim`` when it steps; triton and numba are imported by the first step that needs them. For runs
that are differentiated, ``metaopt.functional`` finds here the kernels of its steps and of their derivatives, on a GPU.
"""

from metaopt.kernels.layout import Misfit, Prepared, Slot
from metaopt.kernels.step import launch, prepare
from metaopt.kernels.support import refusal

__all__ = ["Misfit", "Prepared", "Slot", "launch", "prepare", "refusal"]
