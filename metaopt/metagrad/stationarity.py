"""The condition that the end of training meets: the gradient that the optimizer sees is 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.functional.tree import Tree
from metaopt.functional.values import at_step, to_tensors
from metaopt.tasks import Runs, Task


def stationarity(
    task: Task, opt: Optimizer, params: Any, batches: Sequence[Any], values: Mapping[str, Any], step: int
) -> tuple[list[Tensor], list[Tensor]]:
    """``G = dloss/dparams + weight_decay params`` and where it was taken, in a graph with them and the values.

    Args:
        task: what is trained; of `Runs` each has its own.
        opt: its weight decay is part of the condition.
        params: the end of training.
        batches: over which the loss is averaged.
        values: all of them.
        step: for schedules.

    Returns:
        The parameters as leaves, and G, both as lists of tensors.
    """
    tree = Tree(pytree.tree_map(lambda x: x.detach().requires_grad_(), params))
    runs = len(tree.leaves[0]) if isinstance(task, Runs) else 1
    with torch.enable_grad():
        losses = [task.loss(tree.tree, batch, values) for batch in batches]
        loss = runs * torch.stack(losses).mean()
        if not loss.requires_grad:
            raise ValueError("the inner loss does not depend on the parameters")
        grads = torch.autograd.grad(loss, tree.leaves, create_graph=True, materialize_grads=True)
        if getattr(opt, "flags", {}).get("maximize"):
            grads = tuple(-grad for grad in grads)
        # Where the loss is linear there is no curvature, but a graph all the same.
        grads = tuple(g if g.requires_grad else g + 0.0 * x for g, x in zip(grads, tree.leaves, strict=True))
        decays = _weight_decay(opt, values, tree.names, step)
        total = [
            g if decay is None else g + decay.to(g) * x for g, decay, x in zip(grads, decays, tree.leaves, strict=True)
        ]
    return tree.leaves, total


def _weight_decay(opt: Optimizer, values: Mapping[str, Any], names: list[str], step: int) -> list[Tensor | None]:
    """Of each parameter; None where there is none."""
    given = at_step(values.get("weight_decay", 0.0), step) if "weight_decay" in opt.hyperparameters else 0.0
    each = [given[name] if isinstance(given, Mapping) else given for name in names]
    decays = [None if not isinstance(decay, Tensor) and decay == 0 else to_tensors(decay) for decay in each]
    if any(decay is not None for decay in decays) and getattr(opt, "flags", {}).get("decoupled_weight_decay"):
        raise ValueError(
            "Implicit needs weight decay that is coupled to the gradient, got decoupled_weight_decay=True: "
            "where such training ends depends on the way there"
        )
    return decays


def refuse_steering(opt: Optimizer, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a learned value on which the end of training does not depend, only the way there."""
    for name in opt.hyperparameters:
        learned = [x for x in pytree.tree_leaves(values.get(name)) if isinstance(x, Tensor) and x.requires_grad]
        if learned and name != "weight_decay":
            raise ValueError(
                f"Implicit cannot learn {name!r}: where training ends does not depend on it; use Unrolled or Forward"
            )
