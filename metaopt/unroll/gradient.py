"""The gradient of the inner loss: by autograd where that is possible, which is quicker, else by torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Loss = Callable[[Any, Any], Tensor]


def inner_gradient(loss: Loss, params: Any, batch: Any, *, replicas: bool, second_order: bool) -> tuple[Any, Tensor]:
    """The gradient at ``params``, and the loss.

    Args:
        loss: of one run's parameters and batch.
        params: a pytree; with ``replicas`` every leaf has their dimension in front, and so has the batch.
        batch: what the loss is taken on.
        replicas: whether there are several runs, of which each gets its own gradient; the loss is then their mean.
        second_order: whether gradient and loss are to be differentiable; else they are constants.
    """
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
