"""Meta-gradients with respect to all weights, against central differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaopt.learned import LearnedOptimizer
from tests.learned.problems import DESIGNS, big_steps, meta_loss, start, unroll

STEPS = 5
each_design = pytest.mark.parametrize("design", DESIGNS)


def objective(opt: LearnedOptimizer, weights: dict[str, Tensor]) -> Tensor:
    return meta_loss(unroll(opt, start(), STEPS, weights=weights)[0])


def central(opt: LearnedOptimizer, direction: dict[str, Tensor], h: float = 2e-5) -> Tensor:
    """Fourth order."""

    def at(distance: float) -> Tensor:
        with torch.no_grad():
            return objective(opt, {name: p + distance * direction[name] for name, p in opt.named_parameters()})

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def directions(opt: LearnedOptimizer) -> list[dict[str, Tensor]]:
    """Along all weights, along each tensor of weights, and along single weights."""
    zeros = {name: torch.zeros_like(p) for name, p in opt.named_parameters()}
    found = [{name: torch.randn_like(p) / p.numel() ** 0.5 for name, p in zeros.items()} for _ in range(5)]
    for name, p in zeros.items():
        found.append({**zeros, name: torch.randn_like(p) / p.numel() ** 0.5})
        one = torch.zeros_like(p).flatten()
        one[torch.randint(len(one), ())] = 1.0
        found.append({**zeros, name: one.view_as(p)})
    return found


@each_design
def test_the_gradient_of_an_unroll_reaches_every_weight_and_is_right(design: type[LearnedOptimizer]) -> None:
    opt = big_steps(design)
    grads = torch.autograd.grad(objective(opt, opt()["weights"]), list(opt.parameters()))
    named = dict(zip(dict(opt.named_parameters()), grads, strict=True))
    scale = max(grad.abs().max().item() for grad in grads)
    assert scale > 1e-3
    for direction in directions(opt):
        expected = central(opt, direction)
        actual = sum((named[name] * e).sum() for name, e in direction.items())
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8 * scale)


@each_design
def test_forward_mode_gives_the_same_directional_derivative(design: type[LearnedOptimizer]) -> None:
    opt = big_steps(design)
    weights = {name: p.detach() for name, p in opt.named_parameters()}
    grads = torch.func.grad(lambda w: objective(opt, w))(weights)
    direction = directions(opt)[0]
    _, actual = torch.func.jvp(lambda w: objective(opt, w), (weights,), (direction,))
    torch.testing.assert_close(actual, sum((grads[name] * e).sum() for name, e in direction.items()))


@each_design
def test_the_gradient_with_respect_to_the_start_is_right(design: type[LearnedOptimizer]) -> None:
    opt = big_steps(design).requires_grad_(False)

    def at(matrix: Tensor) -> Tensor:
        return meta_loss(unroll(opt, {**start(), "layer": {"matrix": matrix}}, STEPS)[0])

    matrix = start()["layer"]["matrix"].requires_grad_()
    assert torch.autograd.gradcheck(at, matrix, eps=1e-5, atol=1e-5, rtol=1e-5)


@each_design
def test_without_given_weights_its_own_get_the_gradient(design: type[LearnedOptimizer]) -> None:
    opt = big_steps(design)
    meta_loss(unroll(opt, start(), STEPS)[0]).backward()
    expected = torch.autograd.grad(objective(opt, opt()["weights"]), list(opt.parameters()))
    torch.testing.assert_close([p.grad for p in opt.parameters()], list(expected), rtol=0, atol=0)


@each_design
def test_all_is_finite_where_gradients_are_always_zero(design: type[LearnedOptimizer]) -> None:
    for dtype in (torch.float32, torch.float64):
        opt = big_steps(design, dtype)
        params = {"vector": torch.ones(3, dtype=dtype, requires_grad=True), "matrix": torch.zeros(3, 2, dtype=dtype)}
        now, state = params, opt.init(params)
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        for _ in range(10):
            now, state = opt.step(now, {name: z.requires_grad_() for name, z in zeros.items()}, state)
        sum(p.square().sum() for p in now.values()).backward()
        found = [*now.values(), params["vector"].grad, *(z.grad for z in zeros.values())]
        assert all(x.isfinite().all() for x in [*found, *(p.grad for p in opt.parameters())])
