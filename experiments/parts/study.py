"""What a reproduction of a published study reports: its figure beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.parts.processes import processes, refuse_several
from experiments.parts.session import Session, Tracked, options, session
from metaopt.metagrad import Ranks


@dataclass(frozen=True)
class Finding:
    """One quantity of a study.

    Attributes:
        quantity: what was measured, and on what.
        published: the study's figure or claim.
        measured: ours.
        holds: whether ours is what the study leads one to expect; None where the two cannot be compared.
    """

    quantity: str
    published: str
    measured: str
    holds: bool | None = None


@dataclass(frozen=True)
class Study:
    """A published result, and the function that reproduces it.

    Attributes:
        name: of its module in ``experiments``, and of its folder in ``runs/papers``.
        title: for the table.
        source: authors, venue, year.
        run: takes a configuration and a session; prints nothing, saves its figure and returns what it found.
        config: makes the default configuration; the fields of its dataclass are the command line's options.
        shared: whether all that it learns is learned on several runs, which processes of torchrun can share.
    """

    name: str
    title: str
    source: str
    run: Callable[[Any, Session], list[Finding]]
    config: type[Tracked]
    shared: bool = False

    def findings(self, config: Tracked) -> list[Finding]:
        """Run it in a session of its own."""
        with session(config, self.name, group="papers") as run:
            found = self.run(config, run)
            run.tracker.artifact("findings", {"findings": [asdict(finding) for finding in found]})
        return found

    def command_line(self) -> None:
        """Run it with options from the command line, and print the table."""
        config = options(self.config, f"{self.title} ({self.source})")
        if not self.shared:
            refuse_several(self.name)
        with processes():
            Console().print(findings_table({self: self.findings(config)}))


def findings_table(found: dict[Study, list[Finding]]) -> Table:
    """Published beside measured."""
    table = Table("study", "quantity", "published", "measured", "holds", title_justify="left", show_lines=False)
    for study, findings in found.items():
        for index, finding in enumerate(findings):
            head = f"{study.title}\n[dim]{study.source}[/dim]" if index == 0 else ""
            table.add_row(head, finding.quantity, finding.published, finding.measured, _mark(finding.holds))
        table.add_section()
    return table


def findings_markdown(found: dict[Study, list[Finding]]) -> str:
    """The same for a README."""
    lines = ["| study | quantity | published | measured | holds |", "| --- | --- | --- | --- | --- |"]
    for study, findings in found.items():
        for index, finding in enumerate(findings):
            head = f"{study.title} ({study.source})" if index == 0 else ""
            cells = (head, finding.quantity, finding.published, finding.measured, _mark(finding.holds))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mark(holds: bool | None) -> str:
    return "-" if holds is None else "yes" if holds else "no"


def save_figure(path: Path, draw: Callable[[Figure], Iterable[object] | None], size: tuple[float, float]) -> None:
    """Draw a figure in the style of all studies, and save it; of several processes the first does."""
    if not Ranks().first:
        return
    with rc_context({"font.size": 9, "axes.titlesize": "medium", "legend.fontsize": "small", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
