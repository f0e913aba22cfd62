"""`Implicit`: ridge regression in closed form, its solvers, and what it refuses."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from metaopt import Hyperparameters, PerParameter
from metaopt.functional import adam, adamw, sgd
from metaopt.metagrad import Estimator, Forward, Implicit, Unrolled
from metaopt.metagrad.solvers import conjugate_gradient, neumann
from metaopt.tasks import RandomQuadratics, Replicas, TaskBatch
from tests.metagrad.reference import seeded

F64 = torch.float64
EYE = torch.eye(5, dtype=F64)


class Ridge:
    """Linear regression whose penalty, if there is one, the inner loss reads."""

    def __init__(self) -> None:
        generator = seeded(3)
        self.x, self.y = (torch.randn(40, n, generator=generator, dtype=F64) for n in (5, 1))
        self.xv, self.yv = (torch.randn(30, n, generator=generator, dtype=F64) for n in (5, 1))

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {"w": torch.randn(5, 1, generator=generator, dtype=F64)}

    def batch(self, step: int, generator: Generator | None) -> tuple[()]:
        return ()

    def loss(self, params: Mapping[str, Tensor], batch: tuple[()], hyper: Mapping[str, Any]) -> Tensor:
        w = params["w"]
        penalty = torch.as_tensor(hyper.get("penalty", 0.0))
        return 0.5 * (self.x @ w - self.y).square().mean() + 0.5 * (penalty * w.flatten() ** 2).sum()

    def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
        return (self.xv @ params["w"] - self.yv).square().mean() + hyper.get("direct", 0.0) * params["w"].sum()

    def exact(self, hyper: nn.Module, name: str = "penalty") -> tuple[Tensor, list[Tensor]]:
        """The meta-loss at the minimum and its gradients, from the normal equations."""
        values = hyper()
        penalty = values[name].expand(5)
        w = torch.linalg.solve(self.x.T @ self.x / 40 + torch.diag(penalty), self.x.T @ self.y / 40)
        loss = self.meta_loss({"w": w}, values)
        return loss.detach(), list(torch.autograd.grad(loss, list(hyper.parameters())))


TASK = Ridge()
PENALTIES: dict[str, Any] = {"one": 0.3, "each": torch.linspace(0.1, 0.6, 5, dtype=F64)}


def penalized(form: str = "one", opt: Any = None) -> tuple[Any, Hyperparameters]:
    opt = sgd(lr=0.5) if opt is None else opt
    return opt, Hyperparameters(opt, learn={"penalty": (PENALTIES[form], constraints.positive)})


@pytest.mark.parametrize("form", PENALTIES)
@pytest.mark.parametrize(
    "estimator",
    [Unrolled(400), Forward(400), Implicit(400), Implicit(400, solver="neumann", tolerance=1e-12)],
    ids=repr,
)
def test_ridge_regression_in_closed_form(estimator: Estimator, form: str) -> None:
    opt, hyper = penalized(form)
    loss = estimator.backward(TASK, opt, hyper, seeded())
    expected, grads = TASK.exact(hyper)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    assert hyper.penalty.grad is not None
    torch.testing.assert_close(hyper.penalty.grad, grads[0], rtol=1e-8, atol=0.0)


def test_weight_decay_of_the_optimizer_is_a_penalty() -> None:
    for opt in (sgd(lr=0.5, weight_decay=0.3), sgd(lr=0.2, momentum=0.5, weight_decay=0.3)):
        hyper = Hyperparameters(opt, learn=("weight_decay",))
        Implicit(600).backward(TASK, opt, hyper, seeded())
        assert hyper.weight_decay.grad is not None
        torch.testing.assert_close(
            hyper.weight_decay.grad, TASK.exact(hyper, "weight_decay")[1][0], rtol=1e-8, atol=0.0
        )


def test_weight_decay_per_parameter() -> None:
    opt = sgd(lr=0.5)
    hyper = Hyperparameters(opt, learn={"weight_decay": PerParameter(["w"], 0.3)})
    single = Hyperparameters(opt, learn={"weight_decay": 0.3})
    for module in (hyper, single):
        Implicit(600).backward(TASK, opt, module, seeded())
    assert hyper.weight_decay.grad is not None
    torch.testing.assert_close(hyper.weight_decay.grad[0], single.weight_decay.grad)


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_the_error_falls_as_the_solver_iterates(solver: Any) -> None:
    errors, residuals = [], []
    for iterations in (1, 2, 3, 5) if solver == "cg" else (1, 5, 20, 50):
        opt, hyper = penalized()
        estimator = Implicit(400, solver=solver, max_iterations=iterations)
        estimator.backward(TASK, opt, hyper, seeded())
        assert hyper.penalty.grad is not None
        assert estimator.report is not None
        assert estimator.report.iterations == iterations
        errors.append(abs(hyper.penalty.grad.item() / TASK.exact(hyper)[1][0].item() - 1))
        residuals.append(estimator.report.residual)
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert all(later < earlier for earlier, later in itertools.pairwise(residuals))
    assert errors[-1] < 1e-8


def test_a_penalty_that_the_meta_loss_reads_too_has_both_derivatives() -> None:
    opt = sgd(lr=0.5)
    hyper = Hyperparameters(opt, learn={"penalty": (0.3, constraints.positive), "direct": (0.2, constraints.positive)})
    Implicit(400).backward(TASK, opt, hyper, seeded())
    for p, grad in zip(hyper.parameters(), TASK.exact(hyper)[1], strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad, rtol=1e-8, atol=0.0)


def test_replicas_have_a_minimum_each() -> None:
    for learn in ({"penalty": (0.3, constraints.positive)}, {"weight_decay": 0.3}):
        opt = sgd(lr=0.5)
        hyper, alone = Hyperparameters(opt, learn=learn), Hyperparameters(opt, learn=learn)
        Implicit(600).backward(Replicas(TASK, 3), opt, hyper, seeded())
        Implicit(600).backward(TASK, opt, alone, seeded())
        p, q = next(hyper.parameters()), next(alone.parameters())
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=0.0)


def test_adam_ends_where_the_gradient_is_zero_too() -> None:
    schedule = lambda step: 0.1 * 0.99**step  # noqa: E731
    opt, hyper = penalized(opt=adam(lr=schedule))
    Implicit(2000).backward(TASK, opt, hyper, seeded())
    assert hyper.penalty.grad is not None
    torch.testing.assert_close(hyper.penalty.grad, TASK.exact(hyper)[1][0], rtol=1e-6, atol=0.0)


def test_a_warm_start_needs_fewer_steps_and_products() -> None:
    opt, hyper = penalized()
    estimator = Implicit(60, warm_start=True)
    iterations = []
    for _ in range(4):
        hyper.zero_grad()
        estimator.backward(TASK, opt, hyper, seeded())
        assert estimator.report is not None
        iterations.append(estimator.report.iterations)
    assert iterations[0] == 5
    assert iterations[-1] <= 1
    assert hyper.penalty.grad is not None
    torch.testing.assert_close(hyper.penalty.grad, TASK.exact(hyper)[1][0], rtol=1e-8, atol=0.0)
    estimator.reset()
    estimator.backward(TASK, opt, hyper, seeded())
    assert estimator.report.iterations == 5


def test_a_warm_start_does_not_begin_with_what_has_diverged() -> None:
    opt, hyper = penalized()
    estimator, cold = Implicit(400, warm_start=True), Implicit(400)
    with torch.no_grad():
        hyper.penalty.fill_(20.0)
    with pytest.warns(UserWarning, match="has not converged: .* nan of what it was"):
        assert estimator.backward(TASK, opt, hyper, seeded()).isnan()
    with torch.no_grad():
        hyper.penalty.fill_(-1.0)
    for each in (estimator, cold):
        hyper.zero_grad()
        each.backward(TASK, opt, hyper, seeded())
        assert hyper.penalty.grad is not None
        torch.testing.assert_close(hyper.penalty.grad, TASK.exact(hyper)[1][0], rtol=1e-8, atol=0.0)


def test_a_constant_weight_decay_has_all_its_digits() -> None:
    opt = sgd(lr=0.3, weight_decay=0.1)
    hyper = Hyperparameters(opt, learn={"penalty": (0.3, constraints.positive)})
    estimator = Implicit(2000)
    estimator.backward(TASK, opt, hyper, seeded())
    assert estimator.report is not None
    assert estimator.report.gradient < 1e-13


def test_a_parameter_in_which_the_loss_is_linear() -> None:
    class Linear(Ridge):
        def init(self, generator: Generator | None) -> dict[str, Tensor]:
            return {**super().init(generator), "line": torch.zeros(2, dtype=F64)}

        def loss(self, params: Mapping[str, Tensor], batch: tuple[()], hyper: Mapping[str, Any]) -> Tensor:
            return super().loss(params, batch, hyper) + 1e-6 * params["line"].sum()

    opt, hyper = penalized()
    Implicit(2000).backward(Linear(), opt, hyper, seeded())
    assert hyper.penalty.grad is not None
    torch.testing.assert_close(hyper.penalty.grad, TASK.exact(hyper)[1][0], rtol=1e-8, atol=0.0)


def test_damping_shifts_the_diagonal() -> None:
    opt, hyper = penalized()
    Implicit(400, damping=0.5).backward(TASK, opt, hyper, seeded())
    w = torch.linalg.solve(TASK.x.T @ TASK.x / 40 + 0.3 * EYE, TASK.x.T @ TASK.y / 40)
    v = torch.linalg.solve(TASK.x.T @ TASK.x / 40 + 0.8 * EYE, TASK.xv.T @ (TASK.xv @ w - TASK.yv) / 15)
    assert hyper.penalty.grad is not None
    torch.testing.assert_close(hyper.penalty.grad, -0.3 * (v * w).sum(), rtol=1e-8, atol=0.0)


def test_an_inner_problem_that_has_not_converged_is_warned_of_and_reported() -> None:
    opt, hyper = penalized()
    estimator = Implicit(3)
    with pytest.warns(UserWarning, match=r"has not converged: after steps=3 its gradient is 0\.\d+ of what it was"):
        estimator.backward(TASK, opt, hyper, seeded())
    assert estimator.report is not None
    assert estimator.report.gradient > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Implicit(3, gradient_tolerance=1.0).backward(TASK, opt, hyper, seeded())


class Saddle(Ridge):
    """Gradient descent from the ridge of a saddle stays there."""

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {"w": torch.tensor([[1.0], [0.0]], dtype=F64)}

    def loss(self, params: Mapping[str, Tensor], batch: tuple[()], hyper: Mapping[str, Any]) -> Tensor:
        first, second = params["w"].flatten()
        return hyper["penalty"] * first**2 - second**2

    def meta_loss(self, params: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
        return params["w"].sum() + 0.0 * hyper["penalty"]


def test_a_direction_of_negative_curvature_is_warned_of() -> None:
    opt, hyper = penalized()
    with pytest.warns(UserWarning, match="without positive curvature; try damping"):
        Implicit(400).backward(Saddle(), opt, hyper, seeded())


def test_families_are_solved_task_by_task() -> None:
    class Penalized(RandomQuadratics):
        def task(self, config: Any) -> Any:
            inner = super().task(config)

            class Task:
                init, batch = inner.init, inner.batch

                def loss(self, params: Any, batch: Any, hyper: Mapping[str, Any]) -> Tensor:
                    return inner.loss(params, batch, hyper) + hyper["penalty"].to(params) * params.square().sum()

                meta_loss = inner.meta_loss

            return Task()

    opt, hyper = sgd(lr=0.02), None
    hyper = Hyperparameters(opt, learn={"penalty": (0.5, constraints.positive)})
    estimator = Implicit(800)
    estimator.backward(TaskBatch(Penalized(3), 4), opt, hyper, seeded())
    unrolled = Hyperparameters(opt, learn={"penalty": (0.5, constraints.positive)})
    Unrolled(800).backward(TaskBatch(Penalized(3), 4), opt, unrolled, seeded())
    torch.testing.assert_close(hyper.penalty.grad, unrolled.penalty.grad, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("opt", "learn", "match"),
    [
        (sgd(lr=0.5), ("lr",), "Implicit cannot learn 'lr': where training ends does not depend on it"),
        (adam(), ("betas",), "Implicit cannot learn 'betas'"),
        (adamw(lr=0.1), ("weight_decay",), "coupled to the gradient, got decoupled_weight_decay=True"),
    ],
)
def test_what_only_steers_the_way_is_refused(opt: Any, learn: tuple[str, ...], match: str) -> None:
    hyper = Hyperparameters(opt, learn=learn)
    with pytest.raises(ValueError, match=match):
        Implicit(5).backward(TASK, opt, hyper, seeded())
    assert all(p.grad is None for p in hyper.parameters())


def test_a_value_that_nothing_reads_is_named() -> None:
    opt = sgd(lr=0.5)
    hyper = Hyperparameters(opt, learn={"penalty": (0.3, constraints.positive), "unread": (0.3, constraints.positive)})
    with pytest.raises(ValueError, match="does not depend on the learned 'unread'"):
        Implicit(100).backward(TASK, opt, hyper, seeded())
    assert all(p.grad is None for p in hyper.parameters())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 0}, "steps must be >= 1, got steps=0"),
        ({"steps": 1, "solver": "lu"}, "solver must be 'cg' or 'neumann', got solver='lu'"),
        ({"steps": 1, "tolerance": 0.0}, "tolerance must be > 0, got tolerance=0.0"),
        ({"steps": 1, "step_size": -1.0}, "step_size must be > 0, got step_size=-1.0"),
        ({"steps": 1, "max_iterations": 0}, "max_iterations must be >= 1, got max_iterations=0"),
        ({"steps": 1, "batches": 1.5}, "batches must be a whole number, got batches=1.5"),
        ({"steps": 1, "damping": "0.1"}, "damping must be a number, got damping='0.1'"),
        ({"steps": 1, "damping": -0.1}, "damping must be >= 0, got damping=-0.1"),
        ({"steps": 1, "gradient_tolerance": 0.0}, "gradient_tolerance must be > 0, got gradient_tolerance=0.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        Implicit(**arguments)


def test_a_warm_start_of_a_family_is_refused() -> None:
    opt, hyper = penalized()
    with pytest.raises(ValueError, match="warm_start=True needs the same task"):
        Implicit(5, warm_start=True).backward(TaskBatch(RandomQuadratics(3), 2), opt, hyper)


def test_solvers_against_a_direct_solution() -> None:
    matrix = torch.randn(6, 6, generator=seeded(), dtype=F64)
    matrix = matrix @ matrix.T + torch.eye(6, dtype=F64)
    b = [torch.randn(4, generator=seeded(1), dtype=F64), torch.randn(2, generator=seeded(2), dtype=F64)]
    exact = torch.linalg.solve(matrix, torch.cat(b))

    def product(v: list[Tensor]) -> list[Tensor]:
        return list((matrix @ torch.cat(v)).split([4, 2]))

    for solution in (
        conjugate_gradient(product, b, 1e-12, 50),
        neumann(product, b, 1e-12, 5000),
        neumann(product, b, 1e-12, 5000, step_size=0.05),
        conjugate_gradient(product, b, 1e-12, 50, x=[torch.ones(4, dtype=F64), torch.ones(2, dtype=F64)]),
    ):
        torch.testing.assert_close(torch.cat(solution.x), exact, rtol=1e-9, atol=1e-11)
        residual = (matrix @ torch.cat(solution.x) - torch.cat(b)).norm() / torch.cat(b).norm()
        assert solution.residual == pytest.approx(residual.item(), abs=1e-13)
        assert solution.positive


def test_a_right_side_of_zero_has_the_solution_zero_at_once() -> None:
    for solver in (conjugate_gradient, neumann):
        solution = solver(lambda v: v, [torch.zeros(3)], 1e-6, 10)
        assert solution.iterations == 0
        assert not solution.x[0].any()


def test_a_series_that_diverges_says_so() -> None:
    solution = neumann(lambda v: [10.0 * v[0]], [torch.ones(2)], 1e-6, 1000, step_size=1.0)
    assert not solution.positive
