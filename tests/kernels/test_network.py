"""The network kernel: torch's products, for all sizes, and where something is differentiated torch's products alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from metaopt import learned
from metaopt.kernels import network as kernel
from metaopt.kernels.differentiable import LEAST
from metaopt.learned.features import network
from metaopt.optim import Learned
from tests.metagrad.reference import seeded

needs_numba = pytest.mark.skipif(not kernel.serves(torch.empty(kernel.WIDTH)), reason="numba is not installed")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(sum(shape)))


def layers(inputs: int, hidden: int) -> list[tuple[Tensor, Tensor]]:
    sizes = itertools.pairwise((inputs, hidden, hidden, 2))
    return [(drawn(out, into) / math.sqrt(into), drawn(out)) for into, out in sizes]


def plain(network: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """In double precision."""
    (w1, b1), (w2, b2), (w3, b3) = [(weight.double(), bias.double()[:, None]) for weight, bias in network]
    return w3 @ (w2 @ (w1 @ x.double() + b1).relu() + b2).relu() + b3


@needs_numba
@pytest.mark.parametrize(("inputs", "hidden"), [(8, 32), (28, 16), (1, 17), (9, 40)])
@pytest.mark.parametrize("count", [1, 511, 512, 5000])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_is_the_network(inputs: int, hidden: int, count: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, parts = drawn(inputs, count), layers(inputs, hidden)
        got, want = kernel.run(parts, x), plain(parts, x)
    finally:
        torch.set_num_threads(before)
    assert got.shape == (2, count)
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=2e-6 * want.abs().max().item())


@needs_numba
def test_an_element_that_is_not_a_number_is_none_afterwards_and_spoils_no_other() -> None:
    x, parts = drawn(8, 1000), layers(8, 32)
    want = kernel.run(parts, x)
    x[3, 700] = math.nan
    got = kernel.run(parts, x)
    assert got[:, 700].isnan().all()
    others = torch.arange(1000) != 700
    assert torch.equal(got[:, others], want[:, others])


@needs_numba
def test_a_learned_optimizer_steps_alike_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one large tensor and of many small ones, in chunks of several sizes."""
    opt = learned.MLPOptimizer()
    calls, run = [], kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args: calls.append(args) or run(*args))

    def train() -> list[Tensor]:
        params = [torch.nn.Parameter(drawn(*shape)) for shape in ((300, 301), (50, 50), (2600,), (7,))]
        optimizer = Learned(params, opt)
        for _ in range(3):
            for p in params:
                p.grad = p.detach().sin()
            optimizer.step()
        return [p.detach() for p in params]

    got = train()
    assert calls
    calls.clear()
    monkeypatch.setattr(kernel, "serves", lambda hidden: False)
    want = train()
    assert not calls
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_what_is_differentiated_transformed_or_traced_is_left_to_torch() -> None:
    opt = learned.MLPOptimizer()
    weights = dict(opt.named_parameters())
    x = drawn(8, LEAST)
    parts = [part.detach() for part in weights.values()]
    with torch.no_grad():
        assert kernel.fits(x, parts) == kernel.serves(parts[0])
        assert not kernel.fits(x.t().contiguous().t(), parts)
        assert not kernel.fits(x[:, 1:], parts)
        assert not kernel.fits(x.double(), parts)
        assert not kernel.fits(x, [part.double() for part in parts])
        assert not kernel.fits(x, [part[:15] for part in parts])
        seen = []
        torch.vmap(lambda each: seen.append(kernel.fits(each, parts)) or each)(x.expand(2, -1, -1))
        torch.func.jvp(lambda each: seen.append(kernel.fits(each, parts)) or each, (x,), (x,))
        assert seen == [False, False]
    assert not kernel.fits(x, parts)
    direction, _ = network(weights, x, torch.zeros(11))
    assert direction.requires_grad
