"""Tracking as every experiment starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from metaopt.tracking.jsonl import JSONL
from metaopt.tracking.plain import plain_config
from metaopt.tracking.several import Several
from metaopt.tracking.tracker import Run
from metaopt.tracking.wandb_setup import asked_mode, imported
from metaopt.tracking.weights_and_biases import WandB


def start(
    folder: Path | str,
    config: Any,
    *,
    name: str,
    group: str | None = None,
    job_type: str | None = None,
    wandb: Literal["auto", "off", "offline", "online"] = "auto",
) -> Run:
    """Track a run in ``folder/record.jsonl``, and in wandb where it is installed and not switched off.

    Lines are added to a record that is there: a new run in the same folder begins with ``rewind(0)``.

    Args:
        folder: of the run; made if it is missing. wandb's files go to ``folder/wandb``.
        config: a dataclass or a mapping, shown by wandb.
        name: of the run.
        group: of runs, in wandb.
        job_type: of the run in its group.
        wandb: "auto" follows WANDB_MODE, is online where an API key is configured and offline elsewhere, and does
            without wandb where it is not installed; "off" is the record alone.

    Raises:
        TypeError: a config that is neither, with wandb or without.
        ValueError: an unknown ``wandb``.
        OSError: the folder cannot be made, as where it is a file.
        ImportError: wandb is not installed, and ``wandb`` is "offline" or "online".
        RuntimeError: wandb could not start the run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, start(folder, {}, name="first", wandb="off") as run:
        ...     run.scope(optimizer="radam").log({"meta_loss": 0.5}, step=0)
        ...     print((Path(folder) / "record.jsonl").read_text(), end="")
        {"optimizer": "radam", "step": 0, "meta_loss": 0.5}
    """
    if wandb not in ("auto", "off", "offline", "online"):
        raise ValueError(f"wandb must be 'auto', 'off', 'offline' or 'online', got wandb={wandb!r}")
    config = plain_config(config)
    mode = None if wandb == "auto" else wandb
    record = JSONL(Path(folder) / "record.jsonl")
    if wandb == "off" or asked_mode(mode) == "disabled":
        return record
    if wandb == "auto" and not _installed():
        return record
    return Several(record, WandB(config, name=name, group=group, job_type=job_type, mode=mode, dir=folder))


def _installed() -> bool:
    """Whether wandb is there; an extra that is not installed is a choice, one that is broken an error."""
    try:
        imported()
    except ImportError as error:
        if error.name == "wandb":
            return False
        raise
    return True
