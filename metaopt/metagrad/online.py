"""Online hypergradient descent: hyperparameters that learn while the model trains, one step at a time.

estimator = metaopt.metagrad.Online(steps=1000)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.metagrad.estimator import Leaves
from metaopt.metagrad.objective import check_objective, whole
from metaopt.metagrad.ongoing import Ongoing, Resumable
from metaopt.tasks import Task, TaskBatch
from metaopt.unroll.dependence import dependence
from metaopt.unroll.make import make_program
from metaopt.unroll.program import Sources
from metaopt.unroll.stretch import Unroll


class Online(Resumable):
    """One inner step a call, and how the next inner loss depends on that step's hyperparameters.

        params_{t+1} = step(params_t, batch_t, hyper)        d loss(params_{t+1}, batch_{t+1}) / d hyper

    With SGD as meta-optimizer this is hypergradient descent: the learning rate grows while consecutive gradients agree.
    Cheap (a gradient more than plain training) and short-sighted: what a step does later is not seen. After ``steps``
    calls training begins again.

    Args:
        steps: inner steps of a training run, >= 1.
        compile: compile the step.

    Attributes:
        params: where training is: the task's tree, of this process's runs where several share them; None before the
            first call.

    Raises:
        ValueError: ``steps`` below 1.

    Example:
        >>> import metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.01)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.05)
        >>> result = metaopt.meta_train(task, opt, hyper, Online(50), meta_optimizer, steps=50, progress=False)
        >>> hyper.numbers()["lr"] > 0.05
        True

    References:
        Almeida et al., Parameter Adaptation in Stochastic Optimization, 1999.
        Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent, ICLR 2018, algorithms 4 to 6.
    """

    def __init__(self, steps: int, compile: bool = False) -> None:
        check_objective(steps, "inner")
        self.steps = steps
        self.compile = compile
        self.params: Any = None

    def __repr__(self) -> str:
        return f"Online(steps={self.steps}, compile={self.compile})"

    @property
    def windows(self) -> int:
        """How many calls go over the horizon."""
        return self.steps

    def backward(
        self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        """Train for one step, accumulate the hypergradient into ``.grad`` and return the next inner loss.

        Args:
            task: what is trained.
            opt: the inner optimizer.
            hyper: a module whose call returns a mapping of values.
            generator: for the task's randomness; None is torch's default generator.

        Returns:
            The inner loss after the step, on the next step's batch; 0-d and detached.

        Raises:
            ValueError: a learned value on which the loss does not depend. Nothing has moved then.
        """
        leaves = Leaves(hyper)
        owners = (task, opt, hyper)
        run = self._going_on(
            owners,
            lambda: Ongoing.begin(owners, generator),
            lambda state: Ongoing.restored(state, owners, generator),
        )
        t, trained = run.step, run.start.task
        batch = run.batch if t else trained.batch(0, generator)
        with torch.enable_grad():
            program = make_program(trained, opt, run.start.params, leaves.values, self.steps)
            sources = Sources(program.inputs(program.values))
            unroll = Unroll(program, sources, trained, generator, compile=self.compile)
            before = sources.leaves.start if run.carry is None else run.carry
            carry, _ = unroll.step(before, batch, unroll.rows(range(t, t + 1))[t], unroll.shared)
            batch = unroll.batch(min(t + 1, self.steps - 1))
            loss = program.loss(carry, batch, unroll.shared)
            reached = sources.differentiable
            sources.add(reached, torch.autograd.grad(loss, reached, allow_unused=True))
        sources.add_zeros(dependence(unroll, whole("inner", self.steps)))
        leaves.add(sources.gradient(leaves.tensors))
        leaves.deliver()
        carry = tuple(tensor.detach() for tensor in carry)
        self._run, self.params = run.at(carry, t + 1, self.steps, batch), program.params(carry)
        return loss.detach()
