"""A compiled pass on as many threads as torch uses."""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

BLOCK = 1 << 14  # elements: the least that is worth a thread's while


def parallel(work: Any, blocks: int, block: int = BLOCK) -> list[Any]:
    """``work(begin, end, block)`` over all blocks, cut into one stretch a thread: what each of them returns."""
    threads = max(1, min(torch.get_num_threads(), blocks))
    if threads == 1:
        return [work(0, blocks, block)]
    cuts = [math.ceil(blocks * i / threads) for i in range(threads + 1)]
    futures = [_pool(threads).submit(work, begin, end, block) for begin, end in itertools.pairwise(cuts)]
    return [future.result() for future in futures]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="metaopt")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads
