"""The inner step as a pure function of a task: what the estimators differentiate.

    step = InnerStep(task, opt)
    carry = step.init(values, generator)
    for t in range(steps):
        carry, loss = step(carry, task.batch(t, generator), values, t)

Gradients are taken by torch.func, so that a step vmaps and compiles, and so that autograd and forward mode go through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.functional.values import at_step
from metaopt.tasks import Runs, Task
from metaopt.unroll.gradient import task_gradient


class Carry(NamedTuple):
    """What one inner step hands to the next."""

    params: Any
    state: Any


def cut(tree: Any) -> Any:
    """A pytree of tensors detached from the graph. What is not part of it stays the same object (shared counters)."""
    return pytree.tree_map(lambda leaf: leaf.detach() if leaf.requires_grad else leaf, tree)


class InnerStep:
    """One step of an optimizer on a task.

    Args:
        task: what is trained. Of several `Runs` each takes its own step.
        opt: a functional optimizer. One that is not elementwise is vmapped over runs.
    """

    def __init__(self, task: Task, opt: Optimizer) -> None:
        self.task = task
        self.opt = opt
        # Where the update has no derivative with respect to the gradient (Rprop), no second-order graph is recorded.
        self._second_order = getattr(opt, "differentiates_gradients", True)
        self._vmap_opt = isinstance(task, Runs) and not getattr(opt, "elementwise", False)

    def complete(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All values: the optimizer's own, with these in their place."""
        return {**self.opt.defaults, **values}

    def init(self, values: Mapping[str, Any], generator: Generator | None) -> Carry:
        """Fresh parameters and state."""
        return self.begin(self.task.init(generator), values)

    def begin(self, params: Any, values: Mapping[str, Any]) -> Carry:
        """Given parameters and a fresh state."""
        mine = self._of_optimizer(values, 0)
        init: Callable[[Any], Any] = lambda params: self.opt.init(params, **mine)  # noqa: E731
        if not self._vmap_opt:
            return Carry(params, init(params))
        # What does not depend on the run comes out expanded, which forward mode cannot write a tangent beside.
        return Carry(params, pytree.tree_map(torch.Tensor.contiguous, torch.vmap(init)(params)))

    def __call__(self, carry: Carry, batch: Any, values: Mapping[str, Any], step: int) -> tuple[Carry, Tensor]:
        """Inner step ``step`` (from 0): the next carry, and the inner loss before the step, as a constant."""
        carry, loss = self._step(carry, batch, values, step)
        return carry, loss.detach()

    def with_loss(self, carry: Carry, batch: Any, values: Mapping[str, Any], step: int) -> tuple[Carry, Tensor]:
        """The same, the inner loss being part of the graph."""
        carry_after, loss = self._step(carry, batch, values, step)
        if not self._second_order:
            loss = self.task.loss(carry.params, batch, self.complete(values))
        return carry_after, loss

    def _step(self, carry: Carry, batch: Any, values: Mapping[str, Any], step: int) -> tuple[Carry, Tensor]:
        grads, loss = self.gradient(carry.params, batch, self.complete(values))
        return self.update(carry, grads, self._of_optimizer(values, step)), loss

    def gradient(self, params: Any, batch: Any, values: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """The gradient of the inner loss, and the loss; constants where the update is not smooth in them.

        Args:
            params: before the step.
            batch: what it trains on.
            values: all values, which the loss reads.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._second_order):
            return task_gradient(
                self.task, params, batch, values, unpack=lambda params: params, second_order=self._second_order
            )

    def update(self, carry: Carry, grads: Any, mine: Mapping[str, Any]) -> Carry:
        """The next carry.

        Args:
            carry: before the step.
            grads: at its parameters.
            mine: the optimizer's values at this step, without callables.
        """
        update: Callable[..., Any] = lambda *args: self.opt.step(*args, **mine)  # noqa: E731
        params, state = (torch.vmap(update) if self._vmap_opt else update)(carry.params, grads, carry.state)
        return Carry(params, state)

    def _of_optimizer(self, values: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The optimizer's values at a step; counted here, so that a schedule sees an int under every transform."""
        return {name: at_step(value, step) for name, value in values.items() if name in self.opt.hyperparameters}
