"""Many processes: torchrun starts them, and this joins them.

torchrun --standalone --nproc-per-node 4 -m experiments.learned_quadratics

`metaopt.meta_train` shares the runs among them. All the rest every process does for itself, and the first alone tracks,
prints and saves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from metaopt.metagrad import Ranks


@contextmanager
def processes() -> Iterator[Ranks]:
    """Those that torchrun has started, joined for the block; without torchrun this one alone."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # Restarted processes meet in the store of those before them, where torch 2.13 takes old addresses for theirs.
    store, rank, count = next(rendezvous("env://"))
    prefix = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    ranks = Ranks()
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if ranks.first else nowhere):
        yield ranks
    dist.barrier()  # a process that leaves while others still talk to it may abort them
    dist.destroy_process_group()  # not after an error: others may be waiting in the group, and torchrun ends them


def refuse_several(name: str) -> None:
    """End a program that torchrun has started more than once, and that would do all of its work as often."""
    count = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if count > 1 and not dist.is_initialized():
        sys.exit(f"{name} has nothing that {count} processes could share: start it without torchrun")
