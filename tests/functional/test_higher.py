"""Hypergradients equal those of the library `higher`, where that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from metaopt.functional import adam, rprop
from tests.functional.cases import F64

higher = pytest.importorskip("higher")

STEPS = 8


@pytest.fixture(autouse=True)
def _highers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `metaopt.contrib.higher` has put in its place in this process."""
    monkeypatch.setitem(higher.optim._opt_mapping, torch.optim.Rprop, higher.optim.DifferentiableRprop)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)


@pytest.fixture
def loss() -> Callable[[Tensor], Tensor]:
    """Of a model's output on `inputs`."""
    target = inputs()[:, :1].sin()
    return lambda output: (output - target).square().mean()


def inputs() -> Tensor:
    return torch.randn(12, 5, dtype=F64, generator=torch.Generator().manual_seed(1))


def learnable(*values: float) -> Iterator[Tensor]:
    return (torch.tensor(value, dtype=F64, requires_grad=True) for value in values)


def by_higher(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    override: dict[str, list[Any]],
    learned: list[Tensor],
    warns: AbstractContextManager[Any],
) -> tuple[Tensor, ...]:
    with warns, higher.innerloop_ctx(model, optimizer, override=override) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(loss(fmodel(inputs())))
        final = loss(fmodel(0.9 * inputs()))
        return torch.autograd.grad(final, [*learned, *fmodel.parameters(time=0)])


def by_us(
    model: nn.Module, loss: Callable[[Tensor], Tensor], opt: Any, hyper: dict[str, Any], learned: list[Tensor]
) -> tuple[Tensor, ...]:
    start = params = dict(model.named_parameters())
    state = opt.init(params, **hyper)
    gradient = torch.func.grad(lambda p: loss(functional_call(model, p, inputs())))
    for _ in range(STEPS):
        params, state = opt.step(params, gradient(params), state, **hyper)
    final = loss(functional_call(model, params, 0.9 * inputs()))
    return torch.autograd.grad(final, [*learned, *start.values()])


def test_adams_lr_eps_and_weight_decay(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
    """higher adds eps before the bias correction: ours, after it, must grow with the step to mean the same."""
    lr, eps, weight_decay = learned = list(learnable(0.05, 1e-3, 0.1))
    betas = (0.9, 0.99)
    override = {"lr": [lr], "eps": [eps], "weight_decay": [weight_decay]}
    optimizer = torch.optim.Adam(model.parameters(), betas=betas)
    expected = by_higher(model, loss, optimizer, override, learned, nullcontext())
    hyper = {"lr": lr, "eps": lambda step: eps / (1 - betas[1] ** (step + 1)) ** 0.5, "weight_decay": weight_decay}
    derived = by_us(model, loss, adam(betas=betas), hyper, learned)
    assert_close(derived, expected, rtol=1e-10, atol=1e-12)
    assert bool(torch.stack(expected[: len(learned)]).abs().min() > 1e-3)


def test_rprops_lr_and_etas(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
    lr, minus, plus = learned = list(learnable(0.02, 0.5, 1.2))
    override = {"lr": [lr], "etas": [(minus, plus)]}
    optimizer = torch.optim.Rprop(model.parameters())
    warns = pytest.warns(UserWarning, match="Differentiable Rprop")
    expected = by_higher(model, loss, optimizer, override, learned, warns)
    derived = by_us(model, loss, rprop(), {"lr": lr, "etas": (minus, plus)}, learned)
    assert_close(derived, expected, rtol=1e-10, atol=1e-12)
    assert bool(torch.stack(expected[: len(learned)]).abs().min() > 1e-3)
