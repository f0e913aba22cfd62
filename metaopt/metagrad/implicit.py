"""Meta-gradients by the implicit function theorem: at the end of training, whatever the way there.

estimator = metaopt.metagrad.Implicit(steps=1000)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.checks import check_count, check_real
from metaopt.functional import Optimizer
from metaopt.metagrad.estimator import Leaves
from metaopt.metagrad.objective import check_objective
from metaopt.metagrad.ongoing import Resumable, Start, placed
from metaopt.metagrad.solvers import Product, Solution, Vector, added, conjugate_gradient, neumann, norm
from metaopt.metagrad.stationarity import refuse_steering, stationarity
from metaopt.tasks import Task, TaskBatch
from metaopt.unroll.make import make_program
from metaopt.unroll.program import Sources
from metaopt.unroll.stretch import Unroll


class Report(NamedTuple):
    """How well the two problems of a call were solved.

    Attributes:
        residual: of the linear system, relative to its right-hand side.
        iterations: of its solver.
        gradient: norm of the inner gradient at the end of training, relative to that at its start.
    """

    residual: float
    iterations: int
    gradient: float


class _Trained(NamedTuple):
    """What a warm start begins with."""

    owners: tuple[Any, ...]
    start: Start
    solution: Vector
    first: float  # norm of the inner gradient at the start of all training

    def state(self) -> dict[str, Any]:
        start = self.start.state()
        return {**start, "rows": {**start["rows"], "solution": list(self.solution)}, "first": self.first}

    @staticmethod
    def restored(state: dict[str, Any], owners: tuple[Any, ...], generator: Generator | None) -> _Trained:
        start = Start.restored(state, owners[0], generator)
        return _Trained(owners, start, placed(state["rows"]["solution"], start.params), state["first"])


class Implicit(Resumable):
    """Implicit differentiation of the inner minimum.

    Trains for ``steps`` steps without a graph. Where the inner gradient ``G(params, hyper)`` is 0,

        d meta_loss / d hyper = dF/dhyper - v^T dG/dhyper,    (dG/dparams) v = dF/dparams

    with F the meta-loss. Memory and time do not depend on the horizon, and hyperparameters may be millions: example
    weights, penalties, augmentations that the inner loss reads, and ``weight_decay`` where it is coupled to the
    gradient. What only steers the way there (lr, betas) has no such gradient, and is refused.

    Args:
        steps: inner steps, enough to converge.
        solver: ``"cg"``, conjugate gradients, for an inner minimum with positive curvature; ``"neumann"``, the Neumann
            series, which may be stopped early.
        tolerance: of the relative residual; None is 1e-6, in float64 1e-10.
        max_iterations: of the solver, >= 1.
        step_size: a of the Neumann series ``a sum_k (I - a H)^k``; None: 1 over the largest eigenvalue, found by power
            iteration.
        damping: added to the diagonal of the linear system, >= 0.
        batches: on how many batches the inner gradient is taken at the end; 1 is right for full batches.
        warm_start: let training and the solver begin where the last call's ended, for the same task.
        gradient_tolerance: warn if the inner gradient is larger than this at the end of training, relative to its
            start.
        compile: compile the inner step.

    Attributes:
        report: of the last call.

    Raises:
        TypeError: an argument that is no number, or no whole one.
        ValueError: an argument outside its range.

    Example:
        >>> import metaopt
        >>> from torch.distributions import constraints
        >>> class Ridge:
        ...     def init(self, generator): return torch.zeros(1)
        ...     def batch(self, step, generator): return ()
        ...     def loss(self, x, batch, hyper): return ((x - 1) ** 2 + hyper["penalty"] * x**2).sum()
        ...     def meta_loss(self, x, hyper): return ((x - 0.5) ** 2).sum()
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn={"penalty": (0.5, constraints.positive)})
        >>> loss = Implicit(steps=100).backward(Ridge(), opt, hyper)  # x = 1 / (1 + penalty)
        >>> round(hyper.penalty.grad.item(), 6)  # 2 (x - 1/2) (-x^2) penalty
        -0.074074

    References:
        Pedregosa, Hyperparameter Optimization with Approximate Gradient, ICML 2016.
        Lorraine, Vicol & Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020,
        equation 2 and algorithm 3.
    """

    def __init__(
        self,
        steps: int,
        solver: Literal["cg", "neumann"] = "cg",
        tolerance: float | None = None,
        max_iterations: int = 1000,
        step_size: float | None = None,
        damping: float = 0.0,
        batches: int = 1,
        warm_start: bool = False,
        gradient_tolerance: float = 1e-2,
        compile: bool = False,
    ) -> None:
        check_objective(steps, "final")
        if solver not in ("cg", "neumann"):
            raise ValueError(f"solver must be 'cg' or 'neumann', got solver={solver!r}")
        check_count("max_iterations", max_iterations)
        check_count("batches", batches)
        numbers = {"tolerance": tolerance, "step_size": step_size, "damping": damping}
        for name, value in {**numbers, "gradient_tolerance": gradient_tolerance}.items():
            if value is not None:
                check_real(name, value)
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got tolerance={tolerance}")
        if step_size is not None and not step_size > 0:
            raise ValueError(f"step_size must be > 0, got step_size={step_size}")
        if not damping >= 0:
            raise ValueError(f"damping must be >= 0, got damping={damping}")
        if not gradient_tolerance > 0:
            raise ValueError(f"gradient_tolerance must be > 0, got gradient_tolerance={gradient_tolerance}")
        self.steps, self.solver, self.tolerance, self.max_iterations = steps, solver, tolerance, max_iterations
        self.step_size, self.damping, self.batches, self.warm_start = step_size, damping, batches, warm_start
        self.gradient_tolerance, self.compile = gradient_tolerance, compile
        self.report: Report | None = None

    def __repr__(self) -> str:
        return f"Implicit(steps={self.steps}, solver={self.solver!r}, max_iterations={self.max_iterations})"

    def backward(
        self, task: Task | TaskBatch, opt: Optimizer, hyper: nn.Module, generator: Generator | None = None
    ) -> Tensor:
        """Train, accumulate the hypergradient into ``.grad`` of hyper's parameters, and return the meta-loss.

        Args:
            task: what is learned on. Its inner loss should not change from step to step, or not much.
            opt: the inner optimizer.
            hyper: a module whose call returns a mapping of values.
            generator: for the task's randomness; None is torch's default generator.

        Returns:
            The meta-loss at the end of training, 0-d and detached.

        Raises:
            ValueError: a learned value that has no effect on where training ends. No ``.grad`` has been touched then.

        Warns:
            UserWarning: the inner problem has not converged, or its curvature is not positive.
        """
        if self.warm_start and isinstance(task, TaskBatch):
            raise ValueError("warm_start=True needs the same task in every call, got a TaskBatch, which draws new ones")
        leaves = Leaves(hyper)
        refuse_steering(opt, leaves.values)
        values = {**opt.defaults, **leaves.values}
        owners = (task, opt, hyper)
        last = self._going_on(owners, lambda: None, lambda state: _Trained.restored(state, owners, generator))
        trained, start = Start.draw(task, generator) if last is None else last.start
        params = self._train(trained, opt, start, values, generator)
        batches = [trained.batch(self.steps - 1, generator) for _ in range(self.batches)]

        def condition(at: Any) -> tuple[Vector, Vector]:
            return stationarity(trained, opt, at, batches, values, self.steps - 1)

        first = norm(condition(start)[1]) if last is None else last.first
        ends, gradient = condition(params)
        with torch.enable_grad():
            meta_loss = trained.meta_loss(pytree.tree_unflatten(ends, pytree.tree_structure(params)), values)
        direct = _gradient(meta_loss, [*ends, *leaves.tensors])
        right = [torch.zeros_like(x) if g is None else g for x, g in zip(ends, direct, strict=False)]

        def product(v: Vector) -> Vector:
            columns = torch.autograd.grad(gradient, ends, v, retain_graph=True, materialize_grads=True)
            return added(columns, self.damping, v)

        solution = self._solve(product, right, None if last is None else last.solution)
        through = torch.autograd.grad(gradient, leaves.tensors, solution.x, allow_unused=True)
        self.report = Report(solution.residual, solution.iterations, norm(gradient) / first if first else 0.0)
        self._warn(solution.positive)
        leaves.add(direct[len(ends) :])
        leaves.add([None if g is None else -g for g in through])
        leaves.deliver()
        if self.warm_start:  # what has diverged is no start
            good = all(math.isfinite(size) for size in (first, norm(pytree.tree_leaves(params)), norm(solution.x)))
            self._run = _Trained(owners, Start(trained, params), solution.x, first) if good else None
        return meta_loss.detach()

    @torch.no_grad()
    def _train(
        self, task: Task, opt: Optimizer, params: Any, values: Mapping[str, Any], generator: Generator | None
    ) -> Any:
        program = make_program(task, opt, params, values, self.steps)
        unroll = Unroll(program, Sources(program.inputs(program.values)), task, generator, compile=self.compile)
        return program.params(unroll.skip(unroll.sources.leaves.start, range(self.steps)))

    def _solve(self, product: Product, right: Vector, start: Vector | None) -> Solution:
        exact = 1e-10 if right[0].dtype == torch.float64 else 1e-6
        tolerance = exact if self.tolerance is None else self.tolerance
        if self.solver == "cg":
            return conjugate_gradient(product, right, tolerance, self.max_iterations, start)
        return neumann(product, right, tolerance, self.max_iterations, start, self.step_size)

    def _warn(self, positive: bool) -> None:
        assert self.report is not None
        if not self.report.gradient <= self.gradient_tolerance:  # it may be NaN
            warnings.warn(
                f"the inner problem has not converged: after steps={self.steps} its gradient is "
                f"{self.report.gradient:.2g} of what it was, and implicit gradients hold at a minimum",
                stacklevel=3,
            )
        elif not positive:
            warnings.warn("the inner problem has a direction without positive curvature; try damping", stacklevel=3)


def _gradient(value: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(value, inputs, allow_unused=True))
