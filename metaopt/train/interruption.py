"""Stopping at a good moment: a signal is noted, and acted on when the work in hand is done."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Notes SIGTERM, SIGHUP and Ctrl-C while its block runs, unless they are ignored. A second one stops at once.

    Outside the main thread, where signals cannot be caught, it notes nothing.

    Args:
        shown: whether to say so on stderr.

    Attributes:
        requested: the signal that has come, if any.

    Example:
        >>> import os
        >>> with Interruption() as interruption:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     print(interruption.requested.name)
        SIGTERM
    """

    def __init__(
        self, message: str = "stopping after this meta-step; once more to stop at once", *, shown: bool = True
    ) -> None:
        self.requested: signal.Signals | None = None
        self._message, self._shown = message, shown
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _NOTED:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in the background of a script
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise Stopped(signal.Signals(number))
        self.requested = signal.Signals(number)
        if self._shown:
            print(f"\n{self.requested.name}: {self._message}", file=sys.stderr, flush=True)


class Stopped(SystemExit):
    """A signal ends the process: with the exit status that a shell gives for it, 128 and its number."""

    def __init__(self, requested: signal.Signals) -> None:
        super().__init__(128 + requested.value)
