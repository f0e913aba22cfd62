"""Meta-gradients by forward mode: exact, for few hyperparameters, in memory that does not grow with the horizon.

estimator = metaopt.metagrad.Forward(steps=10_000)
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.estimator import Leaves
from metaopt.metagrad.objective import Objective, check_objective, whole
from metaopt.tasks import Task, TaskBatch
from metaopt.tasks.family import drawn
from metaopt.unroll.dependence import dependence
from metaopt.unroll.make import make_program
from metaopt.unroll.program import Sources
from metaopt.unroll.stretch import Unroll
from metaopt.unroll.tangents import forward


class Forward:
    """Forward-mode differentiation of the whole inner loop.

    The same gradient as `Unrolled`. Time grows with the number of learned numbers (a `Schedule` has one per step),
    memory with it too, but not with the horizon.

    Args:
        steps: inner steps, the horizon T >= 1.
        objective: as for `Unrolled`.
        compile: compile the step with its tangents, once for all unrolls of this task and optimizer.

    Raises:
        ValueError: ``steps`` below 1 or an unknown objective.

    Example:
        >>> import metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> loss = Forward(steps=10).backward(task, opt, hyper, torch.Generator().manual_seed(0))
        >>> hyper.lr.grad.item() < 0
        True

    References:
        Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML 2017, section 3.2.
    """

    def __init__(self, steps: int, objective: Objective = "final", compile: bool = False) -> None:
        check_objective(steps, objective)
        self.steps = steps
        self.objective = objective
        self.compile = compile

    def __repr__(self) -> str:
        return f"Forward(steps={self.steps}, objective={self.objective!r}, compile={self.compile})"

    def backward(
        self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        """Accumulate the hypergradient into ``.grad`` of hyper's parameters, and return the meta-loss.

        Args:
            task: what is learned on: a task, `metaopt.tasks.Replicas` of one, or a `metaopt.tasks.TaskBatch`.
            opt: the inner optimizer.
            hyper: a module whose call returns a mapping of values, such as `metaopt.Hyperparameters`.
            generator: for the task's randomness; None is torch's default generator.

        Returns:
            The meta-loss, 0-d and detached.

        Raises:
            ValueError: a learned value on which the meta-loss does not depend. No ``.grad`` has been touched then.
        """
        leaves = Leaves(hyper)
        task = drawn(task, generator)
        params = task.init(generator)
        with torch.enable_grad():
            program = make_program(task, opt, params, leaves.values, self.steps)
            sources = Sources(program.inputs(program.values))
        unroll = Unroll(program, sources, task, generator, compile=self.compile)
        stretch = whole(self.objective, self.steps)
        connected = dependence(unroll, stretch)
        sources.add_zeros(connected)
        depends = sources.gradient(leaves.tensors)
        sources.drop_start()  # the run makes its own, with tangents
        total, gradient = forward(unroll, program.values, stretch)
        learned = [value for value in program.values if value.requires_grad]  # the optimizer's own among them
        split = gradient.split([value.numel() for value in learned])
        parts = {id(value): part for value, part in zip(learned, split, strict=True)}
        leaves.add(
            [
                # What only a late step reads has a derivative, and no connection among the first steps.
                None if zero is None and not parts[id(leaf)].any() else parts[id(leaf)].view(leaf.shape).to(leaf.dtype)
                for leaf, zero in zip(leaves.tensors, depends, strict=True)
            ]
        )
        leaves.deliver()
        return total
