"""The outer loop: an estimator's gradients, a torch optimizer's steps, a record of what happened.

    hyper = metaopt.Hyperparameters(opt, learn=("lr", "betas"))
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.05)
    result = metaopt.meta_train(task, opt, hyper, metaopt.metagrad.Unrolled(60), meta_optimizer, steps=50)

Clipping and schedules of the meta-optimizer are torch's own: ``meta_optimizer.register_step_pre_hook`` and
``register_step_post_hook``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Generator, nn

from metaopt.checks import check_count
from metaopt.functional import Optimizer
from metaopt.hyper import Hyperparameters
from metaopt.metagrad import Estimator
from metaopt.train.progress import Progress
from metaopt.tasks import Task, TaskBatch
from metaopt.tracking import Tracker


@dataclass
class MetaTrainResult:
    """What a meta-training run did.

    Attributes:
        losses: the meta-loss at each meta-step, measured with the hyperparameters before it; where the estimator goes
            over one window a call, the window's part of it (0 if the objective is elsewhere).
        history: for each meta-step the record that trackers get: ``meta_loss``, ``grad_norm`` (of the meta-gradient, in
            unconstrained coordinates), ``seconds`` and, for `metaopt.Hyperparameters`, ``hyper``: its numbers.
    """

    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def meta_train(
    task: Task | TaskBatch,
    opt: Optimizer,
    hyper: nn.Module,
    estimator: Estimator,
    meta_optimizer: torch.optim.Optimizer,
    steps: int = 50,
    checkpoint: str | None = None,
    tracker: Tracker | None = None,
    generator: Generator | None = None,
    *,
    progress: bool = True,
) -> MetaTrainResult:
    """Learn ``hyper`` by gradient descent on the meta-loss.

    Args:
        task: what is learned on; a `metaopt.tasks.TaskBatch` draws new tasks for every meta-gradient.
        opt: the inner optimizer.
        hyper: a module whose call returns a mapping of values, such as `metaopt.Hyperparameters`.
        estimator: of the meta-gradient, such as `metaopt.metagrad.Unrolled`.
        meta_optimizer: any ``torch.optim`` optimizer over ``hyper.parameters()``.
        steps: meta-steps, >= 1.
        checkpoint: not available yet.
        tracker: gets ``log(metrics, step)`` once per meta-step.
        generator: for the task's randomness; None is torch's default generator.
        progress: show a progress bar in a terminal or a notebook, a line now and then in a log file.

    Returns:
        The meta-losses and the history. ``hyper`` holds what was learned.

    Raises:
        ValueError: ``steps`` below 1, a ``checkpoint``, a meta-optimizer that holds none of hyper's parameters, a
            learned value on which the meta-loss does not depend.

    Example:
        >>> import metaopt
        >>> task = metaopt.tasks.NoisyQuadratic(noise=0.0)
        >>> opt = metaopt.functional.sgd(lr=0.01)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.3)
        >>> result = meta_train(
        ...     task, opt, hyper, metaopt.metagrad.Unrolled(steps=20), meta_optimizer, steps=30, progress=False,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> result.losses[-1] < 0.5 * result.losses[0]
        True
        >>> hyper.numbers()["lr"] > 0.1
        True
    """
    check_count("steps", steps)
    if checkpoint is not None:
        raise ValueError(f"checkpoint={checkpoint!r} is not available in this version; use checkpoint=None")
    held = {id(p) for group in meta_optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in hyper.parameters()):
        raise ValueError("meta_optimizer holds none of hyper's parameters: make it with hyper.parameters()")

    result = MetaTrainResult()
    with Progress(steps, shown=progress) as bar:
        for step in range(steps):
            started = perf_counter()
            meta_optimizer.zero_grad()
            hyper.zero_grad()  # it may have parameters that the meta-optimizer does not hold
            loss = estimator.backward(task, opt, hyper, generator)
            record: dict[str, Any] = {"meta_loss": loss.item(), "grad_norm": _grad_norm(hyper)}
            if isinstance(hyper, Hyperparameters):
                record["hyper"] = hyper.numbers()
            meta_optimizer.step()
            record["seconds"] = perf_counter() - started
            result.losses.append(record["meta_loss"])
            result.history.append(record)
            if tracker is not None:
                tracker.log(record, step)
            bar.update(record["meta_loss"], record.get("hyper", {}))
    return result


def _grad_norm(hyper: nn.Module) -> float:
    grads = [p.grad for p in hyper.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))
