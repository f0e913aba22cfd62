"""Tables on the terminal, by rich where it is installed, and figures in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table: the first column to the left, the others to the right."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _plain(title, columns, rows)
    else:
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console = Console()
        Console(width=max(console.width, 110), highlight=False).print(table)
    for note in notes:
        print(f"  {note}")
    print(flush=True)


def _plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[number]) for row in (columns, *rows)) for number in range(len(columns))]
    print(f"{title}\n")
    for row in (columns, ["-" * width for width in widths], *rows):
        cells = [
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells))
    print()


def seconds(value: float) -> str:
    """A time with its unit."""
    unit, scale = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"


def save(path: str | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, if a path is given."""
    if path is None:
        print("Figures are written to a file with --json FILE.")
        return
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"Figures: {file}")
