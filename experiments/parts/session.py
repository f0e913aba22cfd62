"""What every experiment does around its work: options and files of options, tracking, checkpoints, its resolved config.

if __name__ == "__main__":
    main(options(Config, __doc__))

def main(config: Config) -> ...:
    with session(config, "hyperopt") as run:
        metaopt.meta_train(task, opt, hyper, estimator, meta_optimizer, **run.part(optimizer="radam"))
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import tyro
import yaml

from experiments.parts.processes import refuse_several
from metaopt import tracking
from metaopt.metagrad import Ranks
from metaopt.tracking import JSONL, Nothing, Run, Several

# A sweep's engine gives each trial a folder of its own, and torchrun counts how often it has restarted the processes.
_TRIAL, _RESTARTS = "METAOPT_CHECKPOINT", "TORCHELASTIC_RESTART_COUNT"
# Where the engine looks for the metric of a program that does not log to wandb.
_RECORD = "METAOPT_RECORD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracked:
    """The options that all experiments have."""

    out: Path = Path("runs")
    """Folder for figures, config.yaml, record.jsonl, checkpoints and wandb's files."""
    resume: bool = False
    """Go on from the checkpoints that are there, in place of removing them."""
    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    """Track in wandb too: auto is offline where no API key is configured, and nothing without the package."""


ConfigT = TypeVar("ConfigT", bound=Tracked)


class Part(TypedDict, total=False):
    """Keyword arguments of `metaopt.meta_train`."""

    checkpoint: Path
    tracker: Run


# Neither tracked nor saved.
ALONE = Part()


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of an experiment.

    Attributes:
        folder: of its results.
        tracker: of everything; `part` has it for one of several meta-training runs.
        checkpoints: their folder.
    """

    folder: Path
    tracker: Run
    checkpoints: Path

    def part(self, **fields: str) -> Part:
        """Tracking and checkpoints of a meta-training run, which these fields tell from the others."""
        name = re.sub(r"\W+", "-", " ".join(fields.values())) or "run"
        return Part(
            checkpoint=self.checkpoints / name, tracker=self.tracker.scope(**fields) if fields else self.tracker
        )


@contextmanager
def session(config: Tracked, name: str, group: str | None = None) -> Iterator[Session]:
    """Track an experiment, and keep its checkpoints; of several `processes` the first does.

    Args:
        config: written to config.yaml as it was resolved, and shown by wandb.
        name: of the run.
        group: of runs, in wandb.
    """
    folder = config.out
    trial = os.environ.get(_TRIAL)
    checkpoints = Path(trial) / name if trial else folder / "checkpoints"
    refuse_several(name)
    if not Ranks().first:
        yield Session(folder, Nothing(), checkpoints)
        return
    record = folder / "record.jsonl"
    if not (config.resume or _TRIAL in os.environ or int(os.environ.get(_RESTARTS, "0"))):
        shutil.rmtree(checkpoints, ignore_errors=True)
        record.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    with tracking.start(folder, config, name=name, group=group, wandb=config.wandb) as tracker:
        if _RECORD in os.environ and isinstance(tracker, JSONL):
            tracker = Several(tracker, JSONL(os.environ[_RECORD]))
        yield Session(folder, tracker, checkpoints)


def options(config: type[ConfigT], description: str | None, args: Sequence[str] | None = None) -> ConfigT:
    """The configuration from the command line; ``--config FILE`` reads options from YAML, which the others override.

    Args:
        config: a dataclass, its fields being the options.
        description: for ``--help``.
        args: in place of the command line.
    """
    given = list(sys.argv[1:] if args is None else args)
    flags: list[str] = []
    rest: list[str] = []
    switches = {field.name for field in dataclasses.fields(config) if field.type in (bool, "bool")}
    lists = {field.name for field in dataclasses.fields(config) if "tuple[" in str(field.type)}
    words = iter(given)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, "")
            flags += _flags_of_file(Path(path), config, switches)
        else:
            rest += _listed(_switch(word, switches), lists)
    description = (
        f"{description or ''}\n\n--config FILE reads options from a YAML file; those of the command line go before."
    )
    parsed: ConfigT = tyro.cli(config, args=[*flags, *rest], description=description)
    trial = os.environ.get(_TRIAL)
    if trial and parsed.out == config().out:  # trials run side by side
        parsed = dataclasses.replace(parsed, out=Path(trial).parent / "results")
    return parsed


def as_yaml(config: Any) -> str:
    """A configuration as ``--config`` reads it."""
    plain = {name: _plain(value) for name, value in dataclasses.asdict(config).items()}
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _switch(word: str, switches: set[str]) -> str:
    """A boolean as a sweep writes it, ``--quick=True``, as a switch."""
    found = re.fullmatch(r"--([\w-]+)=(true|false)", word, re.IGNORECASE)
    if found is None or found[1].replace("-", "_") not in switches:
        return word
    return f"--{found[1]}" if found[2].lower() == "true" else f"--no-{found[1]}"


def _listed(word: str, lists: set[str]) -> list[str]:
    """A list as a sweep writes it, ``--learn=['lr', 'betas']``, as words."""
    name, equals, text = word.partition("=")
    if not (equals and text.startswith("[") and name.removeprefix("--").replace("-", "_") in lists):
        return [word]
    try:
        return [name, *map(str, ast.literal_eval(text))]
    except (SyntaxError, ValueError):
        sys.exit(f"{name} must be a list such as ['a', 'b'], got {text}")


def _flags_of_file(path: Path, config: type, switches: set[str]) -> list[str]:
    """The options in a YAML file.

    Raises:
        SystemExit: with a line that says what is wrong with it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        sys.exit(f"--config {path}: {reason}")
    if not isinstance(content, dict):
        sys.exit(f"--config {path}: must hold options as a mapping, got {type(content).__name__}")
    names = [field.name for field in dataclasses.fields(config)]
    flags: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            sys.exit(f"--config {path}: unknown option {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if name in switches:
            flags.append(_switch(f"--{name}={value}", switches))
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags
