"""One MAML meta-gradient on sinusoids: many tasks in one vmapped unroll, against a Python loop over them.

Every contender draws its tasks, takes the inner step of each and leaves the gradient with respect to the initialisation
in ``.grad``: what meta-training repeats. The loop calls the same estimator with one task after the other.
"""

from __future__ import annotations

import argparse
import warnings

import machine
import report
import timing
import torch

import metaopt
from experiments.parts.learned_start import FromStart, Start
from metaopt.metagrad import Unrolled
from metaopt.tasks import Sinusoids, TaskBatch, Wave

TASKS = 25


class Bench:
    """A meta-gradient of ``count`` tasks, both ways."""

    def __init__(self, count: int) -> None:
        self.sinusoids = Sinusoids()
        self.generator = torch.Generator().manual_seed(0)
        self.hyper = Start(self.sinusoids.initial(self.generator))
        self.family = FromStart(self.sinusoids, self.hyper)
        self.tasks = TaskBatch(self.family, count)
        self.opt = metaopt.functional.sgd(lr=0.01)

    def vmapped(self, estimator: Unrolled) -> None:
        self.hyper.zero_grad()
        estimator.backward(self.tasks, self.opt, self.hyper, self.generator)

    def by_hand(self) -> None:
        """What torch.func alone needs for it: no estimator, no task, no optimizer."""
        self.hyper.zero_grad()
        start = dict(self.hyper.start.items())

        def error(wave: Wave) -> torch.Tensor:
            task = self.sinusoids.task(wave)
            grads = torch.func.grad(lambda params: task.loss(params, task.batch(0, None), {}))(start)
            return task.meta_loss({name: p - 0.01 * grads[name] for name, p in start.items()}, {})

        waves = self.sinusoids.sample(self.tasks.count, self.generator)
        torch.vmap(error)(waves).mean().backward()

    def loop(self, estimator: Unrolled) -> None:
        self.hyper.zero_grad()
        waves = self.family.sample(self.tasks.count, self.generator)
        for index in range(self.tasks.count):
            task = self.family.task(Wave(*(part[index] for part in waves)))
            estimator.backward(task, self.opt, self.hyper, self.generator)
        self._divide()

    def loop_of_ones(self, estimator: Unrolled) -> None:
        """The same with a batch of one: a single task is part of the code that is compiled, its wave is not."""
        self.hyper.zero_grad()
        one = TaskBatch(self.family, 1)
        for _ in range(self.tasks.count):
            estimator.backward(one, self.opt, self.hyper, self.generator)
        self._divide()

    def _divide(self) -> None:
        for p in self.hyper.parameters():
            p.grad /= self.tasks.count


def main(arguments: list[str]) -> None:
    """Measure as the options say."""
    parser = argparse.ArgumentParser(prog="scripts/bench tasks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a second, not compiled: whether it runs")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--count", type=int, default=TASKS, help=f"of tasks; {TASKS} unless told")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch._logging.set_logs(all=40)  # errors alone
    warnings.filterwarnings("ignore")

    bench, eager = Bench(options.count), Unrolled(steps=1)
    contenders = [
        timing.Contender("vmap", lambda: bench.vmapped(eager)),
        timing.Contender("vmap by hand", bench.by_hand),
        timing.Contender("Python loop", lambda: bench.loop(eager)),
    ]
    device = torch.device("cpu")
    if not options.quick and machine.no_compiler(device) is None:
        compiled = Unrolled(steps=1, compile=True)
        contenders += [
            timing.Contender("vmap, compiled", lambda: bench.vmapped(compiled)),
            timing.Contender("Python loop, compiled", lambda: bench.loop_of_ones(compiled)),
        ]
    for contender in contenders:
        contender.run()
    timings = timing.interleaved(contenders, device, seconds=1.0 if options.quick else 15.0)
    loop = next(row for row in timings if row.name == "Python loop")
    report.show(
        f"MAML's meta-gradient of {options.count} sinusoids, one inner step",
        ["", "a meta-gradient", "best", "times the loop"],
        [
            [row.name, report.seconds(row.wall), report.seconds(row.best), f"{loop.wall / row.wall:.1f}"]
            for row in timings
        ],
    )
    rows = [{"contender": row.name, "seconds": row.wall, "best": row.best} for row in timings]
    report.save(options.json, {"machine": machine.describe(device), "options": vars(options), "rows": rows})
