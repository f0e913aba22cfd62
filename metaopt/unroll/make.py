"""Which program unrolls a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Generator

from metaopt.functional import Elementwise, Optimizer
from metaopt.tasks import Task
from metaopt.unroll.flat import FlatProgram, fits
from metaopt.unroll.general import GeneralProgram
from metaopt.unroll.program import Program


def make_program(
    task: Task, opt: Optimizer, values: Mapping[str, Any], steps: int, generator: Generator | None
) -> Program:
    """An unroll from fresh parameters: over one vector where that is possible.

    Args:
        task: draws the parameters.
        opt: the optimizer.
        values: what hyper returned; the optimizer's own complete them.
        steps: the horizon.
        generator: for the parameters.
    """
    everything = {**opt.defaults, **values}
    params = task.init(generator)
    if fits(opt, params, everything):
        return FlatProgram(task, cast(Elementwise[Any], opt), params, everything, steps)
    return GeneralProgram(task, opt, params, everything, steps)
