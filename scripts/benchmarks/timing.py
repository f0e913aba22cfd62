"""Timing contenders against each other in one process: rounds in which each takes its turn, and medians over them."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

SLEEP_CYCLES = 2e9  # of a GPU's clock, in a second: about


@dataclasses.dataclass
class Contender:
    """Something to time."""

    name: str
    run: Callable[[], object]


@dataclasses.dataclass
class Timing:
    """Medians in seconds per run. On a CPU ``device`` is ``wall``."""

    name: str
    wall: float  # from the first call to the end of the device's work, host included
    device: float  # of the device alone, while the host is ahead of it
    best: float  # least wall
    rounds: int
    repeats: int  # runs in a row within a round
    samples: tuple[float, ...]  # wall of each round


def interleaved(
    contenders: Sequence[Contender],
    device: torch.device,
    seconds: float,
    rounds: int = 15,
    at_least: float = 0.02,
    between: Callable[[], object] | None = None,
    least: int = 3,
) -> list[Timing]:
    """Time contenders in turn, so that whatever disturbs the machine disturbs all of them.

    Args:
        contenders: warmed up.
        device: on which they work.
        seconds: that all of it may take, about.
        rounds: at most.
        at_least: seconds that a contender runs for in a round, by repeating what is short.
        between: run before each round, outside the time taken.
        least: rounds at least.
    """
    sample = _on_gpu if device.type == "cuda" else _on_cpu
    repeats, estimates = [], []
    for contender in contenders:
        once = _on_cpu(contender.run, 1, 0.0, device)[0]
        again = max(1, min(5, int(at_least / once))) if once < 10 * at_least else 0
        estimate = min(once, _on_cpu(contender.run, again, 0.0, device)[0]) if again else once
        estimates.append(estimate)
        repeats.append(max(1, min(200, math.ceil(at_least / estimate))))
    a_round = sum(count * estimate for count, estimate in zip(repeats, estimates, strict=True))
    a_round *= 1 if device.type == "cpu" else 3  # twice, and the wait before the second
    rounds = max(least, min(rounds, int(seconds / a_round)))
    samples: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for number in range(rounds):
        if between is not None:
            between()
        for turn in range(len(contenders)):
            index = (turn + number) % len(contenders)
            samples[index].append(sample(contenders[index].run, repeats[index], estimates[index], device))
    return [
        Timing(
            contender.name,
            statistics.median(wall for wall, _ in taken),
            statistics.median(on_device for _, on_device in taken),
            min(wall for wall, _ in taken),
            rounds,
            count,
            tuple(wall for wall, _ in taken),
        )
        for contender, taken, count in zip(contenders, samples, repeats, strict=True)
    ]


def _on_cpu(run: Callable[[], object], repeats: int, _: float, device: torch.device) -> tuple[float, float]:
    synchronize(device)
    start = time.perf_counter()
    for _turn in range(repeats):
        run()
    synchronize(device)
    wall = (time.perf_counter() - start) / repeats
    return wall, wall


def _on_gpu(run: Callable[[], object], repeats: int, estimate: float, device: torch.device) -> tuple[float, float]:
    wall, _ = _on_cpu(run, repeats, estimate, device)
    # The GPU is kept busy until the host has put its work into the queue: then no gap between kernels is the host's.
    # (A queue holds about a thousand kernels; of steps that launch more, the host's part is seen here too.)
    waiting = min(0.2, 1.2 * wall * repeats)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(waiting * SLEEP_CYCLES))
    begin.record()
    for _turn in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return wall, begin.elapsed_time(end) / 1e3 / repeats


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Bytes per second of simple passes over memory, reads and writes counted: the best of several each.

    On a GPU a copy; on a CPU (one thread) a copy, a scaling in place and an addition in place.
    """
    count = (1 << 29 if device.type == "cuda" else 1 << 27) >> (3 if quick else 0)
    a, b = torch.ones(count, device=device), torch.ones(count, device=device)
    passes = {"copy": (2, lambda: b.copy_(a))}
    if device.type == "cpu":
        passes["scale"] = (2, lambda: a.mul_(1.0001))
        passes["add"] = (3, lambda: a.add_(b))
    contenders = [Contender(name, run) for name, (_, run) in passes.items()]
    for contender in contenders:
        contender.run()
    timings = interleaved(contenders, device, seconds=1.0 if quick else 4.0, rounds=20)
    return {
        timing.name: passes[timing.name][0] * 4 * count / (timing.best if device.type == "cpu" else timing.device)
        for timing in timings
    }
