"""Runs that wandb has stored, and the environment of a user who has told it nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment(home: Path | str, **variables: str) -> dict[str, str]:
    """Without a key, and without a word of the user's about wandb."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "XDG_", "NETRC"))}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **variables}


class Stored:
    """A run read back by ``wandb leet inspect``."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.records = [json.loads(line) for line in self._inspect().splitlines()]

    def summary(self) -> Any:
        return json.loads(self._inspect("--summary"))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of its history, without wandb's own columns."""
        items = [record["item"] for record in self.of("history")]
        return [{name: value for name, value in item.items() if name[0] != "_"} for item in items]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    def table(self, name: str) -> Any:
        """The last table of this name, from its file."""
        path = next(row[f"{name}.path"] for row in reversed(self.rows) if f"{name}.path" in row)
        return json.loads((self.folder / "files" / path).read_text())

    def artifact(self, name: str) -> dict[str, Any]:
        """The files of an artifact, read."""
        (artifact,) = (artifact for artifact in self.of("artifact") if artifact["name"] == name)
        assert artifact["type"] == "json"
        contents = artifact["manifest"]["contents"]
        return {entry["path"]: json.loads(Path(entry["local_path"]).read_text()) for entry in contents}

    def _inspect(self, *options: str) -> str:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
