"""A run in wandb: metrics as charts, curves as tables and plots, results as artifacts."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaopt.tracking.plain import columns_as_lists, dumps, plain_config, scalars
from metaopt.tracking.tracker import Run
from metaopt.tracking.wandb_setup import asked_mode, begin, imported


class WandB(Run):
    """A run of wandb's, in its files or on its server.

    Rows of metrics are flattened: ``hyper/lr``, ``hyper/betas[0]``, ``hyper/lr/0.weight``. Lists, such as a schedule,
    are no scalars and are left out; `curves` plots them. Every row has its step under the name of the ``axis``, and
    that is the x-axis of all charts: wandb's own step counts calls, and starts anew in a resumed run, so that after a
    `rewind` the later of two rows with the same step is the one that counts.

    Args:
        config: a dataclass or a mapping; paths and the like become text.
        project: of wandb's.
        name: of the run; wandb's own choice without.
        group: of runs.
        job_type: of the run in its group.
        mode: "online", "offline" or "disabled". None: WANDB_MODE or wandb's settings, else online where an API key is
            configured, else offline.
        dir: files go to ``dir/wandb``, what wandb stages and caches included, unless WANDB_DATA_DIR or WANDB_CACHE_DIR
            (of the whole process) say otherwise. None: the current folder.
        axis: what a step is called: "meta_step", or "inner_step" for a training run by `metaopt.inner_loop`.
        **options: anything else that ``wandb.init`` takes, such as ``tags``.

    WANDB_DIR, WANDB_PROJECT, WANDB_NAME, WANDB_RUN_GROUP and WANDB_JOB_TYPE go before the arguments, and the values of
    a sweep before those in ``config``: whoever starts the program decides.

    Attributes:
        mode: what it came to.
        folder: of the run's files, which ``wandb sync`` takes; None if disabled.

    Raises:
        ImportError: wandb is not installed.
        TypeError: a config that is neither.
        ValueError: an unknown mode.
        RuntimeError: the run could not be started: the folder, the key, the network.

    Example:
        >>> run = WandB({"lr": 0.1}, mode="disabled")
        >>> run.log({"meta_loss": 0.5}, step=0)
    """

    def __init__(
        self,
        config: Any = None,
        project: str = "metaopt",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        mode: str | None = None,
        dir: Path | str | None = None,
        axis: str = "meta_step",
        **options: Any,
    ) -> None:
        config = plain_config(config)
        self._axis = axis
        self._prefix: tuple[str, ...] = ()
        self._run: Any = None
        self.folder: Path | None = None
        self.mode = asked_mode(mode)
        if self.mode == "disabled":
            return
        self._run, self.mode = begin(
            self.mode,
            Path(os.environ.get("WANDB_DIR") or dir or "."),
            {"project": project, "name": name, "group": group, "job_type": job_type, **options},
            config,
        )
        if self._run is not None:
            self.folder = Path(self._run.dir).parent
            self._run.define_metric(axis)
            self._run.define_metric("*", step_metric=axis)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log the scalars among the metrics, flattened."""
        if self._run is not None:
            self._run.log({**scalars(metrics, "".join(f"{part}/" for part in self._prefix)), self._axis: step})

    def curves(self, name: str, columns: Mapping[str, Sequence[float]], step: int) -> None:
        """Log a table called ``name`` and a line plot of it called ``name_plot``.

        What is more than wandb's tables hold (10,000 rows) is thinned out evenly.

        Raises:
            ValueError: fewer than two columns, columns of different lengths, or empty ones.
        """
        lists = columns_as_lists(columns)
        if self._run is None:
            return
        wandb = imported()
        (x, xs), *curves = lists.items()
        # a plot has a row for each point of each curve
        every = max(1, -(-len(xs) * len(curves) // wandb.Table.MAX_ROWS))
        names, thin = list(lists), [column[::every] for column in lists.values()]
        key = "/".join((*self._prefix, name))
        self._run.log(
            {
                key: wandb.Table(columns=names, data=[list(row) for row in zip(*thin, strict=True)]),
                f"{key}_plot": wandb.plot.line_series(thin[0], thin[1:], names[1:], title=key, xname=x),
                self._axis: step,
            }
        )

    def artifact(self, name: str, content: Mapping[str, Any]) -> None:
        """Log an artifact of type "json" with one file, ``name.json``; characters that wandb refuses become "-"."""
        if self._run is None:
            return
        artifact = imported().Artifact(_artifact_name((*self._prefix, name)), type="json")
        with artifact.new_file(f"{_artifact_name((name,))}.json", mode="w", encoding="utf-8") as file:
            file.write(dumps(content))
        self._run.log_artifact(artifact)

    def rewind(self, step: int) -> None:
        """Nothing is removed: rows that wandb has got are written or sent. The later row of a step counts."""

    def scope(self, **fields: str) -> WandB:
        """The same run; the values of the fields, joined by "/", go before every name."""
        part = copy.copy(self)
        part._prefix = (*self._prefix, *(str(value) for value in fields.values()))
        return part

    def finish(self, failed: bool = False) -> None:
        """Write what is left and end the run."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def _artifact_name(parts: Sequence[str]) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))[:128]
