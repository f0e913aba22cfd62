"""A program that is tracked with wandb in all ways, for the tests to look at: what it was, and where it went."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from metaopt.tracking import JSONL, Several, WandB


class Size(Enum):
    SMALL = "small"


@dataclass(frozen=True)
class Inner:
    steps: int = 60
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs")
    size: Size = Size.SMALL
    inner: Inner = field(default_factory=Inner)
    clip: float | None = None


def main(folder: Path) -> None:
    wandb = WandB(Config(), name="first", group="group", job_type="job", dir=folder, tags=["quick"])
    with Several(JSONL(folder / "record.jsonl"), wandb) as run:
        for step in range(5):
            hyper = {
                "lr": {"0.weight": 0.1 * step, "0.bias": 0.5},
                "betas": (0.9, 0.99),
                "decay": [0.1, 0.2],
                "step_sizes": (1e-6, {"w": [1.0, 2.0]}),
            }
            run.log({"meta_loss": 1.0 / (step + 1), "none": None, "note": "text", "hyper": hyper}, step)
        run.log({"nan": math.nan, "up": math.inf, "down": -math.inf}, 5)
        losses = {"train/loss": [3.0, 2.0, 1.5], "validation/loss": [3.5, math.nan, 2.5]}
        run.curves("inner", {"inner_step": [0, 1, 2], **losses}, 4)
        run.curves("long", {"inner_step": range(9_000), "a": range(9_000), "b": range(9_000)}, 5)
        run.artifact("final", {"lr": 0.1, "worst": math.inf})
        part = run.scope(optimizer="radam", study="learned, scalars")
        part.log({"meta_loss": 0.125}, 7)
        part.curves("schedule", {"inner_step": [0, 1], "lr": [0.1, 0.2]}, 7)
        part.artifact("final", {"lr": 0.2})
        part.rewind(7)
        part.log({"meta_loss": 0.0625}, 7)
        # at the same time, a run of its own
        with WandB({"lr": 0.1}, dir=folder, axis="inner_step") as inner:
            inner.log({"loss": 0.5}, 12)
            run.log({"after": 1.0}, 8)
    report = {"mode": wandb.mode, "run": str(wandb.folder), "inner": str(inner.folder)}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
