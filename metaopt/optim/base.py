"""What the drop-ins share: torch's class for everything but the differentiable step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from metaopt.functional import Elementwise
from metaopt.optim.differentiable import differentiable_step


class DropIn(torch.optim.Optimizer):
    """Mixed in before torch's class, which it calls for all that is not differentiable."""

    _torch_class: ClassVar[type[torch.optim.Optimizer]]
    _functional: ClassVar[Callable[..., Elementwise[Any]]]

    def _construct(self, params: ParamsT, defaults: dict[str, Any], fused: bool | None) -> None:
        if fused:
            raise RuntimeError(
                f"fused={fused}: {type(self).__name__} has no fused kernel yet; use fused=None or fused=False"
            )
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
        """
        if not self.defaults["differentiable"]:
            return _unhooked(self._torch_class.step)(self, closure)
        with torch.enable_grad():
            loss = closure() if closure is not None else None
            for group in self.param_groups:
                differentiable_step(self, group, self._functional_of(group))
        return loss


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A torch class's step without the wrapper that runs hooks, which this class's own step already has.

    ``Optimizer.__init__`` wraps the step of the class that is instantiated. Once somebody has made a torch.optim.RAdam,
    calling its step from ours would run every hook twice.
    """
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
