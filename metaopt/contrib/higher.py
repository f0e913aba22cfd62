"""Optimizers for the library `higher`: importing this module registers them, and existing higher code then gets them.

    import higher
    import metaopt.contrib.higher

    optimizer = torch.optim.RAdam(model.parameters())
    with higher.innerloop_ctx(model, optimizer, override={"lr": [lr], "betas": [(beta1, beta2)]}) as (fmodel, diffopt):
        for x, y in batches:
            diffopt.step(loss_fn(fmodel(x), y))
        loss_fn(fmodel(x_val), y_val).backward()     # into lr, beta1 and beta2

What importing does, once however often it is done:

- ``torch.optim.RAdam`` and ``torch.optim.AdamW``, which higher lacks, and ``metaopt.optim.RAdam`` and
  ``metaopt.optim.Rprop`` are registered with ``higher.register_optim``.
- ``torch.optim.Rprop`` gets `DifferentiableRprop` in place of higher's own class. That one's numbers are right but for
  ``maximize=True``, which it ignores (it descends); it cannot learn one of the ``step_sizes`` alone, and it keeps and
  differentiates a second-order graph that a sign does not have. Where both work they agree; its warning is gone.
- A class that you have registered for one of these types stays, and no other type is touched.

higher's Adam is left alone, though its hypergradient of ``betas[1]`` is wrong and its eps stands before the bias
correction (torch's after it), because the trajectory would change under existing code. To replace it:

    higher.register_optim(torch.optim.Adam, metaopt.contrib.higher.DifferentiableAdam)

and, to have higher's Rprop back, ``higher.register_optim(torch.optim.Rprop, higher.optim.DifferentiableRprop)``.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaopt import functional, optim
from metaopt.functional import Elementwise
from metaopt.functional.values import at_step

try:
    import higher
except ModuleNotFoundError:
    raise ImportError("metaopt.contrib.higher needs higher: pip install 'metaopt[higher]'", name="higher") from None

__all__ = ["DifferentiableAdam", "DifferentiableAdamW", "DifferentiableRAdam", "DifferentiableRprop"]


class FunctionalOptimizer(higher.optim.DifferentiableOptimizer):
    """A `higher.optim.DifferentiableOptimizer` whose step is a functional optimizer's.

    A subclass sets ``functional``. Hyperparameters are those in ``param_groups``, which ``override`` changes at
    construction and in ``step``: numbers, tensors that broadcast against the parameters of the group, or callables of
    the number of steps taken here. ``state`` has the keys of torch's state dict.

    Raises:
        TypeError: ``override`` names something that the optimizer's groups do not have.
        ValueError: a hyperparameter outside its domain, amsgrad.
    """

    functional: ClassVar[Elementwise[Any]]

    def __init__(self, other: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        self._kind = type(other).__name__
        self._steps = 0
        super().__init__(other, *args, **kwargs)
        counters: dict[float, Tensor] = {}
        for group, states in zip(self.param_groups, self.state, strict=True):
            # Made for its check of the values alone.
            type(self.functional)(self._flags(group), at_step(self._values(group), 0))
            for state in filter(None, states.values()):
                # Equal counters as one object: what depends on the step alone is then computed once.
                state["step"] = counters.setdefault(float(state["step"]), state["step"])

    def _apply_override(self, override: dict[str, list[Any]]) -> None:
        # higher takes any name, and a misspelt one would have no effect.
        for name, values in override.items():
            if not all(name in group for group in self.param_groups):
                raise TypeError(
                    f"{self._kind} has no hyperparameter {name!r} to override (got {name}={values!r}); "
                    f"it has {', '.join(self.functional.hyperparameters)}"
                )
        super()._apply_override(override)

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        # What is not tracked must not pile up in the state, to which weight decay and overrides would tie it.
        with nullcontext() if self._track_higher_grads else torch.no_grad():
            stepped = [self._stepped(*each) for each in zip(self.param_groups, self.state, grouped_grads, strict=True)]
        for group, states, (params, new_states) in zip(self.param_groups, self.state, stepped, strict=True):
            for index, param in params.items():
                group["params"][index] = param
                states[index] = new_states[index]
        self._steps += 1

    def _stepped(
        self, group: dict[str, Any], states: dict[int, dict[str, Tensor]], grads: list[Tensor | None]
    ) -> tuple[dict[int, Tensor], dict[int, dict[str, Tensor]]]:
        """The new parameters and states of one group, by index; those without a gradient are left out."""
        opt = _with_flags(self.functional, tuple(self._flags(group).items()))
        values = at_step(self._values(group), self._steps)
        # Where a step depends on the gradient's sign alone, its graph is dead weight.
        given = {i: g if opt.differentiates_gradients else g.detach() for i, g in enumerate(grads) if g is not None}
        params = {i: group["params"][i] for i in given}
        # As in torch, a parameter's state begins, with the lr that Rprop has then, at its first gradient.
        fresh = opt.init({i: p for i, p in params.items() if not states.get(i)}, **values)
        state = opt.State(
            *(
                {i: states[i][field] if states.get(i) else part[i] for i in params}
                for field, part in fresh._asdict().items()
            )
        )
        new_params, new_state = opt.step(params, given, state, **values)
        return new_params, {i: {field: part[i] for field, part in new_state._asdict().items()} for i in params}

    def _values(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in self.functional.hyperparameters}

    def _flags(self, group: dict[str, Any]) -> dict[str, bool]:
        if group.get("amsgrad", False):
            raise ValueError(f"{type(self).__name__} has no amsgrad, got amsgrad=True")
        # Not from the live optimizer: higher's get_trainable_opt_params turns flags, too, into overrides.
        return {name: bool(group.get(name, default)) for name, default in self.functional.flags.items()}


@cache
def _with_flags(opt: Elementwise[Any], flags: tuple[tuple[str, bool], ...]) -> Elementwise[Any]:
    """A functional optimizer with its own defaults and other flags. Making one costs a tenth of a small step."""
    return type(opt)(dict(flags), opt.defaults)


class DifferentiableRAdam(FunctionalOptimizer):
    """`torch.optim.RAdam` and `metaopt.optim.RAdam` in higher.

    Example:
        >>> model, x = torch.nn.Linear(2, 1), torch.ones(2)
        >>> optimizer = torch.optim.RAdam(model.parameters())
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> with higher.innerloop_ctx(model, optimizer, override={"lr": [lr]}) as (fmodel, diffopt):
        ...     for _ in range(3):
        ...         _ = diffopt.step(fmodel(x).square().sum())
        ...     (slope,) = torch.autograd.grad(fmodel(x).square().sum(), lr)
        >>> bool(slope != 0)
        True
    """

    functional = functional.radam()


class DifferentiableRprop(FunctionalOptimizer):
    """`torch.optim.Rprop` and `metaopt.optim.Rprop` in higher.

    Only a gradient's sign counts, so it is taken as a constant: what acts through gradients alone (a learned loss, a
    ``grad_callback``) has no gradient, where higher's own class gives zeros.
    """

    functional = functional.rprop()


class DifferentiableAdam(FunctionalOptimizer):
    """`torch.optim.Adam` (amsgrad aside) in higher, if you register it."""

    functional = functional.adam()


class DifferentiableAdamW(FunctionalOptimizer):
    """`torch.optim.AdamW` (amsgrad aside) in higher."""

    functional = functional.adamw()


_REGISTERED = {
    torch.optim.RAdam: DifferentiableRAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.Rprop: DifferentiableRprop,
    optim.RAdam: DifferentiableRAdam,
    optim.Rprop: DifferentiableRprop,
}


def _register() -> None:
    known = higher.optim._opt_mapping  # there is no public way to ask
    for kind, diff_optim in _REGISTERED.items():
        if known.get(kind) in (None, higher.optim.DifferentiableRprop):
            higher.register_optim(kind, diff_optim)


_register()
