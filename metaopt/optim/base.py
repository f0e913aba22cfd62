"""What the drop-ins share: torch's class for everything but the differentiable and the fused step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from metaopt.functional import Elementwise
from metaopt.optim.checks import check_gradients, check_saved_state
from metaopt.optim.differentiable import differentiable_step
from metaopt.optim.fused import Fused


class DropIn(Fused):
    """Mixed in before torch's class, which it calls for all that is neither differentiable nor fused."""

    _torch_class: ClassVar[type[torch.optim.Optimizer]]
    _functional: ClassVar[Callable[..., Elementwise[Any]]]

    def _construct(self, params: ParamsT, defaults: dict[str, Any], fused: bool | None) -> None:
        if fused and defaults["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if defaults["differentiable"]:
            # torch's constructors refuse tensors here and there; the functional optimizer checks the same domains.
            self._functional_of(defaults)
            torch.optim.Optimizer.__init__(self, params, {**defaults, "fused": fused})
        else:
            self._torch_class.__init__(self, params, **defaults)
            self.defaults["fused"] = fused
            for group in self.param_groups:
                group.setdefault("fused", fused)
            self._functional_of(defaults)  # after torch's own checks, which do not look at the order of step_sizes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("fused", None)

    def _functional_of(self, group: dict[str, Any]) -> Elementwise[Any]:
        names = inspect.signature(self._functional).parameters
        return self._functional(**{name: group[name] for name in names})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, or ``fused=True`` cannot run; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["differentiable"]:
            with torch.enable_grad():
                for group in self.param_groups:
                    differentiable_step(self, group, self._functional_of(group))
            return loss
        if not torch.compiler.is_compiling():
            check_gradients(self)
        groups = [(group, self._is_fused(group)) for group in self.param_groups]
        fused, rest = ([group for group, is_fused in groups if is_fused is wanted] for wanted in (True, False))
        if fused:
            self._fused_step(fused)
        if rest:
            self._torch_step(rest if fused else None)
        return loss

    def _torch_step(self, groups: list[dict[str, Any]] | None) -> None:
        """The step of torch's class, over some of the groups or all."""
        step = _unhooked(self._torch_class.step)
        if groups is None:
            step(self)
            return
        all_groups, self.param_groups = self.param_groups, groups
        try:
            step(self)
        finally:
            self.param_groups = all_groups

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that this class or torch's has saved.

        Args:
            state_dict: as ``state_dict()`` returns it.

        Raises:
            ValueError: it does not fit the parameters; nothing has changed then.
        """
        loaded: dict[str, Any] = {}

        def inspect_last(_: Any, final: dict[str, Any]) -> None:
            check_saved_state(self.param_groups, final, self._state_keys)
            loaded.update(final)

        handle = self.register_load_state_dict_pre_hook(inspect_last)  # after the user's own, which may change it
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
        self._restore_precision(loaded)

    def _restore_precision(self, loaded: Mapping[str, Any]) -> None:
        """torch casts loaded state to the parameter's dtype; a group with ``state_dtype`` keeps what was saved."""
        for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            dtype = group.get("state_dtype")
            for p, index in zip(group["params"], saved["params"], strict=True):
                if dtype is None or index not in loaded["state"]:
                    continue
                for key in self._state_keys:
                    value: Tensor = loaded["state"][index][key]
                    self.state[p][key] = value.to(p.device, dtype, copy=True)


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A torch class's step without the wrapper that runs hooks, which this class's own step already has.

    ``Optimizer.__init__`` wraps the step of the class that is instantiated. Once somebody has made a torch.optim.RAdam,
    calling its step from ours would run every hook twice.
    """
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
