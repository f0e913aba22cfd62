"""Running the compiled passes over the tensors of many parameters, on as many threads as torch uses."""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaopt.kernels import layout
from metaopt.kernels.cpu import radam, rprop

BLOCK = 1 << 14  # elements: the least that is worth a thread's while
TYPES = {
    torch.float32: np.float32,
    torch.complex64: np.float32,
    torch.float64: np.float64,
    torch.complex128: np.float64,
}


def step(
    algorithm: str,
    kind: layout.Kind,
    table: layout.Rows,
    values: tuple[Any, ...],
    flags: dict[str, bool],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    cache: dict[Any, Any],
) -> None:
    """Update the parameters of a table in place: the arguments are those of ``gpu.launch.step``, on the CPU."""
    if found_inf is not None and found_inf.item() != 0:
        return
    numbers = [float(value) for value in values]
    precision = TYPES[kind[1]]
    scale = precision(0.0 if grad_scale is None else grad_scale.item())
    owners = layout.owners(table, BLOCK)
    if algorithm == "radam":
        lr, beta1, beta2, _, weight_decay = numbers
        coefficients = np.zeros((len(table), 3))
        radam.prepare(table, coefficients, beta1, beta2)
        scalars = np.array([*numbers, 1 - beta1, 1 - beta2, 1 - lr * weight_decay], dtype=precision)
        arguments = (coefficients.astype(precision), scalars, scale, flags["maximize"], flags["decoupled"])
        _parallel(partial(radam.update, table, owners, *arguments), len(owners))
    else:
        rprop.prepare(table)
        scalars = np.array(numbers, dtype=precision)
        _parallel(partial(rprop.update, table, owners, scalars, scale, flags["maximize"]), len(owners))


def _parallel(work: Any, blocks: int) -> None:
    """``work(begin, end, BLOCK)`` over all blocks, cut into one stretch a thread."""
    threads = max(1, min(torch.get_num_threads(), blocks))
    if threads == 1:
        work(0, blocks, BLOCK)
        return
    cuts = [math.ceil(blocks * i / threads) for i in range(threads + 1)]
    futures = [_pool(threads).submit(work, begin, end, BLOCK) for begin, end in itertools.pairwise(cuts)]
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="metaopt")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads
