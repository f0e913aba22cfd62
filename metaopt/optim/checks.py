"""What is refused before anything is changed: each error names the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CAPTURABLE = ("cuda", "xpu", "hpu", "xla")  # as in torch, where some more are private


def names(group: Mapping[str, Any]) -> list[str]:
    """One name per parameter: the user's, or positions where there are none or two modules use the same."""
    given: list[str] = group.get("param_names", [])
    count = len(group["params"])
    return given if len(set(given)) == count else [str(index) for index in range(count)]


def name_of(groups: list[dict[str, Any]], param: Tensor) -> str:
    """How an error calls a parameter."""
    for number, group in enumerate(groups):
        for name, p in zip(names(group), group["params"], strict=True):
            if p is param:
                return repr(name) if "param_names" in group else f"parameter {name} of group {number}"
    return "the local part of a parameter"


def check_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what torch's step would refuse half-way through.

    Raises:
        RuntimeError: a gradient is sparse.
        AssertionError: ``capturable=True`` for a parameter on a device that cannot capture, as in torch.
    """
    groups = optimizer.param_groups
    for group in groups:
        capturable = group["capturable"]
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(optimizer).__name__} does not support sparse gradients: {name_of(groups, p)} has one"
                )
            if capturable and p.device.type not in CAPTURABLE:
                raise AssertionError(
                    "If capturable=True, params and state_steps must be on supported devices: "
                    f"{', '.join(CAPTURABLE)}. {name_of(groups, p)} is on {p.device}"
                )


def check_saved_state(groups: list[dict[str, Any]], state_dict: Mapping[str, Any], keys: tuple[str, str]) -> None:
    """Refuse a state dict whose state does not fit the parameters.

    Args:
        groups: the optimizer's.
        state_dict: to be loaded.
        keys: of the two states that have a parameter's shape.

    Raises:
        ValueError: the state of a parameter lacks an entry, or one has another shape.
    """
    saved_groups = state_dict["param_groups"]
    for group, saved in zip(groups, saved_groups, strict=False):  # torch itself refuses other numbers of groups
        for p, index in zip(group["params"], saved["params"], strict=False):
            state = state_dict["state"].get(index)
            if not state:
                continue
            missing = [key for key in ("step", *keys) if key not in state]
            if missing:
                raise ValueError(
                    f"the state dict lacks {', '.join(missing)} for {name_of(groups, p)}; it has {', '.join(state)}"
                )
            for key in keys:
                shape = getattr(state[key], "shape", None)
                if shape != p.shape:
                    raise ValueError(
                        f"the state dict has {key} of shape {None if shape is None else tuple(shape)} for "
                        f"{name_of(groups, p)}, whose shape is {tuple(p.shape)}"
                    )
            step = state["step"]
            if isinstance(step, Tensor) and step.numel() != 1:
                raise ValueError(
                    f"the state dict has a step of shape {tuple(step.shape)} for {name_of(groups, p)}; it is one number"
                )
