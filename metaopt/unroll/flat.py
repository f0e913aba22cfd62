"""The unroll of an elementwise optimizer over one vector that holds all parameters.

An optimizer that treats every element alike need not know where one tensor ends and the next begins: a step then costs
a dozen operations, whatever the number of tensors. What depends on the step and the hyperparameters alone (bias
corrections, rectification) is computed for all steps at once, before the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.compilation import Remembered
from metaopt.functional import Elementwise
from metaopt.functional.optimizer import cast, compute_dtype
from metaopt.functional.tree import Tree
from metaopt.functional.values import Once, at_step, to_tensors
from metaopt.tasks import Runs, Task
from metaopt.unroll.gradient import task_gradient
from metaopt.unroll.program import Inputs, Shared, Split, Tensors, called

_REMEMBERED = Remembered(64)


class Vector:
    """How the parameters of a tree lie in one vector.

    Args:
        params: the tree.
        lead: how many leading dimensions (of runs) every leaf has; the vector has them too.
    """

    def __init__(self, params: Any, lead: int) -> None:
        tree = Tree(params)
        self.names = tree.names
        self._spec = tree.spec
        self._lead = lead
        self.shapes = [leaf.shape[lead:] for leaf in tree.leaves]
        self.sizes = [shape.numel() for shape in self.shapes]

    def pack(self, tree: Any) -> Tensor:
        """A tree of this structure as a vector."""
        leaves = pytree.tree_leaves(tree)
        return torch.cat([leaf.reshape(*leaf.shape[: self._lead], -1) for leaf in leaves], dim=-1)

    def unpack(self, vector: Tensor) -> Any:
        """The tree of a vector, in views; leading dimensions stay in front."""
        parts = vector.split(self.sizes, dim=-1)
        lead = vector.shape[:-1]
        leaves = [part.view(lead + shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self._spec)

    def spread(self, coefficient: Tensor) -> Tensor:
        """A coefficient per tensor, shape (number of tensors,), as one per element."""
        each = coefficient.clone().unbind()  # a row of a table may have strides that forward mode takes amiss
        return torch.cat([c.expand(size) for c, size in zip(each, self.sizes, strict=True)])


def fits(opt: Any, params: Any, values: Mapping[str, Any]) -> bool:
    """Whether parameters and hyperparameters can go through a vector: one real dtype, nothing given per element."""
    leaves = pytree.tree_leaves(params)
    if not isinstance(opt, Elementwise) or not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return False
    if len({(leaf.dtype, leaf.device) for leaf in leaves}) != 1 or not leaves[0].is_floating_point():
        return False
    mine = {name: values[name] for name in opt.hyperparameters}
    return all(leaf.dim() == 0 for leaf in pytree.tree_leaves(at_step(mine, 0)) if isinstance(leaf, Tensor))


class FlatProgram:
    """The unroll of parameters and hyperparameters for which `fits` is true.

    Args:
        task: of several `Runs` the vector has their dimension in front.
        opt: the optimizer.
        params: fresh ones.
        values: all values, completed by the optimizer's own.
        steps: the horizon.
    """

    @torch.no_grad()  # what it holds is no part of a graph: `inputs` makes that
    def __init__(self, task: Task, opt: Elementwise[Any], params: Any, values: Mapping[str, Any], steps: int) -> None:
        self._opt, self._steps = opt, steps
        self.second_order = opt.differentiates_gradients
        self._params = pytree.tree_map(torch.Tensor.detach, params)
        self._vector = Vector(params, lead=int(isinstance(task, Runs)))
        first = pytree.tree_leaves(params)[0]
        self._dtype, self._every_step = first.dtype, torch.arange(steps, device=first.device)
        self._shared = Shared(task, values)
        self.key = (
            self._shared.key, opt, first.dtype, first.device, tuple(self._vector.shapes), tuple(self._vector.names)
        )  # fmt: skip
        kind = (self._shared.kind, opt, first.dtype, first.device, tuple(self._vector.names))
        self._coefficients = _REMEMBERED(kind, lambda: self._shape_of_coefficients(dict(values)))

    def inputs(self, values: Sequence[Tensor], params: Any = None, steps: Tensor | None = None) -> Inputs:
        everything = self._shared.values(tuple(values))
        params = self._params if params is None else params
        state = self._opt.init(params, **self._mine(at_step(everything, 0)))
        packed = [self._vector.pack(field) for field in state[1:]]  # the counters aside, which coefficients know
        coefficients = Split(self._coefficients_at(self._every_step if steps is None else steps, everything)).tensors
        return Inputs((self._vector.pack(params), *packed), coefficients, self._shared.tensors(values))

    def _shape_of_coefficients(self, everything: Mapping[str, Any]) -> Split:
        """Which of them there are: those of one step stand for all."""
        self._opt.init(self._params, **self._mine(at_step(everything, 0)))  # says what is wrong with the values
        return Split(self._coefficients_at(self._every_step[:1], everything))

    @property
    def values(self) -> Tensors:
        return self._shared.learnable

    def gradient(self, carry: Tensors, batch: Any, shared: Tensors) -> tuple[Tensors, Tensor]:
        params, everything = carry[0], self._shared.values(shared)
        if not self.second_order:  # no second-order graph where the update does not see it
            params, everything = params.detach(), pytree.tree_map(_detached, everything)
        grad, loss = task_gradient(
            self._shared.task(shared),
            params,
            batch,
            everything,
            unpack=self._vector.unpack,
            second_order=self.second_order,
        )
        return (grad,), loss

    def update(self, carry: Tensors, grads: Tensors, row: Tensors, shared: Tensors) -> Tensors:
        params, *state = carry
        c = self._coefficients.join([self._vector.spread(c) if c.dim() else c for c in row])
        return tuple(self._opt.apply(params, grads[0], state, c))

    def loss(self, carry: Tensors, batch: Any, shared: Tensors) -> Tensor:
        return self._shared.task(shared).loss(self.params(carry), batch, self._shared.values(shared))

    def meta_loss(self, carry: Tensors, shared: Tensors) -> Tensor:
        return self._shared.task(shared).meta_loss(self.params(carry), self._shared.values(shared))

    def params(self, carry: Tensors) -> Any:
        return self._vector.unpack(carry[0])

    def _mine(self, everything: Mapping[str, Any]) -> dict[str, Any]:
        return {name: everything[name] for name in self._opt.hyperparameters}

    def _coefficients_at(self, steps: Tensor, everything: Mapping[str, Any]) -> Any:
        """The optimizer's coefficients at these steps, shape (steps,) or (steps, number of tensors), and None."""
        once = Once()
        count = 1.0 + steps.to(torch.float64)
        mine = self._mine(everything).values()
        of_names = []
        for name in self._vector.names:
            flat: list[Tensor] = []
            for value in mine:
                resolved = once(self._at_steps, once, steps, value, name)
                flat.extend(resolved if isinstance(resolved, tuple) else (resolved,))
            of_names.append(once(self._opt.coefficients, once, count, *flat))
        dtype = compute_dtype(torch.empty((), dtype=self._dtype))
        rows = [cast(c, dtype, steps.device) for c in of_names[: 1 if _same(of_names) else None]]
        return pytree.tree_map(lambda *leaves: _table(leaves, len(steps)), *rows)

    def _at_steps(self, once: Once, steps: Tensor, value: Any, name: str) -> Any:
        if isinstance(value, tuple | list):
            return tuple(once(self._at_steps, once, steps, item, name) for item in value)
        if isinstance(value, Mapping):
            return once(self._at_steps, once, steps, value[name], name)
        if callable(value) and not isinstance(value, Tensor):
            return once(called, value, steps, self._steps)
        return once(to_tensors, value)


def _same(items: Sequence[Any]) -> bool:
    return all(item is items[0] for item in items)


def _table(leaves: Sequence[Any], steps: int) -> Any:
    """One coefficient of all tensors, a row per step; of one tensor if it stands for all."""
    if leaves[0] is None:
        return None
    columns = [leaf.expand(steps) for leaf in leaves]
    return columns[0] if len(columns) == 1 else torch.stack(columns, dim=1)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
