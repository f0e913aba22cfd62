"""Sweep files in wandb's format, run locally."""

from metaopt.sweeps.definition import Sweep, SweepError, parse, read

__all__ = ["Sweep", "SweepError", "parse", "read"]
