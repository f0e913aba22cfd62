"""Checks of the differentiable steps' kernels, which ``check_kernels.py`` runs: here is what each of them does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.gpu.waiting import refusing_to_wait
from tests.kernels.steps import CASES, UNROLLS, Problem, assert_near, hypergradient, operations

Run = Callable[[Any], None]  # of a place
BACKWARD = {"radam": 36, "adam": 44, "adamw, maximize": 44, "rprop": 36}  # bytes for a float32 element; forward 28


def matches_the_operations(case: str, dtype: torch.dtype) -> Run:
    """That results and gradients are those of torch's operations: Rprop's to the last bit, but for sums."""

    def run(place: Any) -> None:
        from metaopt.kernels.gpu.differentiable import BLOCK  # where triton is installed

        ulp = torch.finfo(dtype).eps
        rounding = 0.0 if case.startswith("rprop") else ulp
        for size in (1, 1000, BLOCK + 1, *([BLOCK, 2**20 + 3] if place.full else [])):
            torch.manual_seed(size)
            problem = Problem(case, size, dtype, device=place.device)
            results = problem.step(problem.inputs), problem.module.composed(problem.inputs)
            for got, wanted in zip(*results, strict=True):
                assert_near(got, wanted, 4 * rounding, f"{size} elements")
            terms = _terms(problem, size)
            for name, got in problem.gradients(problem.step).items():
                if got.dim():
                    assert_near(got, terms[name], 64 * rounding, f"{name}, {size} elements")
                    continue
                term = terms[name].double()
                off = float((got.double() - term.sum()).abs() / term.abs().sum().clamp_min(1e-300))
                assert off <= 32 * ulp, f"{name}, {size} elements: the sum is off by {off} of its terms"

    return run


def _terms(problem: Problem, size: int) -> dict[str, Tensor]:
    """By torch's operations, with what each element adds to a coefficient's gradient."""
    whole = copy.copy(problem)
    whole.inputs = problem.with_learned(lambda x: x.expand(size))
    return whole.gradients(problem.module.composed)


def hypergradient_as_on_the_cpu(name: str) -> Run:
    """That a whole unroll gives what it gives by torch's operations on the CPU."""

    def run(place: Any) -> None:
        got = hypergradient(name, place.device)
        with operations():
            wanted = hypergradient(name)
        assert len(got) == len(wanted) > 2
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-10, atol=1e-12)

    return run


def launches(case: str) -> Run:
    """That forward is one kernel, and backward one, the end of its sums and their rounding; nobody waits for them."""

    def run(place: Any) -> None:
        problem = Problem(case, 10_000, torch.float32, device=place.device)
        step = _forward_and_backward(problem)
        step()
        with refusing_to_wait():
            step()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(names) <= 4, f"{len(names)} launches: {names}"
        assert sum(name in ("forward", "backward") for name in names) == 2, f"{names}"

    return run


def coefficients_on_the_cpu(case: str) -> Run:
    """That coefficients on the CPU count as much, and get their gradients there."""

    def run(place: Any) -> None:
        problem = Problem(case, 1000, device=place.device)
        wanted = problem.gradients(problem.step)
        names = [name for name in problem.learned if getattr(problem.inputs, name).dim() == 0]
        problem.inputs = problem.with_learned(Tensor.cpu, names)
        for name, got in problem.gradients(problem.step).items():
            assert_near(got.to(place.device), wanted[name], 1e-15, name)

    return run


def faster_than_the_operations(case: str) -> Run:
    """Forward and backward of 2^26 elements: prints the time, how much of it memory needs, and the operations'."""

    def run(place: Any) -> None:
        size = 2**26
        step = _forward_and_backward(Problem(case, size, torch.float32, device=place.device))
        ours = _milliseconds(step)
        with operations():
            theirs = _milliseconds(step)
        rate = (28 + BACKWARD[case]) * size / ours / 1e9
        print(f"         {case}: {ours:.2f} ms ({rate:.2f} TB/s), torch's operations {theirs:.2f} ms", flush=True)
        assert ours < theirs

    return run


def _forward_and_backward(problem: Problem) -> Callable[[], Any]:
    inputs = problem.with_learned(lambda x: x.clone().requires_grad_())
    leaves = [getattr(inputs, name) for name in problem.learned]
    return lambda: torch.autograd.grad(problem.step(inputs), leaves, problem.cotangents)


def _milliseconds(work: Callable[[], Any], times: int = 10) -> float:
    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / times


def checks() -> Iterator[tuple[str, Run, bool]]:
    """Names, what to run, and whether that needs a GPU."""
    for case in CASES:
        for dtype in (torch.float32, torch.float64):
            kind = str(dtype).removeprefix("torch.")
            yield f"step, {case}, {kind}", matches_the_operations(case, dtype), False
    for name in UNROLLS:
        yield f"hypergradient, {name}", hypergradient_as_on_the_cpu(name), False
    for case in BACKWARD:
        yield f"step, {case}, coefficients on the CPU", coefficients_on_the_cpu(case), True
        yield f"step, {case}, launches", launches(case), True
        yield f"step, {case}, time", faster_than_the_operations(case), True
