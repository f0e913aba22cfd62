"""What a learned optimizer is: a module that is at once the functional optimizer and what is learned of it.

    opt = metaopt.learned.MLPOptimizer()
    estimator.backward(task, opt=opt, hyper=opt, generator=generator)       # gradients into opt.parameters()
    params, state = opt.step(params, grads, opt.init(params))               # with its own weights
    params, state = opt.step(params, grads, state, weights=weights)         # with others: pure, as torch.func likes it

Its hyperparameters are its weights, and a multiplier of its steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from metaopt.functional.optimizer import Params, advance, check_broadcast, check_grad, compute_dtype, count
from metaopt.functional.tree import Tree
from metaopt.functional.values import Domain, Once, check

Weights = Mapping[str, Tensor]


class LearnedOptimizer(nn.Module):
    """An optimizer whose update is a small network, applied to every element of every parameter.

    A subclass registers its weights, says what its state is (``State``, whose first field is ``step``), and implements
    `init_leaf`, `change` and `config`. All is computed in the parameter's dtype (in float32 for half precision, whose
    state is float32), to which the weights are cast.

    Args:
        lr: what every step is multiplied by, >= 0.

    Attributes:
        architecture: the design's name.

    Raises:
        TypeError, ValueError: ``lr`` is no number, or negative.
    """

    State: ClassVar[type[Any]]
    architecture: ClassVar[str]
    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weights")
    # The weights are learned by handing over the module itself; `Hyperparameters` can learn lr alone.
    domains: ClassVar[Mapping[str, Domain]] = {"lr": Domain(constraints.nonnegative, constraints.positive)}

    def __init__(self, lr: float) -> None:
        super().__init__()
        check("lr", lr, constraints.nonnegative, read_tensors=True)
        self.lr = lr

    # What a design implements.

    @abstractmethod
    def init_leaf(self, param: Tensor) -> tuple[Tensor, ...]:
        """The state of one parameter, after ``step``; ``param`` has the dtype that is computed in."""

    @abstractmethod
    def change(
        self, param: Tensor, grad: Tensor, step: Tensor, state: tuple[Tensor, ...], weights: Weights, once: Once
    ) -> tuple[Tensor, ...]:
        """What to add to the parameter, then its new state.

        Args:
            param, grad: of one shape and dtype.
            step: the steps taken before this one.
            state: the parameter's, without the step.
            weights: by name, in the parameter's dtype.
            once: for what is the same for all parameters.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain numbers."""

    # What it gets.

    @property
    @final
    def defaults(self) -> dict[str, Any]:
        """The multiplier of steps, and the current weights by name."""
        return {"lr": self.lr, "weights": dict(self.named_parameters())}

    def forward(self) -> dict[str, Any]:
        """The values to learn: the weights by name."""
        return {"weights": dict(self.named_parameters())}

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{settings}; {sum(p.numel() for p in self.parameters()):,} weights"

    @final
    def init(self, params: Params, **hyper: Any) -> Any:
        """The state before the first step.

        Args:
            params: a pytree of floating-point tensors.
            **hyper: lr and weights, neither of which it depends on.

        Returns:
            A NamedTuple whose fields have the structure of ``params``.

        Raises:
            TypeError: an unknown hyperparameter, or a parameter that is not a floating-point tensor.
            ValueError: weights other than this design's.
        """
        self._values(hyper)
        tree = Tree(params)
        steps: dict[torch.device, Tensor] = {}
        leaves = []
        for index, param in enumerate(tree.leaves):
            _check_param(tree, index)
            # One counter for all parameters: what depends on it alone is then computed once a step.
            step = steps.setdefault(param.device, torch.zeros((), device=param.device))
            leaves.append((step, *self.init_leaf(param.to(compute_dtype(param)))))
        return self._state(tree, leaves)

    @final
    def step(self, params: Params, grads: Params, state: Any, **hyper: Any) -> tuple[Params, Any]:
        """One step.

        Args:
            params: a pytree of tensors.
            grads: the same structure; ``None`` leaves its parameter and that parameter's state alone.
            state: what ``init`` or the last ``step`` returned.
            **hyper: ``lr`` (a number, a tensor that broadcasts against the parameter, a mapping from parameter name to
                these, or a callable of the number of steps taken) and ``weights`` (by name) in place of its own.

        Returns:
            The new parameters and the new state; the arguments are not modified.

        Raises:
            TypeError: an unknown hyperparameter, a tensor of a dtype that cannot be trained, a state of another design.
            ValueError: weights other than this design's, a negative lr, a gradient or state of another structure or
                shape.
        """
        lr, own = self._values(hyper)
        if not isinstance(state, self.State):
            raise TypeError(f"state must be a {self.State.__name__}, got {type(state).__name__}")
        tree = Tree(params)
        grad_leaves = tree.match("grads", grads)
        fields = [tree.match(f"state.{name}", field) for name, field in zip(self.State._fields, state, strict=True)]
        once = Once()
        new_params, new_leaves = [], []
        for index, (param, grad, step, *parts) in enumerate(zip(tree.leaves, grad_leaves, *fields, strict=True)):
            _check_param(tree, index)
            check_grad(tree, index, grad)
            if grad is not None:
                dtype = compute_dtype(param)
                weights = {name: once(_cast, weight, dtype) for name, weight in own.items()}
                change, *parts = self.change(param.to(dtype), grad.to(dtype), step, tuple(parts), weights, once)
                param = (param + _multiplier(lr, tree, index, step) * change).to(param.dtype)
                step = once(advance, step)
            new_params.append(param)
            new_leaves.append((step, *parts))
        return tree.unflatten(new_params), self._state(tree, new_leaves)

    def _values(self, hyper: Mapping[str, Any]) -> tuple[Any, Weights]:
        for name in hyper:
            if name not in self.hyperparameters:
                raise TypeError(f"{type(self).__name__} has no hyperparameter {name!r}; it has lr, weights")
        lr = hyper.get("lr", self.lr)
        check("lr", lr, constraints.nonnegative, read_tensors=False)
        own: Weights = dict(self.named_parameters())
        weights: Weights = hyper.get("weights", own)
        if weights.keys() != own.keys():
            raise ValueError(f"weights must be those of {type(self).__name__}, {list(own)}; got {list(weights)}")
        return lr, weights

    def _state(self, tree: Tree, leaves: list[tuple[Tensor, ...]]) -> Any:
        fields = range(len(self.State._fields))
        return self.State(*(tree.unflatten([leaf[field] for leaf in leaves]) for field in fields))


def _check_param(tree: Tree, index: int) -> None:
    param = tree.leaves[index]
    if not isinstance(param, Tensor) or not param.is_floating_point():
        got = param.dtype if isinstance(param, Tensor) else repr(param)
        raise TypeError(f"{tree.label('params', index)} must be a real floating-point tensor, got {got}")


def _multiplier(lr: Any, tree: Tree, index: int, step: Tensor) -> Any:
    """The multiplier of one parameter's step."""
    if isinstance(lr, Mapping):
        if tree.names[index] not in lr:
            raise ValueError(f"lr has no value for parameter {tree.names[index]!r}; it has {list(lr)}")
        lr = lr[tree.names[index]]
    if callable(lr) and not isinstance(lr, Tensor):
        lr = lr(count(step))
    if not isinstance(lr, Tensor):
        return lr
    check_broadcast("lr", lr, tree, index)
    return lr.to(tree.leaves[index].device, compute_dtype(tree.leaves[index]))


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype)
