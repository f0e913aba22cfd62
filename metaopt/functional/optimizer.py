"""What a functional optimizer is: ``init`` and ``step`` over a pytree of parameters.

Three ways to use one, all pure and out of place:

    opt = metaopt.functional.radam(lr=1e-3)
    state = opt.init(params)
    params, state = opt.step(params, grads, state)                      # plain

    params, state = opt.step(params, grads, state, lr=lr)               # lr: a tensor to differentiate with respect to
    params, state = opt.step(params, grads, state, lr={"weight": .1, "bias": lambda step: 0.1 / (1 + step)})

`Optimizer` is the protocol, for learned optimizers too. `Elementwise` is the base of the hand-designed ones: it walks
the tree, resolves hyperparameters and dtypes, and leaves to an algorithm three short pieces of maths for one parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

from metaopt.functional.tree import Tree
from metaopt.functional.values import Domain, Once, check, to_tensors

Params = Any  # a pytree of tensors
StateT = TypeVar("StateT", bound=tuple[Any, ...])


@runtime_checkable
class Optimizer(Protocol):
    """A functional optimizer: hyperparameters are arguments, nothing is modified in place.

    Attributes:
        hyperparameters: the names that ``init`` and ``step`` take as keyword arguments.
        defaults: the value of each where a call gives none.
    """

    @property
    def hyperparameters(self) -> tuple[str, ...]: ...

    @property
    def defaults(self) -> Mapping[str, Any]: ...

    def init(self, params: Params, **hyper: Any) -> Any: ...

    def step(self, params: Params, grads: Params, state: Any, **hyper: Any) -> tuple[Params, Any]: ...


class Elementwise(ABC, Generic[StateT]):
    """An optimizer that treats every element of every parameter alike.

    A subclass says what its state is (``State``, whose first field is ``step``), where its hyperparameters live
    (``domains``), and implements `init_leaf`, `coefficients` and `update`.

    Args:
        flags: options that are no hyperparameters and carry no derivative (``maximize``).
        defaults: a value for every hyperparameter.

    Raises:
        TypeError, ValueError: a value has a wrong form or lies outside its domain.
    """

    State: ClassVar[type[Any]]
    domains: ClassVar[Mapping[str, Domain]]
    # Whether the update depends on the gradient smoothly: sign-based updates do not, and need no second-order graph.
    differentiates_gradients: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __init__(self, flags: Mapping[str, bool], defaults: Mapping[str, Any]) -> None:
        for name, value in defaults.items():
            check(name, value, self.domains[name].valid, read_tensors=True)
        self.flags: Mapping[str, bool] = {name: bool(flag) for name, flag in flags.items()}
        self.defaults: Mapping[str, Any] = MappingProxyType(dict(defaults))

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return tuple(self.domains)

    def __repr__(self) -> str:
        settings = {**self.defaults, **self.flags}
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.flags), dict(self.defaults))

    # What an algorithm implements, for one real parameter.

    @abstractmethod
    def init_leaf(self, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """The state of one parameter, after ``step``. ``values``: all hyperparameters, pairs laid flat, in order."""

    @abstractmethod
    def coefficients(self, once: Once, step: Tensor, *values: Tensor) -> tuple[Any, ...]:
        """A (nested) NamedTuple of all that depends on the step (from 1) and the hyperparameters alone, in float64."""

    @abstractmethod
    def update(self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], c: Any) -> tuple[Tensor, ...]:
        """The new parameter, then its new state. All real and of one dtype, to which ``c`` has been cast."""

    # What it gets.

    @final
    def init(self, params: Params, **hyper: Any) -> StateT:
        """The state before the first step.

        Args:
            params: a pytree of floating-point or complex tensors.
            **hyper: this call's values in place of the defaults.

        Returns:
            A NamedTuple whose fields have the structure of ``params``.

        Raises:
            TypeError: an unknown hyperparameter, or a parameter that is not a floating-point or complex tensor.
            ValueError: a number outside its domain.
        """
        values = self._values(hyper)
        tree = Tree(params)
        once = Once()
        steps: dict[torch.device, Tensor] = {}
        leaves = []
        for index, param in enumerate(tree.leaves):
            _check_param(tree, index)
            # One counter object for all parameters: what depends on it alone is then computed once a step.
            step = steps.setdefault(param.device, torch.zeros((), device=param.device))
            parts = self.init_leaf(_real(param), *self._resolve(values, tree, index, step, once))
            leaves.append((step, *(_stored(part, param) for part in parts)))
        return self._state(tree, leaves)

    @final
    def step(self, params: Params, grads: Params, state: StateT, **hyper: Any) -> tuple[Params, StateT]:
        """One step.

        Args:
            params: a pytree of tensors.
            grads: the same structure; ``None`` leaves its parameter and that parameter's state alone.
            state: what ``init`` or the last ``step`` returned.
            **hyper: this call's values in place of the defaults. A callable gets the number of steps taken before this
                one: a Python int where it can be read (eager, on the CPU), else a 0-d int64 tensor.

        Returns:
            The new parameters and the new state; the arguments are not modified.

        Raises:
            TypeError: an unknown hyperparameter, a sparse or integer gradient, a state of another optimizer.
            ValueError: a number outside its domain, a gradient of another structure or shape, a hyperparameter that
                does not broadcast against its parameter.
        """
        values = self._values(hyper)
        if not isinstance(state, self.State):
            raise TypeError(f"state must be a {self.State.__name__}, got {type(state).__name__}")
        tree = Tree(params)
        grad_leaves = tree.match("grads", grads)
        fields = [tree.match(f"state.{name}", field) for name, field in zip(self.State._fields, state, strict=True)]
        for index, grad in enumerate(grad_leaves):
            _check_param(tree, index)
            check_grad(tree, index, grad)

        once = Once()
        new_params, new_leaves = [], []
        for index, (param, grad, step, *parts) in enumerate(zip(tree.leaves, grad_leaves, *fields, strict=True)):
            if grad is not None:
                resolved = self._resolve(values, tree, index, step, once)
                step = once(advance, step)
                c = once(self.coefficients, once, once(_double, step), *resolved)
                param, *parts = self.apply(param, grad, parts, once(cast, c, compute_dtype(param), param.device))
            new_params.append(param)
            new_leaves.append((step, *parts))
        return tree.unflatten(new_params), self._state(tree, new_leaves)

    def _values(self, hyper: Mapping[str, Any]) -> list[Any]:
        for name, value in hyper.items():
            if name not in self.domains:
                raise TypeError(
                    f"{self.name} has no hyperparameter {name!r} (got {name}={value!r}); "
                    f"it has {', '.join(self.hyperparameters)}"
                )
            check(name, value, self.domains[name].valid, read_tensors=False)
        return [to_tensors(hyper.get(name, default)) for name, default in self.defaults.items()]

    def _resolve(self, values: list[Any], tree: Tree, index: int, step: Tensor, once: Once) -> list[Tensor]:
        """The hyperparameters of one parameter at one step, pairs laid flat."""
        flat: list[Tensor] = []
        for name, value in zip(self.domains, values, strict=True):
            resolved = self._look_up(name, value, tree, index, step, once)
            flat.extend(resolved if isinstance(resolved, tuple) else (resolved,))
        return flat

    def _look_up(self, name: str, value: Any, tree: Tree, index: int, step: Tensor, once: Once) -> Any:
        if isinstance(value, tuple):
            return tuple(self._look_up(f"{name}[{i}]", item, tree, index, step, once) for i, item in enumerate(value))
        if isinstance(value, Mapping):
            if tree.names[index] not in value:
                raise ValueError(f"{name} has no value for parameter {tree.names[index]!r}; it has {list(value)}")
            return self._look_up(name, value[tree.names[index]], tree, index, step, once)
        if isinstance(value, Tensor):
            check_broadcast(name, value, tree, index)
            return once(_last_dimension, value) if value.dim() and tree.leaves[index].is_complex() else value
        return self._look_up(name, once(self._call, once, name, value, step), tree, index, step, once)

    def _call(self, once: Once, name: str, schedule: Callable[[Any], Any], step: Tensor) -> Any:
        value = schedule(once(count, step))
        base, _, element = name.partition("[")
        bound = self.domains[base].valid
        if element and isinstance(bound, tuple):
            bound = bound[int(element[0])]
        check(name, value, bound, read_tensors=False)
        return to_tensors(value)

    @final
    def apply(self, param: Tensor, grad: Tensor, parts: Sequence[Tensor], c: Any) -> list[Tensor]:
        """`update` for a parameter of any dtype: the new parameter, then its new state.

        Args:
            param, grad: of one shape.
            parts: its state, without the step.
            c: coefficients, ``cast`` to the parameter's ``compute_dtype``.
        """
        dtype = compute_dtype(param)
        state = tuple(_real(part).to(dtype) for part in parts)
        new_param, *new_parts = self.update(_real(param).to(dtype), _real(grad).to(dtype), state, c)
        return [
            _stored(new_param, param),
            *(_stored(new, part) for new, part in zip(new_parts, parts, strict=True)),
        ]

    def _state(self, tree: Tree, leaves: list[tuple[Tensor, ...]]) -> StateT:
        fields = range(len(self.State._fields))
        state: StateT = self.State(*(tree.unflatten([leaf[field] for leaf in leaves]) for field in fields))
        return state


def _rebuild(kind: type[Elementwise[Any]], flags: dict[str, bool], defaults: dict[str, Any]) -> Elementwise[Any]:
    return kind(flags, defaults)


def _check_param(tree: Tree, index: int) -> None:
    param = tree.leaves[index]
    if not isinstance(param, Tensor) or not (param.is_floating_point() or param.is_complex()):
        got = param.dtype if isinstance(param, Tensor) else repr(param)
        raise TypeError(f"{tree.label('params', index)} must be a floating-point or complex tensor, got {got}")


def check_grad(tree: Tree, index: int, grad: Any) -> None:
    if grad is None:
        return
    param = tree.leaves[index]
    if not isinstance(grad, Tensor):
        raise TypeError(f"{tree.label('grads', index)} must be a tensor or None, got {grad!r}")
    if grad.layout != torch.strided:
        raise TypeError(f"{tree.label('grads', index)} must be dense, got a sparse gradient of layout {grad.layout}")
    if grad.is_complex() != param.is_complex() or not (grad.is_floating_point() or grad.is_complex()):
        raise TypeError(
            f"{tree.label('grads', index)} must have a dtype like its parameter's {param.dtype}, got {grad.dtype}"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"{tree.label('grads', index)} must have the shape {tuple(param.shape)} of its parameter, "
            f"got {tuple(grad.shape)}"
        )


def check_broadcast(name: str, value: Tensor, tree: Tree, index: int) -> None:
    shape = tree.leaves[index].shape
    aligned = shape[len(shape) - value.dim() :] if value.dim() <= len(shape) else None
    if aligned is None or any(size not in (1, full) for size, full in zip(value.shape, aligned, strict=True)):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not broadcast against parameter "
            f"{tree.names[index]!r} of shape {tuple(shape)}"
        )


def count(step: Tensor) -> int | Tensor:
    """What a callable hyperparameter is given."""
    if not torch.compiler.is_compiling() and step.device.type == "cpu":
        try:
            return int(step)
        except RuntimeError:  # batched by vmap
            pass
    return step.to(torch.int64)


def advance(step: Tensor) -> Tensor:
    return step + 1


def _double(step: Tensor) -> Tensor:
    return step.to(torch.float64)


def _last_dimension(value: Tensor) -> Tensor:
    """A per-element hyperparameter of a complex parameter, for its real view of shape (..., 2)."""
    return value.unsqueeze(-1)


def cast(c: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A (nested) NamedTuple of coefficients for a parameter of this dtype on this device."""
    if c is None:
        return None
    if isinstance(c, tuple):
        return type(c)(*(cast(x, dtype, device) for x in c))
    # torch keeps its counters on the CPU, and so are the coefficients of a state that was loaded from there.
    return c.to(device, dtype if c.is_floating_point() else c.dtype)


# Half precision is computed in float32: in bfloat16 even beta2 = .999 would round to 1.
_COMPUTE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.float32,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def compute_dtype(param: Tensor) -> torch.dtype:
    return _COMPUTE_DTYPE.get(param.dtype, param.dtype)


def _real(x: Tensor) -> Tensor:
    """Complex numbers are two real ones, as in torch."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _stored(x: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous()).to(like.dtype) if like.is_complex() else x.to(like.dtype)
