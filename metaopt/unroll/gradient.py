"""The gradient of the inner loss: by autograd where that is possible, which is quicker, else by torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.tasks import Runs, Task
from metaopt.tasks.task import Values

Loss = Callable[[Any, Any], Tensor]


def task_gradient(
    task: Task, params: Any, batch: Any, values: Values, *, unpack: Callable[[Any], Any], second_order: bool
) -> tuple[Any, Tensor]:
    """The gradient of the inner loss, and the loss; of `Runs` each gets its own gradient, and the loss is the mean.

    Args:
        task: what is trained.
        params: a pytree; of `Runs` every leaf has their dimension in front, and so has the batch.
        batch: what the loss is taken on.
        values: all values, which the loss reads.
        unpack: the task's tree of one run's parameters.
        second_order: whether gradient and loss are to be differentiable; else they are constants.
    """
    if isinstance(task, Runs):
        run_loss: Loss = lambda params, given: task.single(given[0]).loss(unpack(params), given[1], values)  # noqa: E731
        return _gradient(run_loss, params, (task.config, batch), replicas=True, second_order=second_order)
    loss: Loss = lambda params, batch: task.loss(unpack(params), batch, values)  # noqa: E731
    return _gradient(loss, params, batch, replicas=False, second_order=second_order)


def _gradient(loss: Loss, params: Any, batch: Any, *, replicas: bool, second_order: bool) -> tuple[Any, Tensor]:
    if _transformed():
        return _by_transform(loss, params, batch, replicas)
    record = second_order and torch.is_grad_enabled()
    leaves, spec = pytree.tree_flatten(params)
    with torch.enable_grad():
        ends = [leaf if record and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        at = pytree.tree_unflatten(ends, spec)
        # Runs do not depend on each other: the gradient of the sum is the gradient of each.
        losses = torch.vmap(loss)(at, batch) if replicas else loss(at, batch)
        total = losses.sum() if replicas else losses
        if not total.requires_grad:
            return pytree.tree_map(torch.zeros_like, params), losses.mean()
        grads = torch.autograd.grad(total, ends, create_graph=record, materialize_grads=True)
    value = losses.mean() if replicas else losses
    return pytree.tree_unflatten(list(grads), spec), value if record else value.detach()


def _by_transform(loss: Loss, params: Any, batch: Any, replicas: bool) -> tuple[Any, Tensor]:
    gradient = torch.func.grad_and_value(loss)
    if not replicas:
        grads, value = gradient(params, batch)
        return grads, value
    grads, values = torch.vmap(gradient)(params, batch)
    return grads, values.mean()


def _transformed() -> bool:
    """Whether the compiler or a transform of torch.func is at work, in which autograd has no say."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
