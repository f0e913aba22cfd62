"""The comparison as a table: who won, and who lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from torch import Tensor

from experiments.parts.evaluation import Result

WIDTH = 128  # what the table needs where the output has no width, as in a file


def make(results: Mapping[str, list[Result]], steps: int, seeds: int) -> Table:
    """One row per contender: mean and standard error of the test loss over fresh seeds.

    The last column counts the seeds on which the loss is below that of the first contender, torch's defaults.
    """
    table = Table(title=f"Test loss, mean ± standard error over {seeds} fresh seeds", title_justify="left")
    table.add_column("hyperparameters", no_wrap=True)
    for heading in ("trainings", f"{steps} steps", f"{2 * steps} steps", "accuracy", "below defaults"):
        table.add_column(heading, justify="right", no_wrap=True)
    for optimizer, rows in results.items():
        best = min(float(row.loss.nan_to_num(float("inf")).mean()) for row in rows)
        table.add_row(f"[bold]{optimizer}[/]")
        for row in rows:
            loss = _mean(row.loss)
            table.add_row(
                f"  {row.contender.name}",
                str(row.contender.trainings),
                f"[bold]{loss}[/]" if float(row.loss.mean()) == best else loss,
                _mean(row.loss_twice),
                "" if row.accuracy is None else f"{float(row.accuracy.mean()):.1%}",
                "" if row is rows[0] else f"{int((row.loss < rows[0].loss).sum())}/{seeds}",
            )
        table.add_section()
    return table


def _mean(losses: Tensor) -> str:
    error = float(losses.std(correction=1)) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    return f"{float(losses.mean()):.3f} ± {error:.3f}"


def as_record(result: Result) -> dict[str, Any]:
    """A result for the JSONL record."""
    return {
        "contender": result.contender.name,
        "numbers": result.contender.numbers,
        "trainings": result.contender.trainings,
        "test_loss_mean": result.loss.mean().item(),
        "test_loss": result.loss.tolist(),
        "test_loss_twice": result.loss_twice.tolist(),
        "test_accuracy": None if result.accuracy is None else result.accuracy.tolist(),
    }
