"""Processes that can be found again after a crash, and children that do not outlive their parent.

A mark is what has to be written down about a process to know later, on the same machine, whether it still runs: its
number alone may have gone to another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mark = dict[str, Any]

_PR_SET_PDEATHSIG = 1


@functools.cache
def machine() -> str:
    """This machine since it was started, or this container on it: where a process number means something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def mark(pid: int) -> Mark:
    """What to write down about a running process.

    Example:
        >>> alive(mark(os.getpid()))
        True
    """
    return {"machine": machine(), "pid": pid, "born": _born(pid)}


def alive(marked: Mark) -> bool | None:
    """Whether a process still runs; None if that cannot be told, as it is one of another machine."""
    if marked.get("machine") != machine():
        return None
    try:
        os.kill(marked["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_born(marked["pid"]) == marked["born"])


def _born(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; -1 for one that is over but not collected yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] == "Z" else int(fields[19])


def die_with_parent(sent: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux alone)."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, int(sent), 0, 0, 0)


# Looked up here, as little should happen between fork and exec.
_prctl: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def bound() -> Callable[[], None]:
    """What a child has to do before its program, so that the kernel kills it when this process dies."""
    parent = os.getpid()

    def bind() -> None:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return bind


def start(argv: list[str], env: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """A child in a process group of its own, which the kernel kills if this process dies; its output goes to a file.

    Raises:
        OSError: the program cannot be started.
    """
    with output.open("ab") as log:
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=bound(),
        )


def stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """End a child and what it has started: SIGTERM, so that it can write a checkpoint, and SIGKILL after a grace."""
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def kill(marked: Mark) -> None:
    """Kill the group that a marked process leads, if it is still there."""
    if not alive(marked):
        return
    _signal_group(marked["pid"], signal.SIGKILL)
    while alive(marked):
        time.sleep(0.01)


def _signal_group(group: int, sent: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sent)
