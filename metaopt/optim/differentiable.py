"""The step that drop-ins take with ``differentiable=True``: through the functional optimizer, graph kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt.functional import Elementwise
from metaopt.optim.checks import names


def differentiable_step(optimizer: torch.optim.Optimizer, group: dict[str, Any], opt: Elementwise[Any]) -> None:
    """Step the parameters of one group that have a gradient.

    As in torch, a parameter is updated in place and must therefore not be a leaf that requires grad; its state is
    replaced by new tensors, so that the graphs of earlier steps stay valid.

    Args:
        optimizer: whose state is read and replaced.
        group: one of its groups.
        opt: the functional optimizer with this group's flags and hyperparameters.
    """
    live = {name: p for name, p in zip(names(group), group["params"], strict=True) if p.grad is not None}
    for name, p in live.items():
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients, got one for {name!r}")
        if p.requires_grad and p.is_leaf:
            raise RuntimeError(
                f"differentiable=True updates parameters in place, which autograd refuses for the leaf {name!r}: "
                "give the optimizer a non-leaf, such as p.clone(), or use metaopt.inner_loop"
            )
    # The in-place update below must not touch a tensor that the graph has saved.
    params = {name: p.clone() for name, p in live.items()}
    grads = {name: p.grad for name, p in live.items()}
    state = state_of(optimizer, opt, live, params)
    new_params, new_state = opt.step(params, grads, state)
    for name, p in live.items():
        p.copy_(new_params[name])
        optimizer.state[p].update({field: part[name] for field, part in new_state._asdict().items()})
        # torch counts in place: two parameters that share a counter would advance it twice once their state is loaded.
        optimizer.state[p]["step"] = new_state.step[name].clone()


def state_of(
    optimizer: torch.optim.Optimizer, opt: Elementwise[Any], live: dict[str, Tensor], params: dict[str, Tensor]
) -> Any:
    """The functional state of a live optimizer's parameters; fresh where it has none.

    Args:
        optimizer: the live optimizer.
        opt: the functional one.
        live: the live parameters by name, which are the keys of ``optimizer.state``.
        params: the tensors that stand for them.
    """
    state = opt.init(params)
    counters: dict[float, Tensor] = {}
    for name, p in live.items():
        saved = optimizer.state.get(p, {})
        for field, part in state._asdict().items():
            part[name] = saved.get(field, part[name])
        # Equal counters as one object: what depends on the step alone is then computed once.
        state.step[name] = counters.setdefault(float(state.step[name]), state.step[name])
    return state
