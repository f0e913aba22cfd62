"""An unroll as plain data: tensors that go in, and a pure step in two halves.

    x_0                        the carry before the first step: parameters and state
    u_t                        what only step t reads (coefficients of the optimizer, values of schedules)
    w                          what every step reads
    g_t, loss_t = gradient(x_t, batch_t, w)
    x_{t+1} = update(x_t, g_t, u_t, w)

Every way to differentiate an unroll (recording it, recomputing it in segments, forward mode, each compiled or not)
works on these and knows nothing of optimizers or schedules. How x_0, u and w depend on the hyperparameters is a small
graph of its own, recorded once for the whole horizon: `Sources` joins the two by the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.functional.values import to_tensors
from metaopt.schedule import Schedule
from metaopt.tasks import Runs, Task

Tensors = tuple[Tensor, ...]


class Split:
    """A pytree taken apart into its tensors and the rest.

    Example:
        >>> split = Split({"lr": torch.tensor(0.1), "betas": (0.9, torch.tensor(0.99))})
        >>> len(split.tensors)
        2
        >>> split.join([torch.tensor(1.0), torch.tensor(2.0)])
        {'lr': tensor(1.), 'betas': (0.9, tensor(2.))}
    """

    def __init__(self, tree: Any) -> None:
        leaves, self._spec = pytree.tree_flatten(tree)
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors: Tensors = tuple(leaves[index] for index in self._where)
        self.key = (self._spec, *((type(constant), constant) for constant in self._constants))

    def join(self, tensors: Sequence[Tensor]) -> Any:
        """The tree with other tensors in place of its own."""
        leaves = list(self._constants)
        for index, tensor in zip(self._where, tensors, strict=True):
            leaves[index] = tensor
        return pytree.tree_unflatten(leaves, self._spec)

    def differs(self, other: Split) -> bool:
        """Whether another tree has other constants, or tensors in other places."""
        return self._constants != other._constants or self._where != other._where


class Shared:
    """What every step reads, as tensors: the hyperparameters' values, and the configuration of the tasks, if any.

    Args:
        task: what is trained.
        values: all values, completed by the optimizer's own.

    Attributes:
        learnable: the tensors among the values.
        kind: equal where the values have the same structure and the same constants.
        key: equal where one unroll may do the steps of another.
    """

    def __init__(self, task: Task, values: Mapping[str, Any]) -> None:
        self._task = task
        self._values = Split(dict(values))
        self._config = Split(task.config if isinstance(task, Runs) else ())
        self.learnable = self._values.tensors
        self.kind = self._values.key
        self.key = (task.key if isinstance(task, Runs) else task, self.kind, self._config.key)

    def tensors(self, values: Sequence[Tensor]) -> Tensors:
        """With these values."""
        return (*values, *self._config.tensors)

    def values(self, shared: Tensors) -> dict[str, Any]:
        """The values among the tensors, which may be the values alone."""
        joined: dict[str, Any] = self._values.join(shared[: len(self.learnable)])
        return joined

    def task(self, shared: Tensors) -> Task:
        """The task with its configuration from among the tensors."""
        if not isinstance(self._task, Runs):
            return self._task
        return self._task.with_config(self._config.join(shared[len(self.learnable) :]))


class Inputs(NamedTuple):
    """The tensors of an unroll.

    Attributes:
        start: the carry before the first step.
        per_step: one row per step along the first dimension.
        shared: read by every step.
    """

    start: Tensors
    per_step: Tensors
    shared: Tensors


class Program(Protocol):
    """The functions of an unroll, all pure: what is differentiated comes in as an argument.

    Attributes:
        key: equal for programs of which one may do the other's steps; hashable, or the steps are not shared.
        values: the tensors among the hyperparameters' values, which `inputs` is a function of.
        second_order: whether an update depends on its gradient smoothly.
    """

    key: tuple[Any, ...]
    second_order: bool

    @property
    def values(self) -> Tensors: ...

    def inputs(self, values: Sequence[Tensor], params: Any = None, steps: Tensor | None = None) -> Inputs:
        """The tensors of the unroll.

        Args:
            values: in the order of those of the program.
            params: where it starts, if not at the program's own.
            steps: which have rows, int64 of one dimension; None for all.
        """

    def gradient(self, carry: Tensors, batch: Any, shared: Tensors) -> tuple[Tensors, Tensor]:
        """The gradient of the inner loss, and the loss: constants if not ``second_order``."""

    def update(self, carry: Tensors, grads: Tensors, row: Tensors, shared: Tensors) -> Tensors:
        """The next carry."""

    def loss(self, carry: Tensors, batch: Any, shared: Tensors) -> Tensor:
        """The inner loss, differentiable with respect to the carry."""

    def meta_loss(self, carry: Tensors, shared: Tensors) -> Tensor:
        """The outer loss."""

    def params(self, carry: Tensors) -> Any:
        """The parameters of a carry as the task's tree."""


def called(schedule: Callable[[int], Any], steps: Tensor, horizon: int) -> Tensor:
    """What a function of the step gives at some steps, as float64: a `Schedule` at once, any other at every int."""
    if isinstance(schedule, Schedule):
        return schedule(steps).to(torch.float64)
    table = [torch.as_tensor(to_tensors(schedule(step)), dtype=torch.float64) for step in range(horizon)]
    return torch.stack(table).index_select(0, steps)


def inner_step(program: Program, carry: Tensors, batch: Any, row: Tensors, shared: Tensors) -> tuple[Tensors, Tensor]:
    """The next carry, and the inner loss before the step."""
    grads, loss = program.gradient(carry, batch, shared)
    return program.update(carry, grads, row, shared), loss


class Sources:
    """The inputs of an unroll as leaves of its graph, and the way back from them to the values.

    Args:
        inputs: in a graph with the values.

    Attributes:
        leaves: the inputs, cut off; those that depend on a value require grad.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.leaves = Inputs(*(tuple(_leaf(tensor) for tensor in part) for part in inputs))
        self._sums: dict[int, Tensor] = {}

    def add(self, leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Add gradients with respect to some of the leaves; None is no gradient."""
        for leaf, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                total = self._sums.get(id(leaf))
                self._sums[id(leaf)] = grad if total is None else total + grad

    def drop_start(self) -> None:
        """Let go of the start, where nothing reads it any more."""
        self._inputs = self._inputs._replace(start=())
        self.leaves = self.leaves._replace(start=())

    def keep(self, connected: Sequence[bool]) -> None:
        """Drop the gradients that are all 0 of those of the `differentiable` leaves that are not connected."""
        for leaf, yes in zip(self.differentiable, connected, strict=True):
            if not yes and id(leaf) in self._sums and not self._sums[id(leaf)].any():
                del self._sums[id(leaf)]

    def add_zeros(self, connected: Sequence[bool]) -> None:
        """Let those of the `differentiable` leaves that something depends on have a gradient, if only 0."""
        leaves = self.differentiable
        self.add(leaves, [torch.zeros_like(x) if yes else None for x, yes in zip(leaves, connected, strict=True)])

    @property
    def differentiable(self) -> list[Tensor]:
        """The leaves that require grad."""
        return [leaf for part in self.leaves for leaf in part if leaf.requires_grad]

    def gradient(self, values: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient with respect to the values; None for one that nothing depends on."""
        ends, grads = [], []
        for part, cut_part in zip(self._inputs, self.leaves, strict=True):
            for source, leaf in zip(part, cut_part, strict=True):
                if id(leaf) in self._sums:
                    ends.append(source)
                    grads.append(self._sums[id(leaf)])
        if not ends:
            return (None,) * len(values)
        return torch.autograd.grad(ends, list(values), grads, allow_unused=True)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def rows(per_step: Tensors, steps: range) -> list[Tensors]:
    """The row of each of some steps; in the graph of ``per_step``, which is left in one piece."""
    if not per_step:
        return [()] * len(steps)
    return list(zip(*(tensor[steps.start : steps.stop].unbind() for tensor in per_step), strict=True))


def blocks(steps: range, length: int = 100) -> list[range]:
    """Some steps in a row at a time: a row takes far more memory as tensors than as numbers of a table."""
    return [steps[start : start + length] for start in range(0, len(steps), length)]


def floating(tensors: Sequence[Tensor]) -> list[int]:
    """Which of the tensors can have a derivative: flags and counters have none."""
    return [index for index, tensor in enumerate(tensors) if tensor.is_floating_point() or tensor.is_complex()]


def chosen(tensors: Sequence[Tensor], where: Sequence[int]) -> Tensors:
    return tuple(tensors[index] for index in where)


def merged(tensors: Sequence[Any], where: Sequence[int], others: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors with ``others`` in these places."""
    result = list(tensors)
    for index, tensor in zip(where, others, strict=True):
        result[index] = tensor
    return tuple(result)
