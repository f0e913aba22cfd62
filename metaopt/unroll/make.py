"""Which program unrolls a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from metaopt.functional import Elementwise, Optimizer
from metaopt.tasks import Task
from metaopt.tasks.task import Params
from metaopt.unroll.flat import FlatProgram, fits
from metaopt.unroll.general import GeneralProgram
from metaopt.unroll.program import Program


def make_program(task: Task, opt: Optimizer, params: Params, values: Mapping[str, Any], steps: int) -> Program:
    """An unroll: over one vector where that is possible.

    Args:
        task: what is trained.
        opt: the optimizer.
        params: where it starts.
        values: what hyper returned; the optimizer's own complete them.
        steps: the horizon.
    """
    everything = {**opt.defaults, **values}
    if fits(opt, params, everything):
        return FlatProgram(task, cast(Elementwise[Any], opt), params, everything, steps)
    return GeneralProgram(task, opt, params, everything, steps)
