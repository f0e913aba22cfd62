"""Which way to differentiate an unroll: one step is measured, and the ways are compared by it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.memory import Made
from metaopt.metagrad import Estimator, Forward, Unrolled
from metaopt.metagrad.estimator import Leaves
from metaopt.tasks import Task, TaskBatch
from metaopt.tasks.family import drawn
from metaopt.unroll.make import make_program
from metaopt.unroll.program import Inputs, Program, Sources, Tensors, inner_step
from metaopt.unroll.tangents import tangent_step

_ROUNDS = 5


@dataclass(frozen=True)
class Mode:
    """A way to differentiate, and what it would cost.

    Attributes:
        estimator: ready to use.
        seconds: of one ``backward``, estimated.
        bytes: of tensors that it keeps at its peak, estimated.
        fits: whether that is within the memory asked for.
    """

    estimator: Estimator
    seconds: float
    bytes: int
    fits: bool

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:,.1f} MiB"
        return f"{self.estimator!r}: {self.seconds:.3g} s, {size}{'' if self.fits else ' (does not fit)'}"


@dataclass(frozen=True)
class Suggestion:
    """The fastest way that fits, and all that were compared, the fastest first.

    Raises:
        MemoryError: by ``estimator``, if none fits.
    """

    modes: tuple[Mode, ...]

    @property
    def estimator(self) -> Estimator:
        """The fastest that fits."""
        for mode in self.modes:
            if mode.fits:
                return mode.estimator
        least = min(self.modes, key=lambda mode: mode.bytes)
        raise MemoryError(f"no way fits; the smallest is {least}")

    def __str__(self) -> str:
        return "\n".join(map(str, self.modes))


def suggest(
    task: Task | TaskBatch,
    opt: Optimizer,
    hyper: nn.Module,
    steps: int,
    memory: float | None = None,
    compile: bool = True,
) -> Suggestion:
    """Measure one inner step, plain and with its derivatives, and say which estimator is the fastest that fits.

    All of them are exact and give the same gradient; compiled ones run faster by about the share of a step that is not
    matrix products, which is not measured here, as a compilation takes longer than most searches for a setting.

    Args:
        task: what is learned on.
        opt: the inner optimizer.
        hyper: a module whose call returns a mapping of values.
        steps: the horizon T >= 1.
        memory: bytes that may be used. None: half of what is free, on the GPU if the parameters are there (the free
            memory of the CPU is known on Linux alone).
        compile: whether the estimators are to compile their steps.

    Returns:
        The ways, the fastest first, with the figures that were measured.

    Raises:
        ValueError: ``steps`` below 1 or ``memory`` not above 0.

    Example:
        >>> import metaopt
        >>> task, opt = metaopt.tasks.NoisyQuadratic(), metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> best = suggest(task, opt, hyper, steps=100, memory=2**20, compile=False)
        >>> all(mode.fits for mode in best.modes)
        True
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got steps={steps}")
    leaves = Leaves(hyper)
    generator = torch.Generator().manual_seed(0)
    task = drawn(task, generator)
    params = task.init(generator)
    with torch.enable_grad():
        program = make_program(task, opt, params, leaves.values, steps)
        sources = Sources(program.inputs(program.values))
    device = sources.leaves.start[0].device
    if memory is None:
        memory = _free(device) / 2
    if not memory > 0:
        raise ValueError(f"memory must be > 0 bytes, got memory={memory}")

    with_batch = task.batch(0, generator)
    step = _Step(program, sources.leaves, with_batch)
    learned = sum(leaf.numel() for leaf in leaves.tensors)
    carry = _size(sources.leaves.start)
    length = max(1, math.isqrt(steps))
    plain, (recorded, kept) = step.plain(), step.recorded()
    forward = step.tangents(leaves, program)

    def mode(estimator: Estimator, seconds: float, size: float) -> Mode:
        return Mode(estimator, steps * seconds, int(size), size <= memory)

    modes = [
        mode(Unrolled(steps, compile=compile), recorded, steps * kept),
        mode(Unrolled(steps, segments=1, compile=compile), plain + recorded, steps * carry + kept),
        mode(
            Unrolled(steps, segments="sqrt", compile=compile),
            # Compiled, the steps of a segment are taken once more and then differentiated one by one; else recorded.
            (2 if compile else 1) * plain + recorded,
            steps / length * carry + (length * (carry + _size(with_batch)) + kept if compile else length * kept),
        ),
        mode(Forward(steps, compile=compile), forward, (2 + 3 * learned) * carry),
    ]
    return Suggestion(tuple(sorted(modes, key=lambda mode: mode.seconds)))


class _Step:
    """One step, run a few times."""

    def __init__(self, program: Program, inputs: Inputs, batch: Any) -> None:
        self._program, self._inputs, self._batch = program, inputs, batch
        self._device = inputs.start[0].device

    def plain(self) -> float:
        """Seconds without derivatives."""
        with torch.no_grad():
            return self._seconds(partial(self._run, self._inputs.start))

    def recorded(self) -> tuple[float, int]:
        """Seconds with a graph, forwards and backwards, and the bytes that the graph keeps."""
        start = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in self._inputs.start)

        def both() -> None:
            after = self._run(start)
            ends = [x for x in after if x.requires_grad]
            torch.autograd.grad(
                ends, [x for x in start if x.requires_grad], list(map(torch.ones_like, ends)), allow_unused=True
            )

        with torch.enable_grad():
            with Made() as made:
                after = self._run(start)
            size = made.alive() + _size(self._batch)
            del after
            return self._seconds(both), size

    def tangents(self, leaves: Leaves, program: Program) -> float:
        """Seconds with a tangent for every learned number, extrapolated from a few."""
        learned = sum(leaf.numel() for leaf in leaves.tensors)
        few = sorted({1, min(learned, 4)})
        times = []
        for count in few:
            step = tangent_step(program, count)
            carry, row, shared = self._inputs.start, self._row(), self._inputs.shared
            dots = [_tangents(part, count) for part in (carry, row, shared)]
            run = partial(step, carry, dots[0], self._batch, row, dots[1], shared, dots[2])
            with torch.no_grad():
                times.append(self._seconds(run))
        if len(few) == 1:
            return times[0]
        slope = max(0.0, times[1] - times[0]) / (few[1] - few[0])
        return times[1] + slope * (learned - few[1])

    def _run(self, carry: Tensors) -> Tensors:
        after, _ = inner_step(self._program, carry, self._batch, self._row(), self._inputs.shared)
        return after

    def _row(self) -> Tensors:
        return tuple(leaf[0] for leaf in self._inputs.per_step)

    def _seconds(self, run: Callable[[], Any]) -> float:
        """The median of a few runs after a first one."""
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            run()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[len(times[1:]) // 2]


def _tangents(part: Tensors, count: int) -> Tensors:
    return tuple(x.new_zeros(count, *x.shape) for x in part if x.is_floating_point())


def _size(tree: Any) -> int:
    """Bytes of the tensors of a pytree."""
    return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def _free(device: torch.device) -> float:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:  # Linux; elsewhere give memory=
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
