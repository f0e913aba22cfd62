"""Checks of the kernels on a GPU, by torch and triton alone: ``python tests/gpu/check_kernels.py``.

Prints a line for each check, and exits with 1 if one fails. ``--device cpu`` with ``TRITON_INTERPRET=1`` in the
environment runs in Triton's interpreter what needs no GPU, on small sizes. ``test_gpu.py`` runs the same by pytest.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where metaopt is not installed

from metaopt import optim
from tests.gpu import check_steps
from tests.gpu.waiting import refusing_to_wait

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS: dict[str, tuple[Any, Any]] = {
    "RAdam": (optim.RAdam, torch.optim.RAdam),
    "Rprop": (optim.Rprop, torch.optim.Rprop),
}
KEYS = {"RAdam": ("exp_avg", "exp_avg_sq"), "Rprop": ("prev", "step_size")}
LR = 1e-2
EXACT_LR = 2.0**-7  # in every dtype


@dataclasses.dataclass
class Place:
    """Where checks run, and how much they do."""

    device: torch.device
    steps: int  # RAdam rectifies from the sixth

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def full(self) -> bool:
        """Whether there is time for all shapes every time."""
        return self.gpu


@dataclasses.dataclass
class Check:
    """One thing to check: ``run`` raises if it does not hold."""

    name: str
    run: Callable[[Place], None]
    needs_gpu: bool = False


class Zoo:
    """Parameters of all shapes and strides, with gradients that change at every step.

    ``params`` go to the optimizer under test and ``reference``, contiguous copies of the same values, to torch's.
    """

    def __init__(self, place: Place, dtype: torch.dtype = F32, every: bool = True, seed: int = 0) -> None:
        self.place, self.dtype = place, dtype
        self.generator = torch.Generator().manual_seed(seed)
        makers: dict[str, Callable[[], Tensor]] = {
            "1025": lambda: self.normal(1025),
            "0-d": lambda: self.normal(),
            "misaligned": lambda: self.normal(131)[1:],
            "transposed": lambda: self.normal(7, 5).t(),
            "slice": lambda: self.normal(6, 9)[:, 2:5],
        }
        if every:
            sizes = (1, 1023, 1027, 4099, 0, *([2**20 + 3] if place.full else []))
            makers |= {str(size): lambda size=size: self.normal(size) for size in sizes}
            makers |= {
                "misaligned by blocks": lambda: self.normal(3001)[1:],
                "every second": lambda: self.normal(64)[::2],
                "channels last": lambda: self.normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
                "other strides of the gradient": lambda: self.normal(12, 11),
            }
        self.params = {name: make().requires_grad_() for name, make in makers.items()}
        self.params["no gradient"] = self.normal(17).requires_grad_()
        self.reference = {name: p.detach().clone().contiguous().requires_grad_() for name, p in self.params.items()}
        self.reach = {name: real(p).abs() for name, p in self.reference.items()}  # the largest that each has been

    def normal(self, *shape: int) -> Tensor:
        """Numbers that are the same on every device and, but for rounding, of every dtype."""
        wide = torch.complex128 if self.dtype.is_complex else F64
        return torch.randn(shape, dtype=wide, generator=self.generator).to(self.dtype).to(self.place.device)

    def new_gradients(self, scale: float = 1.0) -> None:
        """The same gradients for both, those under test with the strides of whatever came up."""
        for name, p in self.params.items():
            if name == "no gradient":
                continue
            self.reach[name] = torch.maximum(self.reach[name], real(self.reference[name]).abs())
            grad = self.normal(*p.shape)
            if grad.numel() > 3:
                grad.view(-1)[::7] = 0.0
            self.reference[name].grad = grad.clone()
            grad = grad * scale
            if name == "other strides of the gradient":
                grad = grad.t().contiguous().t()
            elif p.is_contiguous() or p.numel() < 2:
                grad = grad.clone()
            else:
                grad = torch.empty_like(p).copy_(grad)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                p.grad = grad

    def groups(self, which: str, **options: Any) -> list[dict[str, Any]]:
        """Two groups, the second with another weight decay (RAdam) or other etas (Rprop)."""
        tensors = list((self.params if which == "params" else self.reference).values())
        other: dict[str, Any] = {"etas": (0.3, 1.5)} if options.pop("algorithm") == "Rprop" else {"weight_decay": 0.3}
        return [{"params": tensors[::2], **options}, {"params": tensors[1::2], **options, **other}]


def real(x: Tensor) -> Tensor:
    """Values to compare, float64 on the CPU."""
    x = x.detach().cpu()
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.to(F64)


def close(
    got: Tensor, wanted: Tensor, relative: float, absolute: float, what: str, reach: Tensor | None = None
) -> None:
    """Raise unless ``|got - wanted| <= relative |wanted| + absolute``; both 0 ask for the same bits.

    ``reach`` stands for ``|wanted|`` where it is given: what that has been on the way, at which it was rounded.

    One element in ten thousand may be off by twice that: where three roundings of ten fall to the same side.
    """
    a, b = real(got).flatten(), real(wanted).flatten()
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if not a.numel():
        return
    off = (a - b).abs()
    off = off.where(a != b, 0.0)  # infinities of one sign
    bound = relative * (b.abs() if reach is None else torch.maximum(b.abs(), reach.flatten())) + absolute
    over, far = ~(off <= bound), ~(off <= 2 * bound)
    if bool(far.any()) or int(over.sum()) > a.numel() // 10_000:
        worst = int((off - bound).nan_to_num(nan=torch.inf).argmax())
        raise AssertionError(
            f"{what}: {int(over.sum())} of {a.numel()} differ, the most at {worst}: {a[worst]:.17g} is not "
            f"{b[worst]:.17g}"
        )


def tolerances(algorithm: str, dtype: torch.dtype, lr: float = LR) -> tuple[float, float]:
    """Relative and absolute: Rprop is the same to the last bit.

    In float64 torch's own ``1 - beta2**step`` has lost digits, the more the closer beta2 is to 1.
    """
    if algorithm == "Rprop":
        return 0.0, 0.0
    return (2e-15, 1e-8 * lr) if dtype in (F64, torch.complex128) else (3e-7, 1e-6 * lr)


def matches_torch(
    algorithm: str,
    options: dict[str, Any],
    dtype: torch.dtype = F32,
    fused: bool | None = True,
    every: bool = True,
    ours: dict[str, Any] | None = None,
) -> Callable[[Place], None]:
    """That our step is that of torch's single-tensor path.

    Args:
        algorithm: ``"RAdam"`` or ``"Rprop"``.
        options: for both optimizers.
        dtype: of the parameters.
        fused: for ours.
        every: all shapes, or a few.
        ours: what ours gets instead, made on the device: names to numbers or tuples of numbers, as float64 tensors.
    """

    def run(place: Place) -> None:
        zoo = Zoo(place, dtype, every)
        mine, theirs = PAIRS[algorithm]
        as_tensors = {
            name: tuple(torch.tensor(x, dtype=F64, device=place.device) for x in value)
            if isinstance(value, tuple)
            else torch.tensor(value, dtype=F64, device=place.device)
            for name, value in (ours or {}).items()
        }
        settings = {"lr": LR, **options, **(ours or {})}
        a = mine(zoo.groups("params", algorithm=algorithm), **{**settings, **as_tensors}, fused=fused)
        b = theirs(zoo.groups("reference", algorithm=algorithm), **settings, foreach=False)
        for number in range(place.steps):
            zoo.new_gradients()
            a.step()
            b.step()
            compare(algorithm, zoo, a, b, f"step {number + 1}, ")
        assert not a.state.get(zoo.params["no gradient"]), "a parameter without a gradient has got a state"
        if fused is None:  # torch's own path keeps its counters on the CPU
            assert all(state["step"].device.type == place.device.type for state in a.state.values()), "not fused"

    return run


def compare(algorithm: str, zoo: Zoo, a: Any, b: Any, where: str = "") -> None:
    """Parameters within their tolerance, states within that of their dtype, counters the same."""
    relative, absolute = tolerances(algorithm, zoo.dtype)
    for name, p in zoo.params.items():
        reference = zoo.reference[name]
        close(p, reference, relative, absolute, f"{where}parameter {name}", zoo.reach[name])
        if name == "no gradient":
            continue
        for key in KEYS[algorithm]:
            close(a.state[p][key], b.state[reference][key], 4 * relative, relative, f"{where}{key} of {name}")
        assert float(a.state[p]["step"]) == float(b.state[reference]["step"]), f"{where}counter of {name}"


def low_precision(algorithm: str, dtype: torch.dtype, state: torch.dtype | None, **options: Any) -> Callable[..., None]:
    """That bf16 and fp16 are computed in float32 and rounded once a step.

    The reference is torch's float32 step, after each of which parameters (and states, unless these are float32) are
    rounded. Rprop is the same to the last bit; RAdam may round to the neighbour where float32 differs in its last bit.
    """

    def run(place: Place) -> None:
        zoo = Zoo(place, dtype)
        mine, theirs = PAIRS[algorithm]
        wide = {name: p.detach().float().requires_grad_() for name, p in zoo.reference.items()}
        extra = {} if state is None else {"state_dtype": state}
        a = mine([{"params": list(zoo.params.values()), **extra}], lr=EXACT_LR, fused=True, **options)
        b = theirs(list(wide.values()), lr=EXACT_LR, foreach=False, **options)
        for _ in range(place.steps):
            zoo.new_gradients()
            for name, p in wide.items():
                p.grad = None if zoo.reference[name].grad is None else zoo.reference[name].grad.float()
            a.step()
            b.step()
            with torch.no_grad():
                for p in wide.values():
                    p.copy_(p.to(dtype))
                    for key in KEYS[algorithm] if state is None and p in b.state else ():
                        b.state[p][key].copy_(b.state[p][key].to(dtype))
        # Where one is rounded to the neighbour, the other follows from there: bounds of some units in the last place of
        # what the values have been on the way, and few elements that differ at all.
        epsilon = 0.0 if algorithm == "Rprop" else torch.finfo(dtype).eps
        differing = total = 0
        for name, p in zoo.params.items():
            pairs = [(f"parameter {name}", p, wide[name], 20 * epsilon * EXACT_LR)]
            for key in KEYS[algorithm] if name != "no gradient" else ():
                saved = a.state[p][key]
                assert saved.dtype == (state or dtype), f"{key} of {name} is {saved.dtype}"
                pairs.append((f"{key} of {name}", saved, b.state[wide[name]][key], 2 * epsilon))
            for what, got, wanted, absolute in pairs:
                if got.dtype == F32:
                    close(got, wanted, 1.2e-6 * bool(epsilon), 3e-7 * bool(epsilon), what)
                else:
                    close(got, wanted, 2 * epsilon, absolute, what)
                    differing += int((real(got) != real(wanted)).sum())
                    total += got.numel()
        assert differing <= (0.02 if epsilon else 0.0) * total, f"{differing} of {total} are rounded to a neighbour"

    return run


def first_step_size(dtype: torch.dtype) -> Callable[[Place], None]:
    """That float32 step sizes of lower-precision parameters start at lr, not at lr in the lower precision."""

    def run(place: Place) -> None:
        p = torch.zeros(3, dtype=dtype, device=place.device).requires_grad_()
        p.grad = torch.ones_like(p)
        a = optim.Rprop([{"params": [p], "state_dtype": F32}], lr=LR, fused=True)
        a.step()
        close(a.state[p]["step_size"], torch.full((3,), LR), 0.0, 0.0, "step_size after the first step")

    return run


def grad_scaler(algorithm: str) -> Callable[[Place], None]:
    """That a scaled gradient is divided, and a step with an infinite one skipped."""

    def run(place: Place) -> None:
        zoo = Zoo(place, every=place.full)
        mine, theirs = PAIRS[algorithm]
        a = mine(list(zoo.params.values()), lr=LR, fused=True)
        b = theirs(list(zoo.reference.values()), lr=LR, foreach=False)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**10, growth_interval=3)
        scaler.scale(torch.zeros((), device=place.device))  # makes its tensors
        for number in range(place.steps):
            zoo.new_gradients(scale=scaler.get_scale())
            skipped = number in (1, 4)
            if skipped:
                zoo.params["1025"].grad[1024] = torch.inf
            if number == 3:
                scaler.unscale_(a)  # as for clipping
            scaler.step(a)
            before = scaler.get_scale()
            scaler.update()
            assert (scaler.get_scale() < before) is skipped, "the scale should shrink after infinity alone"
            if skipped:
                continue
            b.step()
            compare(algorithm, zoo, a, b, f"step {number + 1}, ")
            for name, p in zoo.params.items():  # a power of 2: the quotient is exact
                if p.grad is not None:
                    close(p.grad, zoo.reference[name].grad, 0.0, 0.0, f"gradient of {name} afterwards")

    return run


def state_dicts(algorithm: str) -> Callable[[Place], None]:
    """That training goes on when its state moves from ours to torch's, and back."""

    def run(place: Place) -> None:
        zoo = Zoo(place, every=place.full)
        mine, theirs = PAIRS[algorithm]

        def ours() -> Any:
            return mine(list(zoo.params.values()), lr=LR, fused=True)

        b = theirs(list(zoo.reference.values()), lr=LR, foreach=False)
        optimizers = [ours, lambda: theirs(list(zoo.params.values()), lr=LR, foreach=False), ours]
        a, saved = None, None
        for construct in optimizers:
            a = construct()
            if saved is not None:
                a.load_state_dict(copy.deepcopy(saved))
            for _ in range(3):
                zoo.new_gradients()
                a.step()
                b.step()
            compare(algorithm, zoo, a, b, f"{type(a).__module__}, ")
            if isinstance(a, (optim.RAdam, optim.Rprop)):
                for p in zoo.params.values():
                    if p.grad is not None:
                        step = a.state[p]["step"]
                        assert (step.device, step.dtype, step.dim()) == (p.device, F32, 0), f"counter on {step.device}"
            saved = a.state_dict()
        # From a process whose torch kept its counters on the CPU.
        for state in saved["state"].values():
            state["step"] = state["step"].cpu()
        a = ours()
        a.load_state_dict(copy.deepcopy(saved))
        zoo.new_gradients()
        a.step()
        b.step()
        compare(algorithm, zoo, a, b, "counters from the CPU, ")

    return run


def never_waits(algorithm: str) -> Callable[[Place], None]:
    """That a step after the first makes the host wait for nothing: same gradients, new ones, scaled ones."""

    def run(place: Place) -> None:
        zoo = Zoo(place)
        lr = torch.tensor(LR, dtype=F64, device=place.device)
        a = PAIRS[algorithm][0](list(zoo.params.values()), lr=lr, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
        scaler.scale(torch.zeros((), device=place.device))
        zoo.new_gradients()
        a.step()
        with refusing_to_wait():
            a.step()
        zoo.new_gradients()
        with refusing_to_wait():
            a.step()
        zoo.new_gradients()
        scaler.step(a)
        scaler.update()
        kept = [p.grad for p in zoo.params.values()]
        zoo.new_gradients()
        a.grad_scale, a.found_inf = (torch.ones((), device=place.device) for _ in range(2))
        with refusing_to_wait():
            a.step()  # as GradScaler calls it
        assert len(kept) == len(zoo.params)

    return run


def side_stream(work: Callable[[], object], times: int = 3) -> None:
    """Warm up before a capture, as torch's documentation says."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            work()
    torch.cuda.current_stream().wait_stream(stream)


def graph_of_a_step(algorithm: str) -> Callable[[Place], None]:
    """That a captured step, replayed, is the step: static gradients, lr changed between replays, two captures."""

    def run(place: Place) -> None:
        mine = PAIRS[algorithm][0]
        zoos = [Zoo(place), Zoo(place)]
        lrs = [torch.tensor(LR, dtype=F64, device=place.device) for _ in range(2)]
        for zoo in zoos:
            zoo.new_gradients()
        graphed, eager = (
            mine(zoo.groups("params", algorithm=algorithm), lr=lr, fused=True)
            for zoo, lr in zip(zoos, lrs, strict=True)
        )

        def refill() -> None:
            zoos[0].generator.manual_seed(n := zoos[0].generator.initial_seed() + 1)
            zoos[1].generator.manual_seed(n)
            for zoo in zoos:
                for p in zoo.params.values():
                    if p.grad is not None:
                        p.grad.copy_(zoo.normal(*p.shape))

        def same(where: str) -> None:
            for name, p in zoos[0].params.items():
                other = zoos[1].params[name]
                close(p, other, 0.0, 0.0, f"{where}, parameter {name}")
                for key in (*KEYS[algorithm], "step") if p.grad is not None else ():
                    close(graphed.state[p][key], eager.state[other][key], 0.0, 0.0, f"{where}, {key} of {name}")

        side_stream(graphed.step)
        for _ in range(3):
            eager.step()
        same("after the warm-up")
        graphs = []
        for number in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                graphed.step()
            graphs.append(graph)
            same(f"capture {number + 1} should change nothing")
            for turn in range(4):
                refill()
                for lr in lrs:
                    lr.fill_(LR / (turn + 1))
                graphs[turn % len(graphs)].replay()
                eager.step()
                same(f"capture {number + 1}, replay {turn + 1}")
            refill()
            graphed.step()  # outside a graph, between replays and before the next capture
            eager.step()
            same(f"eager after capture {number + 1}")

    return run


def graph_of_training(algorithm: str) -> Callable[[Place], None]:
    """That forward, backward and step can be one graph, whose gradients lie in the graph's own memory."""

    def run(place: Place) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1)).to(place.device)
        twin = copy.deepcopy(model)
        inputs = [torch.randn(64, 7, device=place.device) for _ in range(9)]
        static = inputs[0].clone()
        a, b = (PAIRS[algorithm][0](m.parameters(), lr=1e-3, fused=True) for m in (model, twin))

        def train(m: Any, optimizer: Any, x: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            (m(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()

        side_stream(lambda: train(model, a, static))
        for _ in range(3):
            train(twin, b, inputs[0])
        graph = torch.cuda.CUDAGraph()
        a.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            (model(static) - static.sin().sum(1, keepdim=True)).square().mean().backward()
            a.step()
        for x in inputs[1:]:
            static.copy_(x)
            graph.replay()
            torch.full((1 << 20,), torch.nan, device=place.device)  # memory that is not the graph's is written anew
            train(twin, b, x)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            close(p, q, 1e-5, 1e-6, name)
            assert float(a.state[p]["step"]) == 3 + len(inputs) - 1, f"counter of {name}"
        # Eager again after the graph, and captured again after that.
        for m, optimizer in ((model, a), (twin, b)):
            train(m, optimizer, inputs[0])
        again = torch.cuda.CUDAGraph()
        a.zero_grad(set_to_none=True)
        with torch.cuda.graph(again):
            (model(static) - static.sin().sum(1, keepdim=True)).square().mean().backward()
            a.step()
        static.copy_(inputs[1])
        again.replay()
        train(twin, b, inputs[1])
        graph.replay()  # the first still has its own gradients and table
        train(twin, b, inputs[1])
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            close(p, q, 2e-5, 2e-6, f"{name}, captured twice")

    return run


def many_parameters(algorithm: str) -> Callable[[Place], None]:
    """More parameters than one program of the preparation takes, and gradients at new addresses at every step."""

    def run(place: Place) -> None:
        mine, theirs = PAIRS[algorithm]
        generator = torch.Generator().manual_seed(1)
        sizes = [1 + number % 37 for number in range(300 if place.gpu else 20)]
        params = [torch.randn(size, generator=generator).to(place.device).requires_grad_() for size in sizes]
        reference = [p.detach().clone().requires_grad_() for p in params]
        a, b = mine(params, lr=LR, fused=True), theirs(reference, lr=LR, foreach=False)
        relative, absolute = tolerances(algorithm, F32)
        for turn in range(place.steps):
            for number, (p, q) in enumerate(zip(params, reference, strict=True)):
                p.grad = q.grad = None
                if (number + turn) % 5:  # others take part at each step, so that counters come apart
                    grad = torch.randn(p.shape, generator=generator).to(place.device)
                    p.grad, q.grad = grad, grad.clone()
            a.step()
            b.step()
        for number, (p, q) in enumerate(zip(params, reference, strict=True)):
            close(p, q, relative, absolute, f"parameter {number}")

    return run


def beyond_int32(algorithm: str) -> Callable[[Place], None]:
    """A parameter with more than 2^31 elements."""

    def run(place: Place) -> None:
        p = torch.zeros(2**31 + 1025, dtype=BF16, device=place.device).requires_grad_()
        p.grad = torch.ones_like(p)
        PAIRS[algorithm][0]([p], lr=EXACT_LR, fused=True).step()
        with torch.no_grad():
            assert bool((p == -EXACT_LR).all()), "some elements have not been updated, or twice"

    return run


def options_of(algorithm: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Names, options for both optimizers, and what ours gets as tensors on the device."""
    if algorithm == "RAdam":
        for decay in (0.0, 0.1):
            for decoupled in (False, True) if decay else (False,):
                for maximize in (False, True):
                    name = ", ".join(
                        [f"weight decay {decay}"] + ["decoupled"] * decoupled + ["maximize"] * maximize  # as flags
                    )
                    options = {"weight_decay": decay, "decoupled_weight_decay": decoupled, "maximize": maximize}
                    yield name, options, {}
        for betas in ((0.9, 0.9999), (0.0, 0.9), (0.6, 0.5), (0.99, 0.0)):
            yield f"betas {betas}", {"betas": betas, "eps": 1e-6}, {}
        yield "lr and betas on the device", {}, {"lr": LR, "betas": (0.85, 0.9999)}
        yield "weight decay and lr on the device", {"weight_decay": 0.1}, {"lr": LR}
    else:
        for maximize in (False, True):
            yield f"maximize={maximize}", {"maximize": maximize}, {}
        yield "narrow step sizes", {"step_sizes": (0.008, 0.0125)}, {}
        tensors = {"etas": (0.4, 1.3), "step_sizes": (1e-3, 0.02)}
        yield "etas, step sizes and lr on the device", {}, {**tensors, "lr": LR}


def all_checks() -> Iterator[Check]:
    """Every check; what Triton's interpreter cannot do is marked as needing a GPU."""
    for algorithm in PAIRS:
        for number, (name, options, ours) in enumerate(options_of(algorithm)):
            every = number == 0
            run = matches_torch(algorithm, options, ours=ours, every=every)
            on_gpu = matches_torch(algorithm, options, ours=ours)
            yield Check(f"{algorithm}, {name}", lambda place, a=run, b=on_gpu: (b if place.full else a)(place))
        for dtype in (F64, torch.complex64, torch.complex128):
            kind = str(dtype).removeprefix("torch.")
            run = matches_torch(algorithm, {}, dtype, every=False)
            on_gpu = matches_torch(algorithm, {}, dtype)
            yield Check(f"{algorithm}, {kind}", lambda place, a=run, b=on_gpu: (b if place.full else a)(place))
        yield Check(f"{algorithm}, fused=None", matches_torch(algorithm, {}, fused=None), needs_gpu=True)
        for dtype, state in ((F16, None), (F16, F32), (BF16, None), (BF16, F32)):
            kind = str(dtype).removeprefix("torch.") + (", float32 state" if state else "")
            # The interpreter truncates to bfloat16.
            yield Check(f"{algorithm}, {kind}", low_precision(algorithm, dtype, state), needs_gpu=dtype == BF16)
            if algorithm == "Rprop" and state:
                yield Check(f"{algorithm}, {kind}, from lr", first_step_size(dtype))
        yield Check(f"{algorithm}, many parameters", many_parameters(algorithm))
        yield Check(f"{algorithm}, GradScaler", grad_scaler(algorithm))
        yield Check(f"{algorithm}, state dicts", state_dicts(algorithm))
        yield Check(f"{algorithm}, more than 2^31 elements", beyond_int32(algorithm), needs_gpu=True)
        yield Check(f"{algorithm}, the host waits for nothing", never_waits(algorithm), needs_gpu=True)
        yield Check(f"{algorithm}, CUDA graph of a step", graph_of_a_step(algorithm), needs_gpu=True)
        yield Check(f"{algorithm}, CUDA graph of training", graph_of_training(algorithm), needs_gpu=True)
    for name, run, needs_gpu in check_steps.checks():
        yield Check(name, run, needs_gpu)


def place_on(device: str) -> Place:
    """The place for a device."""
    # A GPU's index is named, as a parameter's device names it.
    found = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    return Place(found, steps=10 if device == "cuda" else 7)


def main() -> int:
    """Run the checks, and say how each went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("-k", metavar="TEXT", default="", help="only checks with this in their name")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("check_kernels: torch finds no GPU (--device cpu with TRITON_INTERPRET=1 needs none)", file=sys.stderr)
        return 2
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("check_kernels: set TRITON_INTERPRET=1, else the CPU's own kernels would be checked", file=sys.stderr)
        return 2
    place = place_on(options.device)
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if place.gpu else 'Triton interpreted'}", flush=True
    )
    failed = ran = skipped = 0
    for check in all_checks():
        if options.k not in check.name:
            continue
        if check.needs_gpu and not place.gpu:
            print(f"skipped  {check.name}: needs a GPU")
            skipped += 1
            continue
        start = time.perf_counter()
        ran += 1
        try:
            check.run(place)
        except Exception as error:
            failed += 1
            print(f"FAILED   {check.name}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc(limit=-6, file=sys.stdout)
        else:
            print(f"ok       {check.name} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{ran - failed} ok, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
