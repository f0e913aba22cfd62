"""The command line: metaopt sweep run|resume|status|show FILE.yaml, metaopt info, metaopt list.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

if TYPE_CHECKING:
    from metaopt.sweeps import Sweep
    from metaopt.sweeps.storage import Timing

try:
    import tyro
    from tyro.conf import Positional, subcommand
except ImportError:
    print('metaopt: the command line needs tyro: pip install "metaopt[sweeps]"', file=sys.stderr)
    sys.exit(1)


URL = Annotated[str | None, tyro.conf.arg(metavar="URL")]


@dataclass(frozen=True)
class _Local:
    """What a sweep that runs here takes."""

    file: Positional[Path]
    """A sweep file in wandb's format."""
    workers: int = 1
    """Trials that run at a time, each in a process of its own."""
    storage: URL = None
    """Database: sqlite:///FILE, or postgresql://USER@HOST/DATABASE for many machines. Else in runs/sweeps."""
    heartbeat: int = 30
    """Seconds between two signs of life of a trial; after four missing ones another machine takes it up."""
    stop: float = 15.0
    """Seconds that a trial has to write a checkpoint when it is stopped."""
    patience: float = 60.0
    """Seconds that a locked or unreachable database is waited for."""

    def timing(self) -> Timing:
        from metaopt.sweeps.storage import Timing

        return Timing(self.heartbeat, self.stop, self.patience)


@dataclass(frozen=True)
class Resume(_Local):
    """Go on with a sweep that was stopped or killed, or join it from another machine."""

    retry_failed: bool = False
    """Run what has failed once more, with the same parameters."""

    def __call__(self) -> int:
        sweep = _named(self.file)
        from metaopt.sweeps import engine

        timing, again = self.timing(), self.retry_failed
        return engine.resume(sweep, self.storage, workers=self.workers, timing=timing, retry_failed=again)


@dataclass(frozen=True)
class Run(_Local):
    """Start a sweep, and run it until nothing is left."""

    engine: Literal["local", "wandb"] = "local"
    """Who draws the points: this program, or wandb's server, whose agents then run here."""

    def __call__(self) -> int:
        if self.engine == "wandb":
            from metaopt.sweeps import read
            from metaopt.sweeps.server import run

            return run(read(self.file), self.workers)
        sweep = _named(self.file)
        from metaopt.sweeps import engine

        return engine.run(sweep, self.storage, workers=self.workers, timing=self.timing())


@dataclass(frozen=True)
class Status:
    """How far a sweep is: trials by state, the best so far, what runs, what failed."""

    file: Positional[Path]
    """The sweep file."""
    storage: URL = None
    """The database that it was started with."""

    def __call__(self) -> int:
        sweep = _named(self.file)
        from metaopt.sweeps import report

        report.status(sweep, self.storage)
        return 0


@dataclass(frozen=True)
class Show:
    """What a sweep has found: the best trials, which parameters mattered, and a picture."""

    file: Positional[Path]
    """The sweep file."""
    storage: URL = None
    """The database that it was started with."""
    top: int = 10
    """How many trials."""

    def __call__(self) -> int:
        sweep = _named(self.file)
        from metaopt.sweeps import report

        report.show(sweep, self.storage, self.top)
        return 0


@dataclass(frozen=True)
class SweepCommand:
    """Search over hyperparameters, described by a sweep file in wandb's format."""

    action: (
        Annotated[Run, subcommand("run")]
        | Annotated[Resume, subcommand("resume")]
        | Annotated[Status, subcommand("status")]
        | Annotated[Show, subcommand("show")]
    )

    def __call__(self) -> int:
        return self.action()


@dataclass(frozen=True)
class Info:
    """Versions, devices, and which extras and compiled paths can be used here."""

    def __call__(self) -> int:
        from metaopt import info

        info.show()
        return 0


@dataclass(frozen=True)
class List:
    """The learned optimizers that come with metaopt, and the experiments of the current folder."""

    def __call__(self) -> int:
        from metaopt import info

        info.contents()
        return 0


Command = (
    Annotated[SweepCommand, subcommand("sweep")]
    | Annotated[Info, subcommand("info")]
    | Annotated[List, subcommand("list")]
)


def main(args: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code.

    Args:
        args: the words after ``metaopt``; None for those of the process.
    """
    command: Any = tyro.cli(
        Command,
        prog="metaopt",
        description="Hyperparameters learned by gradient descent through training.",
        args=args,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    try:
        code = command()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if not _expected(error):
            raise
        print(f"metaopt: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _expected(error: Exception) -> bool:
    """Whether an error is the user's or the machine's, and says so in one line."""
    if isinstance(error, OSError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return False
    return type(error).__module__.partition(".")[0] == "metaopt" or isinstance(error, ImportError)


def _named(file: Path) -> Sweep:
    from metaopt.sweeps import read

    sweep = read(file)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ImportError('sweeps need Optuna: pip install "metaopt[sweeps]"') from None
    from metaopt.sweeps import engine

    return engine.named(sweep, file)
