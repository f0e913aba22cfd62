"""What an estimator of meta-gradients is, and what all of them share: the way from values back to ``hyper``.

An estimator differentiates with respect to the *values* that ``hyper()`` returns, taken as leaves. `Leaves` holds them,
adds up what comes in from several windows or particles, and hands the sum to the parameters of ``hyper`` at the end,
all at once or, if something is wrong, not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.functional.tree import Tree
from metaopt.tasks import Task, TaskBatch


@runtime_checkable
class Estimator(Protocol):
    """An estimator of meta-gradients.

    One that keeps something between calls has ``state_dict`` and ``load_state_dict``, to be resumed from a checkpoint,
    and `metaopt.metagrad.ongoing` says what they may hold if many processes are to share it.
    """

    def backward(
        self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        """Accumulate the meta-gradient into ``.grad`` of hyper's parameters and return the meta-loss, detached.

        Args:
            task: what is learned on; a `TaskBatch` draws new tasks for every unroll.
            opt: the inner optimizer, which gets those of the values that are in ``opt.hyperparameters``.
            hyper: a module whose call returns a mapping of values.
            generator: for the task's randomness; None is torch's default generator.

        Raises:
            ValueError: a learned value on which the meta-loss does not depend.
        """


class Leaves:
    """The values of ``hyper`` as leaves of a graph.

    Attributes:
        values: what ``hyper()`` returned, its tensors that require grad replaced by leaves.
    """

    def __init__(self, hyper: nn.Module) -> None:
        self._hyper = hyper
        with torch.enable_grad():
            returned = hyper()
        if not isinstance(returned, Mapping):
            raise TypeError(f"hyper() must return a mapping of values, got {type(returned).__name__}")
        tree = Tree(dict(returned))
        flat, spec = tree.leaves, tree.spec
        self._sources = [leaf for leaf in flat if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not self._sources:
            raise ValueError("hyper has nothing to learn: none of its values requires grad")
        leaves = iter([source.detach().requires_grad_() for source in self._sources])
        flat = [next(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in flat]
        learned = [index for index, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self._leaves = [flat[index] for index in learned]
        self._names = [tree.names[index] for index in learned]
        self._grads: list[Tensor | None] = [None] * len(self._leaves)
        self.values: dict[str, Any] = pytree.tree_unflatten(flat, spec)

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that require grad."""
        return list(self._leaves)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add a gradient with respect to the leaves (`tensors`); None where nothing depends on one."""
        for index, grad in enumerate(grads):
            if grad is not None:
                total = self._grads[index]
                self._grads[index] = grad if total is None else total + grad

    def deliver(self) -> None:
        """Accumulate the sum into ``.grad`` of the module's parameters.

        Raises:
            ValueError: the objective does not depend on one of the values or parameters; nothing has been touched then.
        """
        unused = [name for name, grad in zip(self._names, self._grads, strict=True) if grad is None]
        named = [(name, p) for name, p in self._hyper.named_parameters() if p.requires_grad]
        grads: tuple[Tensor | None, ...] = ()
        if not unused:
            grads = torch.autograd.grad(self._sources, [p for _, p in named], self._grads, allow_unused=True)
            unused = [name for (name, _), grad in zip(named, grads, strict=True) if grad is None]
        if unused:
            raise ValueError(
                f"the meta-loss does not depend on the learned {', '.join(map(repr, unused))}: "
                "neither the optimizer nor the task reads it, or only before a truncation"
            )
        for (_, p), grad in zip(named, grads, strict=True):
            assert grad is not None
            p.grad = grad if p.grad is None else p.grad + grad
