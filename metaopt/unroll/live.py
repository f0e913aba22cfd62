"""A live ``torch.optim`` optimizer as functional ones: its groups, its state, and back again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt import functional, optim
from metaopt.functional import Elementwise

# Exact types: a subclass may have changed the step, and would be unrolled silently wrong.
_FUNCTIONAL: dict[type[torch.optim.Optimizer], Callable[..., Elementwise[Any]]] = {
    torch.optim.RAdam: functional.radam,
    torch.optim.Rprop: functional.rprop,
    torch.optim.Adam: functional.adam,
    torch.optim.AdamW: functional.adamw,
    torch.optim.SGD: functional.sgd,
    optim.RAdam: functional.radam,
    optim.Rprop: functional.rprop,
}


@dataclass(frozen=True)
class Group:
    """One group of a live optimizer.

    Attributes:
        opt: the functional optimizer with the group's hyperparameters and flags.
        hyper: values that take the place of the group's.
        live: the group's trainable parameters by their name in the model.
    """

    opt: Elementwise[Any]
    hyper: Mapping[str, Any]
    live: Mapping[str, nn.Parameter]


def groups_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    hyper: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> list[Group]:
    """The groups of a live optimizer over the parameters of a model.

    Raises:
        TypeError: an optimizer of a type that has no functional form, a hyperparameter that it does not have, or
            hyperparameters in another form than mappings.
        ValueError: amsgrad, a parameter that is not the model's, a number of mappings other than the number of groups.
    """
    make = _FUNCTIONAL.get(type(optimizer))
    if make is None:
        known = ", ".join(f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in _FUNCTIONAL)
        raise TypeError(
            f"inner_loop cannot unroll an optimizer of type {type(optimizer).__qualname__}; it knows {known}"
        )
    flags = [group.get("amsgrad", False) for group in optimizer.param_groups]
    if any(flags):
        raise ValueError(f"inner_loop has no amsgrad: group {flags.index(True)} has amsgrad=True")
    count = len(optimizer.param_groups)
    mappings = [hyper or {}] * count if hyper is None or isinstance(hyper, Mapping) else hyper
    if not isinstance(mappings, Sequence) or not all(isinstance(values, Mapping) for values in mappings):
        hint = ": call it, as in hyper()" if callable(hyper) else ""
        raise TypeError(f"hyper must be a mapping of values, or a list with one mapping per group, got {hyper!r}{hint}")
    if len(mappings) != count:
        raise ValueError(f"hyper must hold one mapping per group ({count}), got {len(mappings)}")

    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for index, (group, values) in enumerate(zip(optimizer.param_groups, mappings, strict=True)):
        opt = make(**{name: group[name] for name in inspect.signature(make).parameters if name in group})
        for name in values:
            if name not in opt.hyperparameters:
                raise TypeError(
                    f"{type(optimizer).__name__} has no hyperparameter {name!r} (got {name}={values[name]!r}); "
                    f"it has {', '.join(opt.hyperparameters)}"
                )
        foreign = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if foreign:
            raise ValueError(
                f"group {index} of the optimizer has a parameter of shape {foreign[0]} that is not the model's"
            )
        live = {names[id(p)]: p for p in group["params"] if p.requires_grad}
        groups.append(Group(opt, values, live))
    return groups


def load_state(optimizer: torch.optim.Optimizer, group: Group, params: Mapping[str, Tensor], values: Any) -> Any:
    """The functional state of a group, copied from the live optimizer; fresh for parameters that it has none for.

    Args:
        optimizer: the live optimizer.
        group: one of its groups.
        params: the tensors that stand for the group's parameters.
        values: the group's hyperparameters at the first step (Rprop's lr is its initial step size).
    """
    state = group.opt.init(dict(params), **values)
    counters: dict[float, Tensor] = {}
    for name, p in group.live.items():
        saved = optimizer.state.get(p, {})
        for field, part in state._asdict().items():
            if isinstance(saved.get(field), Tensor):
                part[name] = saved[field].detach().clone()
        # Equal counters as one object: what depends on the step alone is then computed once.
        state.step[name] = counters.setdefault(float(state.step[name]), state.step[name])
        if isinstance(saved.get("momentum_buffer"), Tensor):
            # SGD counts no steps; that it has a buffer says that this is not the first.
            state.step[name] = counters.setdefault(1.0, torch.ones_like(state.step[name]))
    return state


@torch.no_grad()
def save_state(optimizer: torch.optim.Optimizer, group: Group, state: Any) -> None:
    """Write a group's functional state into the live optimizer, in torch's layout."""
    for name, p in group.live.items():
        if not bool(state.step[name] > 0):
            continue  # torch makes a parameter's state at its first gradient
        entry = {field: part[name].detach().clone() for field, part in state._asdict().items()}
        if "momentum_buffer" in entry:
            del entry["step"]
            if not _has_momentum(optimizer, p):
                continue
        optimizer.state[p].update(entry)


def _has_momentum(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    group = next(group for group in optimizer.param_groups if any(p is other for other in group["params"]))
    return bool(group["momentum"] != 0)
