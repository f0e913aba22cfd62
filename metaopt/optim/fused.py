"""Which groups take a fused update, and how their tensors reach it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaopt import kernels
from metaopt.kernels.support import is_distributed
from metaopt.optim.checks import name_of


class Fused(torch.optim.Optimizer):
    """The fused step of an optimizer with two states a parameter; mixed into the drop-ins."""

    _algorithm: ClassVar[str]
    _state_keys: ClassVar[tuple[str, str]]

    def _fused_arguments(self, group: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, bool]]:
        """The values and flags that ``kernels.fused_step`` takes for this algorithm."""
        raise NotImplementedError

    def _is_fused(self, group: dict[str, Any]) -> bool:
        """Whether a group takes the fused update.

        Raises:
            RuntimeError: it must (``fused=True``) and cannot.
        """
        fused = group["fused"]
        if fused is False or (fused is None and (group["foreach"] or torch.compiler.is_compiling())):
            return False
        fits: bool = self._fits(group)
        return fits

    @torch._disable_dynamo  # type: ignore[attr-defined] # torch.compiler.disable would import the compiler now
    def _fits(self, group: dict[str, Any]) -> bool:
        """Whether a group that is not to be left to torch can take the fused update."""
        fused = group["fused"]
        live = [p for p in group["params"] if p.grad is not None]
        if fused is None and not (live and all(p.is_cuda for p in live)):
            return False
        # One of each kind: whether an update can run depends on nothing else.
        for p in {(type(p), p.device, p.dtype, p.grad.dtype, p.is_conj(), p.is_neg()): p for p in live}.values():
            reason = kernels.refusal(p, group.get("state_dtype"))
            if not reason and kernels.refusal(p, p.grad.dtype):  # a gradient of another dtype is read as a state is
                reason = f"its dtype is {p.dtype}, and that of its gradient {p.grad.dtype}"
            if not reason and (p.is_conj() or p.is_neg()):
                reason = "it is a lazy conjugate or negative, whose memory is not its value"
            if reason and not fused:
                return False
            if reason:
                raise RuntimeError(f"fused=True cannot update {name_of(self.param_groups, p)}: {reason}")
        return True

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` leaves unscaling, and skipping what is not finite, to this optimizer."""
        return all(self._is_fused(group) for group in self.param_groups)

    @torch._disable_dynamo  # type: ignore[attr-defined] # torch.compiler.disable would import the compiler now
    def _fused_step(self, groups: list[dict[str, Any]]) -> None:
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        caches: dict[int, Any] = self.__dict__.setdefault("_fused_caches", {})
        fresh: list[Tensor] = []
        try:
            prepared = [kernels.prepare(self._slots(group, fresh), writes_grad=scale is not None) for group in groups]
            for ready in prepared:
                _check_states(ready)
        except kernels.Misfit as misfit:
            for p in fresh:
                del self.state[p]
            raise RuntimeError(f"{name_of(self.param_groups, misfit.slot.param)}: {misfit}") from misfit
        for number, (group, ready) in enumerate(zip(groups, prepared, strict=True)):
            values, flags = self._fused_arguments(group)
            cache = caches.setdefault(number, {})
            kernels.launch(self._algorithm, ready, values, flags, cache, scale, found_inf)

    def _slots(self, group: dict[str, Any], initialized: list[Tensor]) -> list[kernels.Slot]:
        live = [p for p in group["params"] if p.grad is not None]
        fresh = [p for p in live if not self.state.get(p)]
        if fresh:
            self._initialize(group, fresh)
            initialized += fresh
        first, second = self._state_keys
        slots = []
        for p in live:
            state = self.state[p]
            step = state["step"]
            if step.device != p.device or step.dtype != torch.float32:
                step = state["step"] = step.to(p.device, torch.float32)
            slots.append(kernels.Slot(p, _settled_gradient(p), state[first], state[second], step))
        return slots

    @torch.no_grad()
    def _initialize(self, group: dict[str, Any], fresh: list[Tensor]) -> None:
        """torch's own initial state, with counters on the GPU for parameters there."""
        for p in fresh:
            _settled_gradient(p)  # torch's Rprop places a state as the gradient is
        on_gpu = [p for p in fresh if p.is_cuda]
        on_cpu = [p for p in fresh if not p.is_cuda]
        for params, capturable in ((on_gpu, True), (on_cpu, False)):
            view = {**group, "params": params, "capturable": capturable}
            self._init_group(view, [], [], [], [], [])  # type: ignore[attr-defined]
        dtype = group.get("state_dtype")
        for p in fresh if dtype is not None else []:
            for key in self._state_keys:
                self.state[p][key] = self.state[p][key].to(dtype)
            if "step_size" in self.state[p]:
                self.state[p]["step_size"].fill_(group["lr"])  # which has been rounded to the parameter's dtype


def _settled_gradient(p: Any) -> Tensor:
    """The gradient, replaced if its memory is not its value: a lazy conjugate, a sum over processes not made yet."""
    grad = p.grad
    if grad.is_conj() or grad.is_neg():
        grad = p.grad = grad.resolve_conj().resolve_neg()
    if type(grad) is not Tensor and is_distributed(grad) and grad.placements != p.placements:
        grad = p.grad = grad.redistribute(p.device_mesh, p.placements)
    made: Tensor = grad
    return made


def _check_states(prepared: kernels.Prepared) -> None:
    """Refuse a state that a kernel would read as another dtype, as after ``model.double()`` in mid-training.

    Raises:
        Misfit: there is one.
    """
    for _, dtype, _, state in prepared.tables:
        for slot in prepared.alive if state != dtype else ():
            if slot.param.dtype == dtype and slot.first.dtype == state and kernels.refusal(slot.param, state):
                raise kernels.Misfit(slot)
