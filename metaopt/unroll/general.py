"""The unroll of any optimizer over the task's own tree of parameters: for what does not fit into one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.tasks import Task
from metaopt.unroll.plain import Carry, InnerStep
from metaopt.unroll.program import Inputs, Shared, Split, Tensors, called


class GeneralProgram:
    """See `metaopt.unroll.program.Program`.

    Args:
        task: also `metaopt.tasks.Runs`.
        opt: any functional optimizer.
        params: fresh ones.
        values: all values, completed by the optimizer's own.
        steps: the horizon.
    """

    @torch.no_grad()  # what it holds is no part of a graph: `inputs` makes that
    def __init__(self, task: Task, opt: Optimizer, params: Any, values: Mapping[str, Any], steps: int) -> None:
        self._step = InnerStep(task, opt)
        self._steps, self._every_step = steps, torch.arange(steps)
        self.second_order: bool = getattr(opt, "differentiates_gradients", True)
        self._params = pytree.tree_map(_detached, params)
        self._opt = opt
        self._shared = Shared(task, values)
        # What is callable becomes a row per step; the rest of the optimizer's values is shared.
        self._rows = Split(self._callables(self._every_step, dict(values)))
        self._carry = Split(self._step.begin(self._params, dict(values)))
        self.key = (
            self._shared.key, opt, self._rows.key, self._carry.key,
            tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in self._carry.tensors),
        )  # fmt: skip

    @property
    def values(self) -> Tensors:
        return self._shared.learnable

    def inputs(self, values: Sequence[Tensor], params: Any = None, steps: Tensor | None = None) -> Inputs:
        everything = self._shared.values(tuple(values))
        start = Split(self._step.begin(self._params if params is None else params, everything)).tensors
        rows = self._callables(self._every_step if steps is None else steps, everything)
        return Inputs(start, Split(rows).tensors, self._shared.tensors(values))

    def gradient(self, carry: Tensors, batch: Any, shared: Tensors) -> tuple[Tensors, Tensor]:
        step = InnerStep(self._shared.task(shared), self._opt)
        grads, loss = step.gradient(self.params(carry), batch, self._shared.values(shared))
        return Split(grads).tensors, loss

    def update(self, carry: Tensors, grads: Tensors, row: Tensors, shared: Tensors) -> Tensors:
        joined: Carry = self._carry.join(carry)
        gradient = pytree.tree_unflatten(list(grads), pytree.tree_structure(joined.params))
        after = self._step.update(joined, gradient, self._mine(self._shared.values(shared), row))
        split = Split(after)
        if self._carry.differs(split):  # a count in a Python number would stand still
            raise TypeError(
                f"the state of {type(self._opt).__name__} cannot be unrolled: a step may change its tensors, "
                "not a Python number in it, nor add a tensor that `init` left out"
            )
        return split.tensors

    def loss(self, carry: Tensors, batch: Any, shared: Tensors) -> Tensor:
        return self._shared.task(shared).loss(self.params(carry), batch, self._shared.values(shared))

    def meta_loss(self, carry: Tensors, shared: Tensors) -> Tensor:
        return self._shared.task(shared).meta_loss(self.params(carry), self._shared.values(shared))

    def params(self, carry: Tensors) -> Any:
        joined: Carry = self._carry.join(carry)
        return joined.params

    def _callables(self, steps: Tensor, everything: Mapping[str, Any]) -> list[Tensor]:
        return [called(leaf, steps, self._steps) for leaf in self._leaves(everything) if _is_schedule(leaf)]

    def _leaves(self, everything: Mapping[str, Any]) -> list[Any]:
        mine = {name: everything[name] for name in self._step.opt.hyperparameters}
        return pytree.tree_leaves(mine, is_leaf=_is_schedule)

    def _mine(self, everything: Mapping[str, Any], row: Tensors) -> dict[str, Any]:
        mine = {name: everything[name] for name in self._step.opt.hyperparameters}
        values = iter(row)
        given: dict[str, Any] = pytree.tree_map(
            lambda leaf: next(values) if _is_schedule(leaf) else leaf, mine, is_leaf=_is_schedule
        )
        return given


def _is_schedule(leaf: Any) -> bool:
    # The compiler cannot say whether a container is callable.
    return not isinstance(leaf, Tensor | dict | tuple | list) and callable(leaf)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
