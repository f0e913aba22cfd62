"""How long a step by a learned optimizer takes, and what part of the machine's matrix rate its products reach.

FLOPs are those of the network's matrix products, every input counted: for the MLP 2 (19 32 + 32 32 + 32 2) an element.
They are set against two rates measured in float32: of one large square product, and of the network's own thin ones.
(The features of time are the same for all elements and enter as a bias: fewer products are computed than are counted.)
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import machine
import report
import torch
from step import Tensors
from timing import Contender, Timing, interleaved, synchronize
from workloads import Workload, workloads

from metaopt import learned, memory, optim

ADAM = "torch's Adam"
DESIGNS = {"MLP": learned.MLPOptimizer, "LSTM": learned.LSTMOptimizer, "Adafactor MLP": learned.AdafactorMLPOptimizer}
SQUARE = 1024  # times four on a GPU
THIN = ((32, 19), (32, 32), (2, 32))  # the MLP's matrices


def flops(opt: torch.nn.Module) -> int:
    """Of the matrix products for one element."""
    return sum(2 * weight.numel() for weight in opt.parameters() if weight.dim() == 2)


def rates(device: torch.device, seconds: float) -> dict[str, float]:
    """FLOPs per second of float32 products, the best of several: a square one, and the MLP's on a chunk of elements."""
    size = SQUARE * (4 if device.type == "cuda" else 1)
    count = optim.chunked.SIZES.get(device.type, optim.chunked.SIZE)
    made = []
    for shapes in (((size, size, size),), tuple((*shape, count) for shape in THIN)):
        pairs = [
            (torch.randn(m, k, device=device), torch.randn(k, n, device=device), torch.empty(m, n, device=device))
            for m, k, n in shapes
        ]

        def run(pairs: Sequence[Any] = pairs) -> None:
            for a, b, out in pairs:
                torch.mm(a, b, out=out)

        run()
        (timing,) = interleaved([Contender("", run)], device, seconds, rounds=30)
        made.append(sum(2 * m * k * n for m, k, n in shapes) / (timing.best if device.type == "cpu" else timing.device))
    return {"square": made[0], "thin": made[1]}


class Bench:
    """What is the same for all workloads."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.rates = rates(device, 0.3 if options.quick else 2.0)

    def measure(self, workload: Workload) -> list[dict[str, Any]]:
        """Time Adam and all designs on a workload, and print the table."""
        rows, notes = [], []
        params = Tensors(workload, self.device).params
        torch.manual_seed(0)
        without = "as --no-compile wants it" if self.options.no_compile else machine.no_compiler(self.device)
        wanted: dict[str, tuple[int, Callable[[], Any]]] = {ADAM: (0, lambda: torch.optim.Adam(params))}
        for name in self.options.designs:
            opt = DESIGNS[name]().to(self.device)
            wanted[name] = (flops(opt), lambda opt=opt: optim.Learned(params, opt))
            if without is None and optim.chunked.can_chunk(opt):
                wanted[f"{name}, compiled"] = (flops(opt), lambda opt=opt: optim.Learned(params, opt, compile=True))
        if without is not None:
            notes.append(f"nothing compiled: {without}")
        for name, (each, construct) in wanted.items():  # one state at a time: an LSTM's is 80 numbers an element
            optimizer = construct()
            for _ in range(2):
                optimizer.step()
            synchronize(self.device)
            peak = memory.peak(optimizer.step)
            (timing,) = interleaved([Contender(name, optimizer.step)], self.device, self.options.seconds)
            rows.append(self._row(workload, timing, each, peak))
            del optimizer
        self._print(workload, rows, notes)
        return rows

    def _row(self, workload: Workload, timing: Timing, each: int, peak: int) -> dict[str, Any]:
        rate = each * workload.elements / timing.device
        return {
            "workload": workload.name,
            "tensors": len(workload.shapes),
            "elements": workload.elements,
            "optimizer": timing.name,
            "wall_s": timing.wall,
            "device_s": timing.device,
            "best_wall_s": timing.best,
            "rounds": timing.rounds,
            "flops_per_element": each,
            "flops_per_s": rate,
            "of_square": rate / self.rates["square"],
            "of_thin": rate / self.rates["thin"],
            "peak_bytes": peak,
        }

    def _print(self, workload: Workload, rows: list[dict[str, Any]], notes: list[str]) -> None:
        columns = ["", "a step", "an element", "FLOPs", "GFLOP/s", "of square", "of thin", "peak MB"]
        cells = []
        for row in rows:
            products = [f"{row['flops_per_element']:,}", f"{row['flops_per_s'] / 1e9:.1f}"]
            products += [f"{row['of_square']:.0%}", f"{row['of_thin']:.0%}"]
            each = f"{row['wall_s'] / row['elements'] * 1e9:.3g} ns"
            products = products if row["flops_per_element"] else ["-"] * 4
            cells.append([row["optimizer"], report.seconds(row["wall_s"]), each, *products])
            cells[-1].append(f"{row['peak_bytes'] / 1e6:.1f}")
        report.show(workload.title, columns, cells, notes)


def main(arguments: list[str]) -> None:
    """Time the steps as the options say."""
    options = _options(arguments)
    torch.set_num_threads(1)
    if options.gpu and not torch.cuda.is_available():
        raise SystemExit("bench learned: torch finds no GPU")
    device = torch.device("cuda" if options.gpu else "cpu")
    warnings.filterwarnings("ignore", module="torch.*")
    described = machine.describe(device)
    for name, what in described.items():
        print(f"{name:7} {what}")
    bench = Bench(options, device)
    print("products", ", ".join(f"{name} {rate / 1e9:.1f} GFLOP/s" for name, rate in bench.rates.items()), "\n")
    rows: list[dict[str, Any]] = []
    for letter, workload in workloads(options.gpu, options.quick).items():
        if letter in options.only:
            rows += bench.measure(workload)
    print("A step: median of rounds. Peak: of what one step allocates, temporaries alone.")
    report.save(
        options.json,
        {"machine": described, "flops_per_s": bench.rates, "options": vars(options), "rows": rows},
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench learned", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the GPU, with python3's own torch and triton")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, not how fast")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--seconds", type=float, metavar="S", help="of timing for each optimizer and workload")
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS), help="these alone")
    parser.add_argument(
        "--only", nargs="+", choices=list(workloads(True, True)), default=["a", "c"], help="these workloads"
    )
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 0.3 if options.quick else 8.0
    return options
