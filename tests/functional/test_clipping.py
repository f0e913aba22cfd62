"""`clip_by_norm`: torch's clipping, with derivatives that are right and finite everywhere."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from metaopt.functional import clip_by_norm, radam

F64 = torch.float64


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 3.0, 1e6])
def test_it_is_torchs(max_norm: float) -> None:
    grads = {"w": torch.randn(4, 3, dtype=F64), "b": torch.randn((), dtype=F64), "none": None}
    clipped = clip_by_norm(grads, max_norm)
    params = [torch.zeros_like(g, requires_grad=True) for g in grads.values() if g is not None]
    for p, g in zip(params, grads.values(), strict=False):
        p.grad = g.clone() if g is not None else None
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    assert clipped["none"] is None
    for p, name in zip(params, grads, strict=False):
        torch.testing.assert_close(clipped[name], p.grad, rtol=2e-6, atol=0)  # torch adds 1e-6 to the norm


def test_a_norm_below_the_limit_is_left_to_the_last_bit() -> None:
    g = torch.randn(100)
    assert torch.equal(clip_by_norm(g, 1e3), g)


@pytest.mark.parametrize("max_norm", [0.7, 50.0])
def test_derivatives_are_those_of_differences(max_norm: float) -> None:
    g = torch.randn(5, dtype=F64, requires_grad=True)
    limit = torch.tensor(max_norm, dtype=F64, requires_grad=True)
    function = lambda g, limit: clip_by_norm({"a": g[:2], "b": g[2:]}, limit)["b"]  # noqa: E731
    assert gradcheck(function, (g, limit))
    assert gradgradcheck(function, (g, limit))
    assert gradcheck(function, (g, limit), check_forward_ad=True)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e20, 3e38])
def test_all_sizes_have_finite_values_and_derivatives(size: float) -> None:
    g = torch.full((4,), size, requires_grad=True)
    limit = torch.tensor(1.0, requires_grad=True)
    clipped = clip_by_norm(g, limit)
    assert clipped.norm() <= 1.0 + 1e-6
    grads = torch.autograd.grad(clipped.sum(), (g, limit), materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)
    if size > 1e-10:
        torch.testing.assert_close(clipped, torch.full((4,), 0.5))
    elif size == 0:
        assert torch.equal(grads[0], torch.ones(4))


def test_it_sits_in_an_inner_loop_under_vmap_and_compile_friendly_transforms() -> None:
    opt = radam(lr=0.1)

    def trained(limit: torch.Tensor) -> torch.Tensor:
        params, scales = torch.ones(3, dtype=F64), torch.tensor([1.0, 10.0, 100.0], dtype=F64)
        state = opt.init(params)
        for _ in range(8):
            grads = torch.func.grad(lambda p: (scales * p**4).sum())(params)
            params, state = opt.step(params, clip_by_norm(grads, limit), state)
        return (params**2).sum()

    limits = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    slopes = torch.vmap(torch.func.grad(trained))(limits)
    differences = torch.stack([(trained(x + 1e-6) - trained(x - 1e-6)) / 2e-6 for x in limits])
    torch.testing.assert_close(slopes, differences, rtol=1e-5, atol=1e-9)


def test_nothing_to_clip_is_nothing() -> None:
    assert clip_by_norm({"a": None}, 1.0) == {"a": None}
    assert clip_by_norm({}, 1.0) == {}


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_norm must be >= 0, got max_norm=-1\.0"):
        clip_by_norm(torch.ones(1), -1.0)
    with pytest.raises(TypeError, match="max_norm must be a number, got max_norm='1'"):
        clip_by_norm(torch.ones(1), "1")  # type: ignore[arg-type]
