"""How long one step of RAdam and of Rprop takes, and what part of the memory's bandwidth it reaches.

Bytes are those that a single pass must move: four reads (parameter, gradient, two states) and three writes, 28 bytes
for a float32 element. A step that makes temporaries moves more, and its GB/s says how far it is from that pass.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import machine
import report
import torch
from timing import Contender, Timing, bandwidth, interleaved, synchronize
from torch import Tensor
from workloads import Workload, workloads

from metaopt import optim

ALGORITHMS = {"RAdam": (torch.optim.RAdam, optim.RAdam), "Rprop": (torch.optim.Rprop, optim.Rprop)}
OURS, FOREACH, SINGLE = "ours, fused", "torch, foreach", "torch, foreach=False"
COMPILED, ADAM = "torch, compiled", "torch's fused Adam"
OURS_FLOAT32 = "ours, float32 state"
# Of compiling for one more tensor; of compiling all. Inductor's code for a CPU is not one kernel but one per tensor.
COMPILE_SECONDS = {"cpu": (0.5, 60.0), "cuda": (0.15, 150.0)}
MOST_COMPILED = 300


class Tensors:
    """The parameters and gradients of a workload, which all contenders share."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, dtype=workload.dtype, device=device, generator=generator)

        self.params = [drawn(shape).requires_grad_() for shape in workload.shapes]
        for p in self.params:
            p.grad = drawn(tuple(p.shape))
        self._signs = torch.randn(1 << 16, device=device, generator=generator).sign().to(workload.dtype)

    @torch.no_grad()
    def flip(self) -> None:
        """Change the sign of half of all gradients: Rprop's update depends on whether it has changed."""
        for p in self.params:
            flat, whole = p.grad.view(-1), p.numel() // len(self._signs)
            if whole:
                flat[: whole * len(self._signs)].view(whole, -1).mul_(self._signs)
            rest = flat[whole * len(self._signs) :]
            rest.mul_(self._signs[: len(rest)])


class Bench:
    """What is the same for all workloads: options, bandwidth, and what compiling has taken."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.compiling = 0.0
        self.bandwidths = bandwidth(device, options.quick)
        self.peak = max(self.bandwidths.values())

    def contenders(
        self, algorithm: str, workload: Workload, tensors: Tensors, notes: list[str]
    ) -> tuple[list[Contender], dict[str, int]]:
        """All that can run, warmed up, and the bytes of an element for each."""
        theirs, ours = ALGORITHMS[algorithm]
        params, itemsize = tensors.params, workload.dtype.itemsize
        wanted: dict[str, Callable[[], Any]] = {
            SINGLE: lambda: theirs(params, foreach=False),
            FOREACH: lambda: theirs(params, foreach=True),
            COMPILED: lambda: theirs(params, capturable=self.device.type == "cuda"),
            ADAM: lambda: torch.optim.Adam(params, fused=True),
            OURS: lambda: ours(params, fused=True),
        }
        if itemsize == 2:
            wanted[OURS_FLOAT32] = lambda: ours([{"params": params, "state_dtype": torch.float32}], fused=True)
        made, sizes = [], {}
        for name, construct in wanted.items():
            reason = self._no_compile(workload) if name == COMPILED else None
            if reason is None:
                try:
                    step = self._warm(construct(), name == COMPILED)
                except Exception as error:
                    lines = str(error).strip().splitlines() or [""]
                    reason = f"{type(error).__name__}: {lines[0][:120]}"
            if reason is not None:
                notes.append(f"{algorithm}, {name}: not run, {reason}")
                continue
            made.append(Contender(name, step))
            sizes[name] = 3 * itemsize + 4 * (4 if name == OURS_FLOAT32 else itemsize)
        return made, sizes

    def _no_compile(self, workload: Workload) -> str | None:
        count = len(workload.shapes)
        each, most = COMPILE_SECONDS[self.device.type]
        most = self.options.compile_seconds if self.options.compile_seconds is not None else most
        if self.options.no_compile:
            return "as --no-compile wants it"
        if count > MOST_COMPILED:
            return f"compiling for {count:,} tensors takes minutes"
        if self.compiling + each * count > most:
            return f"compiling would take about {each * count:.0f} s more (see --compile-seconds)"
        return machine.no_compiler(self.device)

    def _warm(self, optimizer: Any, compiled: bool) -> Callable[[], object]:
        step = optimizer.step
        optimizer.step()
        for state in optimizer.state.values():
            state["step"].fill_(10.0)  # RAdam rectifies from the sixth step, and does less before
        if compiled:
            torch._dynamo.reset()
            step = torch.compile(optimizer.step)
        start = time.perf_counter()
        for _ in range(3 if compiled else 1):
            step()
        synchronize(self.device)
        if compiled:
            self.compiling += time.perf_counter() - start
        return step

    def measure(self, workload: Workload) -> list[dict[str, Any]]:
        """Time both algorithms on a workload, and print the table."""
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        tensors = Tensors(workload, self.device)
        for algorithm in ALGORITHMS:
            contenders, sizes = self.contenders(algorithm, workload, tensors, notes)
            seconds = 0.3 if self.options.quick else self.options.seconds
            at_least = 0.005 if self.options.quick or self.device.type == "cuda" else 0.02
            timings = interleaved(contenders, self.device, seconds, at_least=at_least, between=tensors.flip)
            walls = {timing.name: timing.wall for timing in timings}
            rows += [self._row(algorithm, workload, timing, sizes[timing.name], walls) for timing in timings]
            del contenders
            torch._dynamo.reset()
            gc.collect()
        self._print(workload, rows, notes)
        return rows

    def _row(
        self, algorithm: str, workload: Workload, timing: Timing, size: int, walls: dict[str, float]
    ) -> dict[str, Any]:
        moved = size * workload.elements
        return {
            "workload": workload.name,
            "tensors": len(workload.shapes),
            "elements": workload.elements,
            "dtype": str(workload.dtype),
            "algorithm": algorithm,
            "contender": timing.name,
            "wall_s": timing.wall,
            "device_s": timing.device,
            "best_wall_s": timing.best,
            "rounds": timing.rounds,
            "repeats": timing.repeats,
            "bytes": moved,
            "bytes_per_s": moved / timing.device,
            "of_bandwidth": moved / timing.device / self.peak,
            "streams": timing.device / (moved / self.peak),
            "over_ours": timing.wall / walls[OURS] if OURS in walls else None,
            "over_torch": timing.wall / walls[SINGLE] if SINGLE in walls else None,
        }

    def _print(self, workload: Workload, rows: list[dict[str, Any]], notes: list[str]) -> None:
        gpu = self.device.type == "cuda"
        columns = ["", "a step", *(["on the GPU"] if gpu else []), "/ ours", "/ foreach=False", "GB/s"]
        columns += ["of a copy"] if gpu else ["of a stream", "streams"]
        cells = [
            [
                f"{row['algorithm']}  {row['contender']}",
                report.seconds(row["wall_s"]),
                *([report.seconds(row["device_s"])] if gpu else []),
                "-" if row["over_ours"] is None else f"{row['over_ours']:.2f}",
                "-" if row["over_torch"] is None else f"{row['over_torch']:.3f}",
                f"{row['bytes_per_s'] / 1e9:.1f}",
                f"{row['of_bandwidth']:.1%}",
                *([] if gpu else [f"{row['streams']:.2f}"]),
            ]
            for row in rows
        ]
        report.show(workload.title, columns, cells, notes)


def main(arguments: list[str]) -> None:
    """Time the steps as the options say."""
    options = _options(arguments)
    torch.set_num_threads(1)
    if options.gpu and not torch.cuda.is_available():
        raise SystemExit("bench step: torch finds no GPU")
    device = torch.device("cuda" if options.gpu else "cpu")
    warnings.filterwarnings("ignore", module="torch.*")
    torch._logging.set_logs(all=40)  # errors alone
    start = time.perf_counter()
    described = machine.describe(device)
    for name, what in described.items():
        print(f"{name:7} {what}")
    bench = Bench(options, device)
    print("memory ", ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in bench.bandwidths.items()), "\n")
    rows: list[dict[str, Any]] = []
    for letter, workload in workloads(options.gpu, options.quick).items():
        if options.only is None or letter in options.only:
            rows += bench.measure(workload)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(
        "A step: median of interleaved rounds"
        + (", host and GPU, until the GPU is done; GB/s is of the time on the GPU." if options.gpu else ", one thread.")
    )
    print("Streams: the time of a step in times of one pass at the bandwidth above.\n" if not options.gpu else "")
    taken = time.perf_counter() - start
    print(f"All of it took {taken:.0f} s, of which torch.compile {bench.compiling:.0f} s.")
    report.save(
        options.json,
        {
            "machine": described,
            "bandwidth_bytes_per_s": bench.bandwidths,
            "options": vars(options),
            "seconds": taken,
            "compile_seconds": bench.compiling,
            "rows": rows,
        },
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench step", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the GPU, with python3's own torch and triton")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, not how fast")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--compile-seconds", type=float, metavar="S", help="what compiling may take in all")
    parser.add_argument("--seconds", type=float, metavar="S", help="of timing for each workload and algorithm")
    parser.add_argument("--only", nargs="+", choices=list(workloads(True, True)), help="these workloads")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 4.0 if options.gpu else 8.0
    return options
