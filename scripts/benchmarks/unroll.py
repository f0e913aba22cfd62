"""What d meta-loss / d lr costs: training unrolled by metaopt and its peers, against plain training.

Every contender draws the same initialisation and the same batches from one generator, trains for T steps, evaluates the
meta-loss, and (all but plain training) differentiates it with respect to the learning rate. Times are medians of
interleaved rounds in one process with one thread, as multiples of plain training by torch.optim with foreach=False.
Memory is counted where torch allocates it: the most bytes of tensors that are alive at once. A gradient is compared to
the one that metaopt records in float64: in float64 itself, where a right one agrees to rounding, and as it was timed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import report
import torch
from timing import Contender, interleaved
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import metaopt
from metaopt import functional, memory
from metaopt.metagrad import Forward, Unrolled
from metaopt.tasks.classification import Split, Splits

MIB = 2**20
PLAIN, FOREACH = "plain, foreach=False", "plain, foreach=True"
DIFFERENTIABLE, HIGHER, TORCHOPT = "torch, differentiable", "higher", "TorchOpt"
OURS, OURS_COMPILED = "Unrolled", "Unrolled, compiled"
SQRT, SQRT_COMPILED = "Unrolled, sqrt", "Unrolled, sqrt, compiled"
FORWARD, FORWARD_COMPILED = "Forward", "Forward, compiled"
ALL, ALL_COMPILED = "Unrolled, all values", "Unrolled, all, compiled"
LEARNING_RATES = {"RAdam": 0.01, "Rprop": 0.001, "Adam": 0.003}
EVERYTHING: dict[str, dict[str, Any]] = {
    "RAdam": {"lr": LEARNING_RATES["RAdam"], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4},
    "Rprop": {"lr": LEARNING_RATES["Rprop"], "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)},
}
EXPLAINED = """\
/ plain: the median over rounds of the time over that of plain training with foreach=False in the same round.
KiB a step: by how much the peak of live tensors grows with the horizon; peak MiB: the peak; RSS: of the whole process.
off: d meta-loss / d lr, relative to ours as recorded in float64: computed in float64 too, and as it was timed.
"""
MEMORY_STEPS = 200  # of the resident memory, taken in a process of its own


class Labelled(metaopt.tasks.Digits):
    """Classification like that of digits, of other data or in float64; a module can be had in place of a tree."""

    def __init__(
        self, data: Splits, network: Callable[[], nn.Module], batch_size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(network, batch_size)
        self.dtype = dtype
        self.data = Splits(*(Split(part.images.to(dtype), part.labels) for part in data))

    def init(self, generator: Generator | None) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module(generator).named_parameters()}

    def module(self, generator: Generator | None) -> nn.Module:
        """A module with the parameters that ``init`` would draw."""
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network().to(self.dtype)

    def double(self) -> Labelled:
        return Labelled(self.data, self.network, self.batch_size, torch.float64)


class Work:
    """A task with the horizons it is unrolled to."""

    def __init__(self, name: str, title: str, task: Labelled, horizons: Sequence[int]) -> None:
        self.name, self.title, self.task, self.horizons = name, title, task, list(horizons)
        self.exact = task.double()


def digits(quick: bool) -> Work:
    sizes = (64, 128, 128, 10)
    task = Labelled(metaopt.tasks.digits.load_digits(), lambda: _mlp(*sizes), batch_size=128)
    return Work("digits", "digits, MLP 64-128-128-10, batch 128", task, [10] if quick else [10, 50, 200])


def wide(quick: bool) -> Work:
    drawn = Generator().manual_seed(1)

    def split(count: int) -> Split:
        return Split(torch.randn(count, 512, generator=drawn), torch.randint(10, (count,), generator=drawn))

    data = Splits(split(2048), split(512), split(16))
    sizes = (512, 512, 512, 10)
    task = Labelled(data, lambda: _mlp(*sizes), batch_size=256)
    return Work("wide", "random inputs, MLP 512-512-512-10, batch 256", task, [10] if quick else [20])


WORKS = {"digits": digits, "wide": wide}


def _mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


# Each takes the task, the algorithm's name and the horizon, and returns d meta-loss / d lr; plain training nan.
Run = Callable[[Labelled, str, int], float]


def _plain(foreach: bool) -> Run:
    def run(task: Labelled, algorithm: str, steps: int) -> float:
        generator = Generator().manual_seed(0)
        model = task.module(generator)
        optimizer = getattr(torch.optim, algorithm)(model.parameters(), lr=LEARNING_RATES[algorithm], foreach=foreach)
        for t in range(steps):
            images, labels = task.batch(t, generator)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            cross_entropy(model(task.data.validation.images), task.data.validation.labels)
        return math.nan

    return run


def _differentiable(task: Labelled, algorithm: str, steps: int) -> float:
    """torch's own, as it must be written: parameters are not leaves, change in place, and are read as clones."""
    generator = Generator().manual_seed(0)
    lr = _learning_rate(algorithm)
    model = task.module(generator)
    params = {name: p.clone() for name, p in model.named_parameters()}
    read = lambda images: torch.func.functional_call(model, {n: p.clone() for n, p in params.items()}, (images,))  # noqa: E731
    optimizer = getattr(torch.optim, algorithm)(list(params.values()), lr=lr, differentiable=True)
    for t in range(steps):
        images, labels = task.batch(t, generator)
        loss = cross_entropy(read(images), labels)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for p, grad in zip(params.values(), grads, strict=True):
            p.grad = grad
        optimizer.step()
    meta_loss = cross_entropy(read(task.data.validation.images), task.data.validation.labels)
    (slope,) = torch.autograd.grad(meta_loss, lr)
    for p in params.values():  # or the graph, which holds them, is never freed
        p.grad = None
    return slope.item()


def _higher(task: Labelled, algorithm: str, steps: int) -> float:
    higher = importlib.import_module("higher")
    generator = Generator().manual_seed(0)
    lr = _learning_rate(algorithm)
    model = task.module(generator)
    optimizer = getattr(torch.optim, algorithm)(model.parameters(), lr=LEARNING_RATES[algorithm])
    with higher.innerloop_ctx(model, optimizer, override={"lr": [lr]}) as (fmodel, fopt):
        for t in range(steps):
            images, labels = task.batch(t, generator)
            fopt.step(cross_entropy(fmodel(images), labels))
        meta_loss = cross_entropy(fmodel(task.data.validation.images), task.data.validation.labels)
        (slope,) = torch.autograd.grad(meta_loss, lr)
    return float(slope.item())


def _torchopt(task: Labelled, algorithm: str, steps: int) -> float:
    torchopt = importlib.import_module("torchopt")
    generator = Generator().manual_seed(0)
    lr = _learning_rate(algorithm)
    model = task.module(generator)
    optimizer = getattr(torchopt, f"Meta{algorithm}")(model, lr=lr, eps=1e-8)  # RAdam's default is another than torch's
    for t in range(steps):
        images, labels = task.batch(t, generator)
        optimizer.step(cross_entropy(model(images), labels))
    meta_loss = cross_entropy(model(task.data.validation.images), task.data.validation.labels)
    (slope,) = torch.autograd.grad(meta_loss, lr)
    return float(slope.item())


def _learning_rate(algorithm: str) -> Tensor:
    return torch.tensor(LEARNING_RATES[algorithm], dtype=torch.float64, requires_grad=True)


def _ours(make: Callable[[int], Any], everything: bool = False) -> Run:
    def run(task: Labelled, algorithm: str, steps: int) -> float:
        learn = EVERYTHING[algorithm] if everything else {"lr": LEARNING_RATES[algorithm]}
        opt = _functional(algorithm)
        hyper = metaopt.Hyperparameters(opt, learn=learn)
        make(steps).backward(task, opt, hyper, Generator().manual_seed(0))
        (derivative,) = torch.autograd.grad(hyper()["lr"], hyper.lr)  # hyper learns the logarithm
        return float(hyper.lr.grad / derivative)

    return run


_OPTIMIZERS: dict[str, Any] = {}


def _functional(algorithm: str) -> Any:
    return _OPTIMIZERS.setdefault(algorithm, getattr(functional, algorithm.lower())())


RUNS: dict[str, Run] = {
    PLAIN: _plain(foreach=False),
    FOREACH: _plain(foreach=True),
    DIFFERENTIABLE: _differentiable,
    HIGHER: _higher,
    TORCHOPT: _torchopt,
    OURS: _ours(Unrolled),
    OURS_COMPILED: _ours(lambda steps: Unrolled(steps, compile=True)),
    SQRT: _ours(lambda steps: Unrolled(steps, segments="sqrt")),
    SQRT_COMPILED: _ours(lambda steps: Unrolled(steps, segments="sqrt", compile=True)),
    FORWARD: _ours(Forward),
    FORWARD_COMPILED: _ours(lambda steps: Forward(steps, compile=True)),
    ALL: _ours(Unrolled, everything=True),
    ALL_COMPILED: _ours(lambda steps: Unrolled(steps, compile=True), everything=True),
}
COMPILED = (OURS_COMPILED, SQRT_COMPILED, FORWARD_COMPILED, ALL_COMPILED)


def _absent(name: str, algorithm: str, compiler: str | None) -> str | None:
    """Why there is nothing to run, if there is not."""
    package = {HIGHER: "higher", TORCHOPT: "torchopt"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install 'metaopt[peers]'"
    if name == HIGHER and algorithm == "RAdam":
        return "higher has no RAdam"
    if name == TORCHOPT and algorithm == "Rprop":
        return "TorchOpt has no Rprop"
    if name in (ALL, ALL_COMPILED) and algorithm not in EVERYTHING:
        return ""  # not asked for
    return compiler if name in COMPILED else None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# Memory.


def _probe(contender: str, algorithm: str, steps: int) -> None:
    """In a fresh process: what a run adds to the resident memory at its peak, as one line of JSON."""
    task = digits(quick=True).task
    run = RUNS[contender]
    run(task, algorithm, 6)  # compiles, and loads what is loaded once
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:  # the peak starts from here
        file.write("5")
    before = _status("VmRSS")
    run(task, algorithm, steps)
    print(json.dumps({"rss": _status("VmHWM") - before}))


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _resident(contender: str, algorithm: str) -> int | None:
    command = [sys.executable, str(Path(__file__).parent), "unroll", "--probe", contender, algorithm]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        return int(json.loads(done.stdout.strip().splitlines()[-1])["rss"])
    except (ValueError, KeyError, IndexError, subprocess.TimeoutExpired):
        return None


# The figures.


class Bench:
    """What is measured, row by row."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.compiler = machine.no_compiler(torch.device("cpu"))
        if self.compiler is None and options.no_compile:
            self.compiler = "as --no-compile wants it"
        self.compiling = 0.0
        self.rows: list[dict[str, Any]] = []

    def measure(self, work: Work, algorithm: str) -> None:
        """Time one optimizer on one task at all its horizons, and print the tables."""
        notes: list[str] = []
        rows: list[dict[str, Any]] = []
        peaks: dict[tuple[str, int], int] = {}
        for steps in work.horizons:
            gradients: dict[str, float] = {}
            contenders, errors, first = [], {}, {}
            for name, run in RUNS.items():
                reason = _absent(name, algorithm, self.compiler)
                if reason is None:
                    start = time.perf_counter()
                    try:
                        gradients[name] = run(work.task, algorithm, steps)
                    except Exception as error:
                        errors[name] = _one_line(error)
                    else:
                        contenders.append(Contender(name, lambda run=run, s=steps: run(work.task, algorithm, s)))
                        first[name] = time.perf_counter() - start
                elif reason and (note := f"{name}: not run, {reason}") not in notes:
                    notes.append(note)
            timings = interleaved(
                contenders,
                torch.device("cpu"),
                seconds=self.options.seconds,
                rounds=1 if self.options.quick else 15,
                between=gc.collect,
                least=1 if self.options.quick else 3,
            )
            plain = next(timing.samples for timing in timings if timing.name == PLAIN)
            for timing in timings:
                row = self._row(work, algorithm, steps, timing.name)
                if timing.name in COMPILED:
                    self.compiling += max(0.0, first[timing.name] - timing.wall)
                    row["compile_s"] = max(0.0, first[timing.name] - timing.wall)
                row |= {"wall_s": timing.wall, "best_wall_s": timing.best, "rounds": timing.rounds}
                ratios = [a / b for a, b in zip(timing.samples, plain, strict=True)]
                row |= {"repeats": timing.repeats, "step_s": timing.wall / steps, "ratio": statistics.median(ratios)}
                row |= self._memory(work, algorithm, steps, timing.name, peaks)
                row |= self._gradient(work, algorithm, steps, timing.name, gradients)
                rows.append(row)
            for name, error in errors.items():
                rows.append({**self._row(work, algorithm, steps, name), "error": error})
        self._residents(work, algorithm, rows)
        for steps in work.horizons:
            last = steps == work.horizons[-1]
            self._print(work, algorithm, steps, [row for row in rows if row["steps"] == steps], notes if last else [])
        self.rows += rows

    def _row(self, work: Work, algorithm: str, steps: int, name: str) -> dict[str, Any]:
        return {"work": work.name, "algorithm": algorithm, "steps": steps, "contender": name}

    def _memory(
        self, work: Work, algorithm: str, steps: int, name: str, peaks: dict[tuple[str, int], int]
    ) -> dict[str, Any]:
        """The peak at a horizon, and by how much it grows with a step from the next shorter one."""

        def peak(horizon: int) -> int:
            if (name, horizon) not in peaks:
                peaks[name, horizon] = memory.peak(lambda: RUNS[name](work.task, algorithm, horizon))
            return peaks[name, horizon]

        shorter = max((t for t in work.horizons if t < steps), default=max(1, steps // 4))
        return {"peak_bytes": peak(steps), "bytes_per_step": (peak(steps) - peak(shorter)) / (steps - shorter)}

    def _gradient(
        self, work: Work, algorithm: str, steps: int, name: str, gradients: Mapping[str, float]
    ) -> dict[str, Any]:
        """How far a gradient is from ours in float64."""
        if name in (PLAIN, FOREACH):
            return {}
        everything = name in (ALL, ALL_COMPILED)
        key = (work.name, algorithm, steps, everything)
        if key not in _REFERENCES:
            _REFERENCES[key] = RUNS[ALL if everything else OURS](work.exact, algorithm, steps)
        reference = _REFERENCES[key]
        found: dict[str, Any] = {"gradient": gradients[name], "reference": reference}
        found["off"] = abs(gradients[name] - reference) / abs(reference)
        # What is compiled would be compiled for float64 too; and ours in float64 are checked on digits.
        if name not in COMPILED and (work.name == "digits" or name in (DIFFERENTIABLE, HIGHER, TORCHOPT)):
            found["gradient_float64"] = RUNS[name](work.exact, algorithm, steps)
            found["off_float64"] = abs(found["gradient_float64"] - reference) / abs(reference)
        return found

    def _residents(self, work: Work, algorithm: str, rows: list[dict[str, Any]]) -> None:
        """Resident memory, of RAdam on digits: whether the bytes of tensors tell the whole story."""
        if self.options.quick or work.name != "digits" or algorithm != "RAdam" or self.options.no_rss:
            return
        for row in rows:
            if row["steps"] == MEMORY_STEPS and "error" not in row:
                row["rss_bytes"] = _resident(row["contender"], algorithm)

    def _print(
        self, work: Work, algorithm: str, steps: int, rows: list[dict[str, Any]], notes: Sequence[str] = ()
    ) -> None:
        columns = ["", "/ plain", "ms a step", "KiB a step", "peak MiB", "RSS MiB", "off, float64", "off"]
        resident = any(row.get("rss_bytes") is not None for row in rows)
        cells, failed = [], []
        for row in rows:
            if "error" in row:
                cells.append([row["contender"], *["error"] * (len(columns) - 1)])
                failed.append(f"{row['contender']}: {row['error'][:150]}")
                continue
            cells.append(
                [
                    row["contender"],
                    f"{row['ratio']:.2f}",
                    f"{row['step_s'] * 1e3:.3f}",
                    f"{row['bytes_per_step'] / 1024:.0f}",
                    f"{row['peak_bytes'] / MIB:.1f}",
                    f"{row['rss_bytes'] / MIB:.1f}" if row.get("rss_bytes") is not None else "",
                    _off(row.get("off_float64")),
                    _off(row.get("off")),
                ]
            )
        if not resident:
            cells = [row[:5] + row[6:] for row in cells]
            columns = columns[:5] + columns[6:]
        report.show(f"{algorithm}, T = {steps}: {work.title}", columns, cells, [*failed, *notes])


_REFERENCES: dict[tuple[Any, ...], float] = {}


def _off(value: float | None) -> str:
    return "-" if value is None else "nan" if math.isnan(value) else f"{value:.0e}"


# The figure.

# Okabe and Ito's colours, which the colour-blind can tell apart; what is compiled is dashed in its colour.
STYLES: dict[str, tuple[str, str, str]] = {
    FOREACH: ("#999999", "-", "x"),
    DIFFERENTIABLE: ("#000000", ":", "s"),
    HIGHER: ("#CC79A7", ":", "v"),
    TORCHOPT: ("#D55E00", ":", "^"),
    OURS: ("#0072B2", "-", "o"),
    OURS_COMPILED: ("#0072B2", "--", "o"),
    SQRT: ("#009E73", "-", "D"),
    SQRT_COMPILED: ("#009E73", "--", "D"),
    FORWARD: ("#E69F00", "-", "P"),
    FORWARD_COMPILED: ("#E69F00", "--", "P"),
}


def plot(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time and memory against the horizon, of the first optimizer that was measured on several horizons."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shown = [row for row in rows if row["work"] == "digits" and "error" not in row]
    if not shown:
        raise SystemExit("bench unroll: --plot shows digits, which were not measured")
    algorithm = shown[0]["algorithm"]
    shown = [row for row in shown if row["algorithm"] == algorithm]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    figures = (("ratio", 1.0, "time, in times of plain training"), ("peak_bytes", 1 / MIB, "peak of tensors, MiB"))
    handles = {}
    for axes, (field, scale, label) in zip(panels, figures, strict=True):
        for name, (colour, line, marker) in STYLES.items():
            of = [(row["steps"], row[field] * scale) for row in shown if row["contender"] == name]
            if of:
                (handles[name],) = axes.plot(
                    *zip(*of, strict=True), color=colour, linestyle=line, marker=marker, markersize=6, linewidth=1.8,
                    markerfacecolor="white" if line != "-" else colour, label=name,
                )  # fmt: skip
        if field != "ratio":
            of = [(row["steps"], row[field] * scale) for row in shown if row["contender"] == PLAIN]
            (handles[PLAIN],) = axes.plot(*zip(*of, strict=True), color="#999999", linestyle="--", label=PLAIN)
        axes.set_xscale("log")
        axes.set_yscale("log")
        horizons = sorted({row["steps"] for row in shown})
        axes.set_xticks(horizons, [str(t) for t in horizons])
        axes.xaxis.set_minor_formatter(NullFormatter())
        if field == "ratio":
            low, high = axes.get_ylim()
            ticks = [tick for tick in (1, 2, 3, 4, 5, 6, 8, 10, 15, 20) if low < tick < high]
            axes.set_yticks(ticks, [str(tick) for tick in ticks])
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("inner steps T")
        axes.set_title(label, loc="left", fontsize=11)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"d meta-loss / d lr through T steps of {algorithm} (digits, MLP 64-128-128-10)", fontsize=12)
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file)
    print(f"Figure: {file}")


def main(arguments: list[str]) -> None:
    """Measure as the options say."""
    options = _options(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch._logging.set_logs(all=40)  # errors alone
    if options.probe:
        _probe(*options.probe, MEMORY_STEPS)
        return
    start = time.perf_counter()
    described = machine.describe(torch.device("cpu"))
    described |= {name: machine.version(name) for name in ("higher", "torchopt")}
    described["load"] = "{:.2f} {:.2f} {:.2f} at the start".format(*os.getloadavg())
    for name, what in described.items():
        print(f"{name:8} {what}")
    print()
    bench = Bench(options)
    figures = {"machine": described, "options": vars(options), "learning_rates": LEARNING_RATES, "rows": bench.rows}
    only = options.only or []
    for name, make in WORKS.items():
        if (options.quick and name != "digits") or (set(only) & set(WORKS) and name not in only):
            continue
        work = make(options.quick)
        for algorithm in LEARNING_RATES:
            if not set(only) & set(LEARNING_RATES) or algorithm in only:
                bench.measure(work, algorithm)
                if options.json:  # what there is, should the rest not come to its end
                    report.save(options.json, figures)
    taken = time.perf_counter() - start
    described["load at the end"] = "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg())
    print(EXPLAINED)
    print(f"It took {taken:.0f} s, of which compiling {bench.compiling:.0f} s; load {described['load at the end']}.")
    report.save(options.json, {**figures, "seconds": taken, "compile_seconds": bench.compiling})
    if options.plot:
        plot(options.plot, bench.rows)


def _options(arguments: list[str]) -> argparse.Namespace:
    description = str(__doc__)
    parser = argparse.ArgumentParser(prog="scripts/bench unroll", description=description)
    parser.add_argument("--quick", action="store_true", help="T = 10 on digits, one round: whether it runs")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw time and memory against T there")
    parser.add_argument("--no-compile", action="store_true", help="leave out what is compiled")
    parser.add_argument("--no-rss", action="store_true", help="leave out resident memory: a process for each")
    parser.add_argument("--seconds", type=float, metavar="S", help="of timing for each optimizer and horizon, about")
    parser.add_argument("--only", nargs="+", choices=[*WORKS, *LEARNING_RATES], help="these tasks and optimizers")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 1.0 if options.quick else 8.0
    return options
