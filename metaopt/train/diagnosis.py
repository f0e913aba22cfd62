"""Why a meta-gradient is not finite: the unroll once more, step by step, to the first thing that went wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from metaopt.functional import Optimizer
from metaopt.functional.tree import Tree
from metaopt.hyper import Hyperparameters
from metaopt.metagrad import Estimator
from metaopt.metagrad.ongoing import Start
from metaopt.tasks import Runs, TaskBatch
from metaopt.tasks.task import Task
from metaopt.unroll import InnerStep
from metaopt.unroll.growth import growth
from metaopt.unroll.randomness import Snapshot

_NO_HORIZON = "The estimator has no attribute steps, so that the unroll cannot be repeated."
_DIVERGED = "a smaller lr, or gradients clipped in the inner loop by metaopt.functional.clip_by_norm"
# Parameters this many times as large as at the start, or as 1, have run away: a loss that overflows only shows it.
_RUN_AWAY = 1e3
_EDGE = "a root, norm, logarithm or division at the edge of its domain moved away from it"
_HELP = {
    "batch": "cleaning the data",
    "loss": _EDGE,
    "gradient": _EDGE,
    "state": _DIVERGED,
    "parameter": _DIVERGED,
    "meta-loss": _EDGE,
    "derivative": "a smaller lr, a shorter horizon, truncation=..., or ES, which needs no derivative",
}


class NonFiniteError(ArithmeticError):
    """A meta-loss or a meta-gradient is NaN or infinite; the message says which, where it began, and what may help."""


def not_finite(hyper: nn.Module, meta_loss: float) -> str | None:
    """What is not finite after an estimator's call, if anything."""
    bad = [name for name, p in hyper.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if bad:
        return f"the meta-gradient of {', '.join(bad)} is not finite (meta-loss {meta_loss:g})"
    return None if math.isfinite(meta_loss) else f"the meta-loss is {meta_loss}"


def diagnose(task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, estimator: Estimator, before: Snapshot) -> str:
    """What went wrong in an unroll, with which values, and what usually helps.

    Args:
        task, opt, hyper: of the unroll.
        estimator: whose ``steps`` are its horizon.
        before: the generator's state when the estimator was called; the unroll draws what that one drew, or, where
            the estimator goes over it in windows, what a fresh one would draw.
    """
    with _repeated(task, opt, hyper, estimator, before) as unroll:
        if unroll is None:
            return _NO_HORIZON
        found = _first(unroll.start, opt, unroll.values, unroll.steps, before.generator)
    if found is None:
        growing = _growth(task, opt, hyper, estimator, before)
        what = f"Repeated without a graph, all is finite: it is the derivative that overflows. {growing}"
        helps = _HELP["derivative"]
    else:
        step, quantity, where, grown = found
        helps = _HELP[quantity]
        what = f"Inner step {step} of 0..{unroll.steps - 1}: the {quantity}{where} is the first that is not finite."
        if step == unroll.steps:
            what = f"The {quantity} after all {step} inner steps is the first that is not finite."
        if grown and helps is _EDGE:
            what += f" The largest parameter had grown {grown}: training diverged."
            helps = _DIVERGED
    shown = repr(hyper) if isinstance(hyper, Hyperparameters) else type(hyper).__name__
    return f"{what} Hyperparameters: {shown}. What usually helps: {helps}."


def explosion(
    task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, estimator: Estimator, before: Snapshot
) -> str | None:
    """How fast a change grows along the unroll, and what usually helps; None if it does not grow.

    A large derivative alone may be the unit of a value, such as a learning rate of 1e-9. The arguments are those of
    `diagnose`.
    """
    rate = _rate(task, opt, hyper, estimator, before)
    if rate is not None and rate <= 1:
        return None
    return f"{_grows(rate)} What usually helps: {_HELP['derivative']}."


def _growth(task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, estimator: Estimator, before: Snapshot) -> str:
    return _grows(_rate(task, opt, hyper, estimator, before))


def _grows(rate: float | None) -> str:
    return _NO_HORIZON if rate is None else f"The effect of a small change grows x {rate:.3g} in an inner step."


def _rate(
    task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, estimator: Estimator, before: Snapshot
) -> float | None:
    with _repeated(task, opt, hyper, estimator, before) as unroll:
        if unroll is None:
            return None
        start = unroll.start
        return growth(start.task, opt, start.params, unroll.values, unroll.steps, before.generator)


class _Unroll(NamedTuple):
    start: Start
    values: dict[str, Any]
    steps: int


@contextlib.contextmanager
def _repeated(
    task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, estimator: Estimator, before: Snapshot
) -> Iterator[_Unroll | None]:
    """The beginning of the unroll; the generator is put back afterwards. None if the horizon is not known."""
    steps = getattr(estimator, "steps", None)
    if not isinstance(steps, int):
        yield None
        return
    here = Snapshot(before.generator)
    try:
        with torch.enable_grad():  # growth asks which of them are learned
            values = {**opt.defaults, **hyper()}
        before.restore()
        with torch.no_grad():
            yield _Unroll(Start.draw(task, before.generator), values, steps)
    finally:
        here.restore()


def _first(
    start: Start, opt: Optimizer, values: Mapping[str, Any], steps: int, generator: Generator | None
) -> tuple[int, str, str, str] | None:
    """Inner step, quantity, which part of it, and how parameters had run away before, if so; None if all is finite."""
    inner = InnerStep(start.task, opt)
    carry = inner.begin(start.params, values)
    for t in range(steps):
        batch = start.task.batch(t, generator)
        grads, _ = inner.gradient(carry.params, batch, values)
        losses = _losses(start.task, carry.params, batch, values)
        after, _ = inner(carry, batch, values, t)
        quantities = {
            "batch": batch,
            "loss": losses,
            "gradient": grads,
            "state": after.state,
            "parameter": after.params,
        }
        for quantity, tree in quantities.items():
            for name, tensor in _named(tree):
                if not bool(tensor.isfinite().all()):
                    where = f" {name!r}" * bool(name) + _of_run(start.task, tensor)
                    return t, quantity, where, _run_away(start.params, carry.params)
        carry = after
    if bool(start.task.meta_loss(carry.params, values).isfinite()):
        return None
    return steps, "meta-loss", "", _run_away(start.params, carry.params)


def _run_away(start: Any, params: Any) -> str:
    """From where to where, if it is far."""
    before, now = (
        max((float(tensor.abs().max()) for _, tensor in _named(tree) if tensor.numel()), default=0.0)
        for tree in (start, params)
    )
    return f"from {before:.3g} to {now:.3g}" if now > _RUN_AWAY * max(1.0, before) else ""


def _losses(task: Task, params: Any, batch: Any, values: Mapping[str, Any]) -> Tensor:
    """The loss, or of several runs each one's."""
    if not isinstance(task, Runs):
        return task.loss(params, batch, values)
    losses: Tensor = torch.vmap(lambda c, p, b: task.single(c).loss(p, b, values))(task.config, params, batch)
    return losses


def _of_run(task: Task, tensor: Tensor) -> str:
    """Which of several runs, each having a row of the tensor."""
    if not isinstance(task, Runs):
        return ""
    bad = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
    rows = bad.nonzero().flatten().tolist()
    return f" of run {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")


def _named(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree that can be NaN, by name."""
    named = Tree(tree)
    for name, leaf in zip(named.names, named.leaves, strict=True):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield name, leaf
