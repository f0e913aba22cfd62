"""A learned optimizer as a ``torch.optim.Optimizer``: meta-train it, then train any model with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.optim.optimizer import ParamsT

from metaopt.functional.optimizer import Optimizer, compute_dtype
from metaopt.functional.values import Once, check
from metaopt.kernels.support import is_distributed
from metaopt.optim.checks import name_of
from metaopt.optim.chunked import Chunked, Terms, can_chunk
from metaopt.optim.chunks import Slot

Key = tuple[torch.device, torch.dtype]


class Learned(torch.optim.Optimizer):
    """Runs a learned optimizer, with the weights that it has at each step, on the parameters of any model.

    Parameters and state are updated in place, no graph is kept, and temporaries stay below 256 MB however many
    parameters there are: tensors are stepped in chunks, small ones together. (A design that does not allow for that
    takes one functional step per tensor, with temporaries in proportion to the largest.)

    The optimizer's own weights belong to no parameter group and to no state dict: save its module for itself. State is
    kept under the names of its state's fields, counters on the CPU as in torch.

    Args:
        params: as in torch: tensors, named tensors, or groups, each with an ``lr`` of its own if wanted.
        optimizer: a functional optimizer whose hyperparameters are ``lr`` and ``weights``, as in ``metaopt.learned``.
        lr: what steps are multiplied by, >= 0: a number or a 0-d tensor. Schedulers change it.
        maximize: maximize the objective.
        compile: make the functions of a full chunk with torch.compile, which needs a C++ compiler. (On a CPU the
            network of an `metaopt.learned.MLPOptimizer` runs as a kernel in any case, with ``metaopt[fused]``.)

    Raises:
        TypeError: ``optimizer`` is no learned optimizer; a parameter is not real floating-point, or is distributed.
        ValueError: ``lr`` is negative.
        RuntimeError: in ``step``, a gradient is sparse; nothing has changed then.

    Example:
        >>> from metaopt.learned import MLPOptimizer
        >>> learned, model = MLPOptimizer(), torch.nn.Linear(3, 1)  # untrained: a random step of about .0005
        >>> optimizer = Learned(model.parameters(), learned, lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> scheduler.step()
        >>> {name: tuple(part.shape) for name, part in optimizer.state[model.weight].items()}
        {'step': (), 'momenta': (6, 1, 3)}
    """

    def __init__(
        self,
        params: ParamsT,
        optimizer: Any,
        lr: float | Tensor = 1.0,
        *,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        _check_learned(optimizer)
        self.optimizer = optimizer
        self.compile = bool(compile)
        self._fields: tuple[str, ...] = optimizer.init({})._fields
        self._chunked: Chunked | None = None
        super().__init__(params, {"lr": lr, "maximize": bool(maximize)})

    def __getstate__(self) -> dict[str, Any]:
        # Functions that were compiled are made anew.
        own = {"optimizer": self.optimizer, "compile": self.compile, "_fields": self._fields, "_chunked": None}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own, to those that are optimized.

        Args:
            param_group: ``{"params": ..., "lr": ..., "maximize": ...}``, all but the first optional.

        Raises:
            TypeError, ValueError: as at construction; nothing has changed then.
        """
        if isinstance(param_group, dict):
            params = param_group["params"]
            if not isinstance(params, Tensor | set):  # which torch treats or refuses; a generator is read once
                param_group["params"] = params = list(params)
            listed = [params] if isinstance(params, Tensor) else params
            _check_lr(param_group.get("lr", self.defaults["lr"]))
            for index, item in enumerate(listed):
                name, p = item if isinstance(item, tuple) else (None, item)
                _check_param(p, f"parameter {index} of group {len(self.param_groups)}" if name is None else repr(name))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse; nothing has changed then.
            ValueError: a group's ``lr`` is negative.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_lr(group["lr"])
            for p in group["params"]:
                if p.grad is not None and p.grad.layout is not torch.strided:
                    name = name_of(self.param_groups, p)
                    raise RuntimeError(f"Learned does not support sparse gradients: {name} has one")
        weights: dict[Key, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for (device, dtype, age), live in self._alike(group).items():
                if (device, dtype) not in weights:
                    weights[device, dtype] = self._weights(device, dtype)
                self._step_alike(group, live, age, weights[device, dtype], dtype)
        return loss

    def _weights(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The optimizer's weights as they are now: once a step for each device and dtype, never out of date."""
        own: Mapping[str, Tensor] = self.optimizer.defaults["weights"]
        return {name: weight.detach().to(device, dtype) for name, weight in own.items()}

    def _alike(self, group: dict[str, Any]) -> dict[tuple[torch.device, torch.dtype, float], list[Tensor]]:
        """The parameters that have a gradient, by device, dtype of computation, and steps taken."""
        alike: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                if not self.state.get(p):
                    self.state[p] = self._fresh(p)
                key = (p.device, compute_dtype(p), float(self.state[p]["step"]))
                alike.setdefault(key, []).append(p)
        return alike

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        state = self.optimizer.init({"": p.detach()})._asdict()
        made = {field: tree[""] for field, tree in state.items()}
        return {**made, "step": torch.zeros(())}

    def _step_alike(
        self, group: dict[str, Any], live: list[Tensor], age: float, weights: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        if not can_chunk(self.optimizer):
            for p in live:
                self._step_whole(group, p, weights)
            return
        if self._chunked is None:
            self._chunked = Chunked(self.optimizer, self.compile)
        step = torch.tensor(age, device=live[0].device)
        terms = Terms(dtype, step, weights, group["lr"], group["maximize"], Once())
        self._chunked([self._slot(p) for p in live], terms)
        torch._foreach_add_([self.state[p]["step"] for p in live], 1)

    def _slot(self, p: Tensor) -> Slot:
        assert p.grad is not None
        state = self.state[p]
        return (p.detach(), p.grad, *(state[field] for field in self._fields if field != "step"))

    def _step_whole(self, group: dict[str, Any], p: Tensor, weights: dict[str, Tensor]) -> None:
        """By the functional optimizer: a tensor at a time, since its temporaries are those of all that it is given."""
        assert p.grad is not None
        state = type(self.optimizer.init({}))(*({"": self.state[p][field]} for field in self._fields))
        grads = {"": -p.grad if group["maximize"] else p.grad}
        new, after = self.optimizer.step({"": p.detach()}, grads, state, lr=group["lr"], weights=weights)
        p.copy_(new[""])
        for field in self._fields:
            self.state[p][field].copy_(getattr(after, field)[""])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that this class has saved.

        Args:
            state_dict: as ``state_dict()`` returns it.

        Raises:
            ValueError: it is the state of another design, or does not fit the parameters; nothing has changed then.
        """
        loaded: dict[str, Any] = {}

        def inspect_last(_: Any, final: dict[str, Any]) -> None:
            self._check_saved(final)
            loaded.update(final)

        handle = self.register_load_state_dict_pre_hook(inspect_last)  # after the user's own, which may change it
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
        # torch casts a state to its parameter's dtype, and shares it with the state dict that it comes from.
        for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for field, like in self._template(p).items() if loaded["state"].get(index) else ():
                    device = "cpu" if field == "step" else p.device
                    self.state[p][field] = loaded["state"][index][field].to(device, like.dtype, copy=True)

    def _template(self, p: Tensor) -> dict[str, Tensor]:
        """The dtypes and shapes of a parameter's state, without its memory."""
        state = self.optimizer.init({"": torch.empty_like(p, device="meta")})
        return {field: tree[""] for field, tree in state._asdict().items()}

    def _check_saved(self, state_dict: Mapping[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):  # torch refuses others
            for p, index in zip(group["params"], saved["params"], strict=False):
                state, expected = state_dict["state"].get(index), self._template(p)
                if state and set(state) != set(expected):
                    raise ValueError(
                        f"the state dict has {', '.join(state)} for {name_of(self.param_groups, p)}; "
                        f"a {type(self.optimizer).__name__} keeps {', '.join(expected)}"
                    )
                for field in state or ():
                    shape, like = getattr(state[field], "shape", None), expected[field].shape
                    if shape != like:
                        raise ValueError(
                            f"the state dict has {field} of shape {None if shape is None else tuple(shape)} for "
                            f"{name_of(self.param_groups, p)}; a {type(self.optimizer).__name__} keeps {tuple(like)}"
                        )


def _check_learned(optimizer: Any) -> None:
    known = isinstance(optimizer, Optimizer) and not isinstance(optimizer, type)
    if not known or not {"lr", "weights"} <= set(optimizer.hyperparameters):
        has = f" with the hyperparameters {', '.join(optimizer.hyperparameters)}" if known else ""
        raise TypeError(
            f"optimizer must be a learned optimizer, whose hyperparameters are lr and weights, got {optimizer!r}{has}"
        )


def _check_lr(lr: Any) -> None:
    if not isinstance(lr, Tensor | float | int) or (isinstance(lr, Tensor) and lr.dim()):
        raise TypeError(f"lr must be a number or a 0-d tensor, got lr={lr!r}")
    check("lr", lr, constraints.nonnegative, read_tensors=lr.device.type == "cpu" if isinstance(lr, Tensor) else True)


def _check_param(p: Any, name: str) -> None:
    if not isinstance(p, Tensor):
        return  # torch says so
    if not p.is_floating_point():
        raise TypeError(f"Learned steps real floating-point parameters, got {name} of dtype {p.dtype}")
    if is_distributed(p):
        raise TypeError(f"Learned steps whole tensors, got {name}, a {type(p).__name__}")
