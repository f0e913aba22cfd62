"""No tracking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaopt.tracking.tracker import Run


class Nothing(Run):
    """Forgets everything."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        pass

    def curves(self, name: str, columns: Mapping[str, Sequence[float]], step: int) -> None:
        pass

    def artifact(self, name: str, content: Mapping[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def scope(self, **fields: str) -> Run:
        return self

    def finish(self, failed: bool = False) -> None:
        pass
