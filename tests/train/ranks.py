"""Many processes over gloo, and what they train together in the tests.

python -m tests.train.ranks FOLDER STEPS        # a run that torchrun shares
"""

from __future__ import annotations

import datetime
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributions import constraints

from metaopt import Hyperparameters, meta_train
from metaopt.functional import radam, sgd
from metaopt.metagrad import ES, PES, Forward, Implicit, Online, Ranks, TruncatedES, Unrolled
from metaopt.tasks import Replicas, TaskBatch, Tasks
from metaopt.tracking import JSONL
from metaopt.train import MetaTrainResult
from tests.metagrad.reference import F64, Regression, seeded

OPT = radam(lr=0.05)
RUNS = 5  # neither 2 nor 4 divides it


class Bowls:
    """A family: noisy quadratics in float64, whose curvature and minimum differ."""

    def sample(self, count: int, generator: Generator | None) -> dict[str, Tensor]:
        curvature = 0.5 + torch.rand(count, 3, generator=generator, dtype=F64)
        return {"curvature": curvature, "minimum": torch.randn(count, 3, generator=generator, dtype=F64)}

    def task(self, config: dict[str, Tensor]) -> Bowl:
        return Bowl(config)


class Bowl:
    def __init__(self, config: dict[str, Tensor]) -> None:
        self.config = config

    def init(self, generator: Generator | None) -> Tensor:
        return torch.randn(3, generator=generator, dtype=F64)

    def batch(self, step: int, generator: Generator | None) -> Tensor:
        """Its scatter depends on the configuration."""
        return 0.1 * self.config["curvature"] * torch.randn(3, generator=generator, dtype=F64)

    def loss(self, params: Tensor, batch: Tensor, hyper: Any) -> Tensor:
        pull = hyper.get("penalty", 0.0) * params.square().sum()
        return (self.config["curvature"] * (params - self.config["minimum"] - batch).square()).sum() + pull

    def meta_loss(self, params: Tensor, hyper: Any) -> Tensor:
        return self.loss(params, torch.zeros(3, dtype=F64), {})


TASKS: dict[str, Callable[[], Any]] = {
    "replicas": lambda: Replicas(Regression(), RUNS),
    "tasks": lambda: Tasks(Bowls(), Bowls().sample(RUNS, seeded(3))),
    "family": lambda: TaskBatch(Bowls(), RUNS),
    "one": lambda: Regression(),
}
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "whole": lambda: Unrolled(6),
    "segments": lambda: Unrolled(6, "inner", segments="sqrt"),
    "windows": lambda: Unrolled(6, "mean", truncation=2),
    "carried": lambda: Unrolled(6, "mean", truncation=2, carry=True),
    "forward": lambda: Forward(6),
    "online": lambda: Online(4),
    "es": lambda: ES(6, std=0.1, pairs=RUNS),
    "pes": lambda: PES(6, 2, std=0.1, pairs=RUNS, stagger=True),
    "truncated es": lambda: TruncatedES(6, 2, std=0.1, pairs=RUNS),
}


def train(
    estimator: str,
    task: str,
    *,
    steps: int = 5,
    folder: Path | None = None,
    tracker: Any = None,
    hook: Callable[[int], None] = lambda step: None,
    **more: Any,
) -> tuple[list[Tensor], MetaTrainResult]:
    """The learned parameters, and the result."""
    hyper = Hyperparameters(OPT, {"lr": 0.05, "betas": (0.9, 0.99)})
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1, eps=1e-3)  # does not magnify rounding
    # The step is that of the optimizer: a resumed run goes on counting.
    meta_optimizer.register_step_post_hook(lambda *_: hook(int(next(iter(meta_optimizer.state.values()))["step"])))
    result = meta_train(
        TASKS[task](), OPT, hyper, ESTIMATORS[estimator](), meta_optimizer, steps, folder, tracker, seeded(1),
        **{"progress": False, **more},
    )  # fmt: skip
    return [p.detach().clone() for p in hyper.parameters()], result


def implicit_gradient() -> list[Tensor]:
    """Of a penalty, for tasks with fixed batches."""

    class Still(Bowls):
        def task(self, config: Any) -> Bowl:
            bowl = Bowl(config)
            bowl.batch = lambda step, generator: torch.zeros(3, dtype=F64)  # type: ignore[method-assign]
            return bowl

    opt = sgd(lr=0.1)
    hyper = Hyperparameters(opt, {"penalty": (0.3, constraints.positive)})
    Ranks().backward(Implicit(400), Tasks(Still(), Bowls().sample(RUNS, seeded(3))), opt, hyper, seeded(2))
    return [p.grad for p in hyper.parameters()]


def together(count: int, folder: Path, job: Callable[[], Any]) -> list[Any]:
    """What a job returns in each of several processes, joined by gloo; with what they print as the last item."""
    folder.mkdir()
    processes = [_forked(rank, count, folder, job) for rank in range(count)]
    for process in processes:
        os.waitpid(process, 0)
    printed = [(folder / f"{rank}.txt").read_text() for rank in range(count)]
    missing = [rank for rank in range(count) if not (folder / f"{rank}.pickle").exists()]
    assert not missing, "\n".join(printed[rank] for rank in missing)
    return [*(pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)), printed]


def _forked(rank: int, count: int, folder: Path, job: Callable[[], Any]) -> int:
    """A process that begins with everything loaded."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        file = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        dist.init_process_group(
            "gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), world_size=count, rank=rank
        )
        (folder / f"{rank}.partial").write_bytes(pickle.dumps(job()))
        (folder / f"{rank}.partial").rename(folder / f"{rank}.pickle")
        dist.barrier()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main(folder: str, steps: int) -> None:
    """A run whose first process is killed, if torchrun may restart it once."""
    torch.set_num_threads(1)
    from experiments.parts.processes import processes
    from metaopt.train import resume

    resume._PATIENCE = 0  # a checkpoint after every step
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def die(step: int) -> None:
        if step == 5 and restarts == 0 and ranks.first and os.environ["TORCHELASTIC_MAX_RESTARTS"] == "3":
            os.kill(os.getpid(), signal.SIGKILL)

    with processes() as ranks:
        record = JSONL(f"{folder}.jsonl")
        train("pes", "family", steps=steps, folder=Path(folder), tracker=record, hook=die, progress=True)
        number = ("first", "second")[ranks.rank]
        print(f"the {number} of {ranks.count} has finished, restart {restarts}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
