"""One fused step over the parameters of a group: what to do once their tensors are at hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from metaopt.kernels import layout
from metaopt.kernels.layout import Prepared, Slot
from metaopt.kernels.support import interpreted, is_distributed

Cache = dict[Any, Any]


@torch.no_grad()
def prepare(slots: list[Slot], writes_grad: bool) -> Prepared:
    """Lay out parameters of any devices, dtypes and strides; DTensors take part with their local part.

    Args:
        slots: of parameters for which ``refusal`` is None.
        writes_grad: whether a ``grad_scale`` will be given.

    Raises:
        Misfit: a slot's tensors differ in size.
    """
    return layout.tables([_local(slot) if is_distributed(slot.param) else slot for slot in slots], writes_grad)


@torch.no_grad()
def launch(
    algorithm: str,
    prepared: Prepared,
    values: tuple[Any, ...],
    flags: dict[str, bool],
    cache: Cache,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update parameters and states in place, one launch for all that have device and dtypes in common.

    Args:
        algorithm: ``"radam"`` with values (lr, beta1, beta2, eps, weight_decay) and flags maximize and decoupled, or
            ``"rprop"`` with values (eta_minus, eta_plus, smallest, largest) and flag maximize.
        prepared: by ``prepare``.
        values: numbers or 0-d tensors; those on the parameters' GPU are read there, without waiting for it.
        flags: switches of the algorithm.
        cache: an empty dict at first, kept by the caller between steps of the same parameters.
        grad_scale: 0-d; gradients are divided by it, and hold the quotient afterwards.
        found_inf: 0-d; where it is not 0, nothing changes.
    """
    for kind, table in prepared.tables.items():
        device = kind[0]
        _backend(device).step(
            algorithm,
            kind,
            table,
            tuple(_at(value, device) for value in values),
            flags,
            None if grad_scale is None else grad_scale.to(device, non_blocking=True),
            None if found_inf is None else found_inf.to(device, non_blocking=True),
            cache,
        )
    for target, source in prepared.copies:
        target.copy_(source)


def _backend(device: torch.device) -> ModuleType:
    if device.type == "cuda" or interpreted():
        from metaopt.kernels.gpu import launch as gpu

        return gpu
    from metaopt.kernels.cpu import launch as cpu

    return cpu


def _at(value: Any, device: torch.device) -> Any:
    """A hyperparameter for kernels on a device: a tensor that is there, else a number."""
    return value if isinstance(value, Tensor) and value.device == device and device.type != "cpu" else float(value)


def _local(slot: Slot) -> Slot:
    parts: list[Any] = [tensor.to_local() if is_distributed(tensor) else tensor for tensor in slot]  # type: ignore[attr-defined]
    return Slot(*parts)
