"""Published results reproduced: python -m experiments [NAME ...] runs the studies and prints one table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments.parts.session import Tracked, options
from experiments.parts.study import Finding, Study, findings_markdown, findings_table

STUDIES = (
    "mnist1d_lr",
    "influence_balancing",
    "pes_toy",
    "rprop_encoder",
    "maml",
    "hyper_cleaning",
    "hypergradient_descent",
    "lr_schedules",
    "learned_quadratics",
)


@dataclass(frozen=True)
class Config(Tracked):
    """Reproduce published results, and print what was published beside what was measured."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = STUDIES
    """Which studies."""
    quick: bool = False
    """A few seconds each: whether they run, not what they find."""
    out: Path = Path("runs/papers")
    """Folder for table.md, and one folder for each study."""

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in STUDIES:
                raise ValueError(f"names must be among {', '.join(STUDIES)}, got {name!r}")


def main(config: Config) -> dict[Study, list[Finding]]:
    """Run the studies."""
    console = Console()
    found: dict[Study, list[Finding]] = {}
    for name in config.names:
        study: Study = importlib.import_module(f"experiments.{name}").STUDY
        started = perf_counter()
        own: Any = {"quick": config.quick}
        found[study] = study.findings(
            replace(study.config(), out=config.out / name, resume=config.resume, wandb=config.wandb, **own)
        )
        console.print(f"{study.title}: {perf_counter() - started:.0f} s")
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "table.md").write_text(findings_markdown(found), encoding="utf-8")
    console.print(findings_table(found))
    return found


if __name__ == "__main__":
    main(options(Config, __doc__))
