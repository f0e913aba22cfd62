"""The fused updates against torch's single-tensor path.

Run twice by scripts/test: as it is, which tries the numba passes, and with TRITON_INTERPRET=1, which tries the Triton
kernels on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt import kernels
from metaopt.kernels.support import interpreted

# The interpreter computes with numpy, which warns of an infinity that a GPU takes in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Make = Callable[[torch.Generator], Tensor]
STEPS = 10
LR = 1e-2
RADAM: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
RPROP: dict[str, Any] = {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Make:
    return lambda generator: torch.randn(shape, dtype=dtype, generator=generator)


class Pair:
    """The same parameters under torch's optimizer and under a fused update, fed with the same gradients."""

    def __init__(self, algorithm: str, make: list[Make], flags: dict[str, bool] | None = None, **hyper: Any) -> None:
        self.algorithm, self.cache = algorithm, {}
        self.hyper = {**(RADAM if algorithm == "radam" else RPROP), **hyper}
        self.flags = {"maximize": False, **({"decoupled": False} if algorithm == "radam" else {}), **(flags or {})}
        self.generator = torch.Generator().manual_seed(1)
        self.ours = [one(self.generator) for one in make]
        self.theirs = [p.clone() for p in self.ours]  # preserves dense strides
        kind = torch.optim.RAdam if algorithm == "radam" else torch.optim.Rprop
        options = {"maximize": self.flags["maximize"], "foreach": False}
        if algorithm == "radam":
            options["decoupled_weight_decay"] = self.flags["decoupled"]
        start = {} if algorithm == "radam" else {"lr": LR}
        self.torch = kind(self.theirs, **self.hyper, **start, **options)
        second = 0.0 if algorithm == "radam" else LR
        self.state = [
            (torch.zeros_like(p), torch.full_like(p, complex(second, second) if p.is_complex() else second))
            for p in self.ours
        ]
        self.steps = [torch.zeros(()) for _ in self.ours]

    def values(self) -> tuple[Any, ...]:
        pairs = self.hyper.values()
        return tuple(itertools.chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in pairs))

    def step(self, grads: list[Tensor], scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """One fused update; the gradients belong to it from now on."""
        slots = [
            kernels.Slot(p, g, *state, step)
            for p, g, state, step in zip(self.ours, grads, self.state, self.steps, strict=True)
        ]
        prepared = kernels.prepare(slots, writes_grad=scale is not None)
        kernels.launch(self.algorithm, prepared, self.values(), self.flags, self.cache, scale, found_inf)

    def train(self, gradient: Callable[[Tensor], Tensor] | None = None, steps: int = STEPS) -> None:
        draw = gradient or (lambda p: torch.randn(p.shape, dtype=p.dtype, generator=self.generator))
        for _ in range(steps):
            grads = [draw(p) for p in self.ours]
            for p, g in zip(self.theirs, grads, strict=True):
                p.grad = g.clone()
            self.torch.step()
            self.step(grads)

    def check(self) -> None:
        """Rprop to the last bit; RAdam to the rounding of a few operations."""
        keys = ("exp_avg", "exp_avg_sq") if self.algorithm == "radam" else ("prev", "step_size")
        for mine, other, state, step in zip(self.ours, self.theirs, self.state, self.steps, strict=True):
            saved = self.torch.state[other]
            assert step == saved["step"]
            for ours, theirs in ((mine, other), *((s, saved[key]) for s, key in zip(state, keys, strict=True))):
                assert ours.dtype == theirs.dtype
                if self.algorithm == "rprop":
                    assert torch.equal(ours, theirs)
                    continue
                # 2.5 and 16 units in the last place (a gradient is up to 4); in float64 torch's 1 - beta**t cancels.
                rounding = 1e-13 if torch.finfo(ours.dtype).bits == 64 else 2**-23
                tolerance = 2.5 * rounding * theirs.abs() + 16 * rounding * (LR if ours is mine else 1.0)
                assert ((ours - theirs).abs() <= tolerance).all()


ALGORITHMS = ["radam", "rprop"]
algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
TAILS = [normal(n) for n in (1, 1023, 1024, 1025, 1027, 4099)]


@algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_every_length_of_tail_is_updated_as_torch_does(algorithm: str, dtype: torch.dtype) -> None:
    pair = Pair(algorithm, [normal(n, dtype=dtype) for n in (1, 1023, 1025, 2050)])
    pair.train()
    pair.check()


@algorithm
def test_shapes_and_no_elements(algorithm: str) -> None:
    pair = Pair(algorithm, [normal(), normal(0), normal(3, 0, 2), normal(2, 3, 4), normal(1, 1)])
    pair.train()
    pair.check()
    assert pair.steps[1] == STEPS


@algorithm
def test_four_thousand_elements_in_one_launch_with_small_ones(algorithm: str) -> None:
    pair = Pair(algorithm, TAILS)
    pair.train(steps=7)  # rectified from the sixth
    pair.check()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "betas", [(0.9, 0.9999), (0.0, 0.999), (0.3, 0.9), (0.9, 0.0), (0.9, 0.6), (0.95, 0.7)], ids=str
)
def test_radam_with_every_option(
    decoupled: bool, maximize: bool, weight_decay: float, betas: tuple[float, float]
) -> None:
    """Betas below 1/2, where lerp works from the other end; at 0; where no step, or a late one, is rectified."""
    flags = {"decoupled": decoupled, "maximize": maximize}
    pair = Pair("radam", [normal(37)], flags, betas=betas, weight_decay=weight_decay)
    pair.train(steps=15)
    pair.check()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("etas", [(0.5, 1.2), (0.3, 1.7)], ids=str)
@pytest.mark.parametrize("step_sizes", [(1e-6, 50.0), (0.009, 0.0123)], ids=str)
def test_rprop_with_every_option(maximize: bool, etas: Any, step_sizes: Any) -> None:
    pair = Pair("rprop", [normal(37)], {"maximize": maximize}, etas=etas, step_sizes=step_sizes)
    pair.train()
    pair.check()


@algorithm
def test_zero_tiny_huge_infinite_and_nan_gradients(algorithm: str) -> None:
    """Products that underflow count as 0, as in torch; what is not finite stays where it arose."""
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-40, 1e15, float("inf"), float("nan"), 1.0])
    for values in (special[:5], special):
        pair = Pair(algorithm, [normal(len(values))])
        signs = itertools.cycle([1.0, 1.0, -1.0])
        pair.train(lambda p, values=values, signs=signs: values * next(signs), steps=8)
        for ours, theirs in zip(pair.ours, pair.theirs, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())
            torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=1e-6 * LR, equal_nan=True)


def test_an_infinite_parameter_without_weight_decay_does_not_become_nan() -> None:
    pair = Pair("radam", [lambda generator: torch.tensor([float("inf"), 1.0])])
    pair.train()
    assert pair.ours[0][0] == float("inf")


def strided(name: str, generator: torch.Generator) -> Tensor:
    """A parameter whose memory is laid out in an unusual way."""
    base = torch.randn(6, 8, generator=generator)
    return {
        "transposed": base.t(),
        "misaligned": torch.randn(1030, generator=generator)[1:],
        "every other column": base[:, ::2],
        "rows": base[1:5],
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last),
        "one row": base[:1].t(),
    }[name]


@algorithm
@pytest.mark.parametrize("name", ["transposed", "misaligned", "every other column", "rows", "channels last", "one row"])
def test_any_strides_of_parameter_and_gradient(algorithm: str, name: str) -> None:
    def contiguous(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=pair.generator)

    def alike(p: Tensor) -> Tensor:
        return torch.empty_like(p).copy_(contiguous(p))

    def slices(p: Tensor) -> Tensor:
        return torch.randn(*p.shape, 2, generator=pair.generator)[..., 0]

    for gradient in (contiguous, alike, slices):
        pair = Pair(algorithm, [lambda generator: strided(name, generator), normal(5)])
        before = [p.data_ptr() for p in pair.ours]
        pair.train(gradient)
        pair.check()
        assert [p.data_ptr() for p in pair.ours] == before


@algorithm
def test_memory_beside_a_slice_is_left_alone(algorithm: str) -> None:
    pair = Pair(algorithm, [lambda generator: strided("every other column", generator)])
    base = pair.ours[0]._base
    assert base is not None
    untouched = base[:, 1::2].clone()
    pair.train()
    assert torch.equal(base[:, 1::2], untouched)


@algorithm
def test_gradients_are_unscaled_and_keep_the_quotient(algorithm: str) -> None:
    makers = [normal(1025), normal(7), lambda generator: strided("transposed", generator)]
    plain, scaled = Pair(algorithm, makers), Pair(algorithm, makers)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator) for p in plain.ours]
        times_eight = [(8.0 * g).contiguous() for g in grads]
        plain.step([g.clone() for g in grads])
        scaled.step(times_eight, scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
        assert all(torch.equal(g, big) for g, big in zip(grads, times_eight, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(plain.ours, scaled.ours, strict=True))


@algorithm
def test_nothing_changes_where_an_infinite_gradient_was_found(algorithm: str) -> None:
    pair = Pair(algorithm, [normal(1025), normal(3)])
    pair.train(steps=3)
    before = [t.clone() for t in (*pair.ours, *itertools.chain(*pair.state), *pair.steps)]
    pair.step([torch.ones_like(p) for p in pair.ours], scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    after = (*pair.ours, *itertools.chain(*pair.state), *pair.steps)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@algorithm
def test_hyperparameters_may_be_tensors(algorithm: str) -> None:
    """In float64, so that 1 - beta2 is the same number."""
    plain, tensors = Pair(algorithm, [normal(33)]), Pair(algorithm, [normal(33)])
    tensors.hyper = {
        key: tuple(torch.tensor(v, dtype=torch.float64) for v in value)
        if isinstance(value, tuple)
        else torch.tensor(value, dtype=torch.float64)
        for key, value in tensors.hyper.items()
    }
    for step in range(STEPS):
        grad = torch.randn(33, generator=torch.Generator().manual_seed(step))
        plain.step([grad.clone()])
        tensors.step([grad.clone()])
    assert torch.equal(plain.ours[0], tensors.ours[0])


def test_the_counters_of_parameters_run_apart() -> None:
    """A parameter that joins late is not rectified while the others are."""
    pair = Pair("radam", [normal(9), normal(9)])
    for step in range(12):
        grads = [torch.randn(9, generator=pair.generator) for _ in pair.ours]
        live = [0, 1] if step >= 4 else [0]
        for index in range(2):
            pair.theirs[index].grad = grads[index].clone() if index in live else None
        pair.torch.step()
        slots = [kernels.Slot(pair.ours[i], grads[i], *pair.state[i], pair.steps[i]) for i in live]
        kernels.launch("radam", kernels.prepare(slots, False), pair.values(), pair.flags, pair.cache)
    assert [int(step) for step in pair.steps] == [12, 8]
    pair.check()


@pytest.mark.parametrize("beta2", [1 - 1e-4, 1 - 1e-5, 1 - 1e-6, 1 - 1e-7])
def test_rectification_starts_at_the_sixth_step_for_betas_close_to_one(beta2: float) -> None:
    """rho_t > 5 from t = 6, though 1 - beta2^t cancels to few digits; before, the step is lr m / (1 - beta1^t)."""
    pair = Pair("radam", [normal(3)], betas=(0.0, beta2), eps=0.0)
    for step in range(1, 7):
        before = pair.ours[0].clone()
        pair.step([torch.full((3,), 2.0)])
        moved = before - pair.ours[0]
        if step < 6:
            torch.testing.assert_close(moved, torch.full((3,), 2.0 * LR), rtol=1e-5, atol=0)
        else:
            assert (moved < LR).all()  # r_6 is about .03 there, and a constant gradient's adaptive step is lr r


@pytest.mark.skipif(not interpreted(), reason="numba has no half precision")
@algorithm
def test_half_precision_keeps_a_float32_state(algorithm: str) -> None:
    """Computed in float32 and rounded once: the moments are those of float32 gradients."""
    half, full = Pair(algorithm, [normal(1025)]), Pair(algorithm, [normal(1025)])
    half.ours = [p.half() for p in half.ours]
    full.ours = [p.half().float() for p in full.ours]
    for _ in range(6):
        grad = torch.randn(1025, generator=full.generator).half()
        full.step([grad.float()])
        half.step([grad.clone()])
    assert half.ours[0].dtype == torch.float16
    assert half.state[0][0].dtype == torch.float32
    if algorithm == "radam":
        assert torch.equal(half.state[0][0], full.state[0][0])
        assert torch.equal(half.state[0][1], full.state[0][1])
    assert (half.ours[0].float() - full.ours[0]).abs().max() <= 6 * 2**-10


@algorithm
def test_tensors_that_do_not_fit_each_other_are_refused_untouched(algorithm: str) -> None:
    pair = Pair(algorithm, [normal(4)])
    pair.state[0] = (torch.zeros(3), torch.zeros(4))
    before = pair.ours[0].clone()
    with pytest.raises(kernels.Misfit, match=r"\(4,\) float32, \(4,\) float32, \(3,\) float32"):
        pair.step([torch.ones(4)])
    assert torch.equal(pair.ours[0], before)


def test_several_threads_divide_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreted():
        pytest.skip("the interpreter has one thread")
    from metaopt.kernels.cpu import launch

    monkeypatch.setattr(launch.torch, "get_num_threads", lambda: 3)
    pair = Pair("radam", [normal(5 * launch.BLOCK + 3), normal(7), normal(launch.BLOCK)])
    pair.train(steps=7)
    pair.check()
