"""Counting the memory of tensors."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Follows the memory of the tensors that operations make while this mode is active.

    Example:
        >>> with Made() as made:
        ...     x = torch.ones(1000)
        ...     y = (x * 2) + 1
        >>> made.alive()  # x and y; the product is gone
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of those that are still there."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def peak(call: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once, of those that a call allocates on the CPU or on the current GPU.

    What torch's allocators report: whatever is saved for a backward pass, temporaries within an operation, buffers of
    compiled code; nothing of Python's objects and of the graph's nodes.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        on_cpu = _peak_on_cpu(call)
        return max(on_cpu, torch.cuda.max_memory_allocated() - before)
    return _peak_on_cpu(call)


def _peak_on_cpu(call: Callable[[], object]) -> int:
    from torch._C._profiler import RecordScope, _ExperimentalConfig

    profiler: Any = torch.autograd  # its own interface knows no profile of memory alone
    cpu = {profiler.ProfilerActivity.CPU}
    kind = profiler.ProfilerState.KINETO
    config = profiler.ProfilerConfig(kind, False, True, False, False, False, _ExperimentalConfig())
    with _silent():
        profiler._prepare_profiler(config, cpu)
        profiler._enable_profiler(config, cpu, {RecordScope.LITE_INTERPRETER})  # a scope that no operation has
        try:
            call()
        finally:
            events = profiler._disable_profiler().events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    return most


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler writes lines of its own to stderr."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def resident() -> int:
    """Bytes of this process in memory, whatever they are for; the most there have been, where only that is known."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
