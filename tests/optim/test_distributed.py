"""Parameters spread over two processes: fused steps on DTensors next to torch's class on whole tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from metaopt import optim
from tests.optim.problem import PAIRS, distance

RANKS, HALF = 2, 7
HOW = ("fully_shard", "distribute_tensor")
WHOLE = StateDictOptions(full_state_dict=True)


def network() -> nn.Module:
    """Whose first layers cannot be cut into halves of the same size: 5 and 1 rows."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def sharded(mesh: DeviceMesh, how: str) -> nn.Module:
    model = network()
    if how == "fully_shard":
        fully_shard(model[0], mesh=mesh)
        return fully_shard(model, mesh=mesh)
    for module in model.children():
        for name, p in list(module.named_parameters()):
            placement = Shard(0) if p.dim() == 2 else Replicate()
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, mesh: DeviceMesh | None, how: str) -> None:
    """With ``fully_shard`` ranks see the same data: the mean of their gradients is the gradient of a single process.

    With ``distribute_tensor`` each sees its half, and some gradients are sums that have not been made yet.
    """
    for step in range(start, start + HALF):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)
        if how == "distribute_tensor" and mesh is not None:
            x, y = (distribute_tensor(data, mesh, [Shard(0)]) for data in (x, y))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if how == "distribute_tensor" and mesh is not None:
            assert any(p.grad.placements != p.placements for p in model.parameters())
        optimizer.step()


def check(ours: Any, theirs: Any, mesh: DeviceMesh, how: str) -> None:
    """Training, interrupted by a checkpoint, against torch's unsharded run."""
    expected = network()
    right = theirs(expected.parameters(), lr=0.02)
    train(expected, right, 0, None, how)
    train(expected, right, HALF, None, how)

    model = sharded(mesh, how)
    optimizer = ours(model.parameters(), lr=0.02, fused=True)
    train(model, optimizer, 0, mesh, how)
    optimizer.zero_grad()  # else torch takes the optimizer that loads for a stateless one
    whole = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    again = ours(model.parameters(), lr=0.5, fused=True)
    if how == "fully_shard":  # by name, through whole tensors
        set_optimizer_state_dict(model, again, whole, options=WHOLE)
    else:
        again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.02
    train(model, again, HALF, mesh, how)

    rounding = 2e-6 if ours is optim.RAdam else 0.0
    assert set(again.state) == set(model.parameters())
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert isinstance(p, DTensor)
        # The gradients of a sharded run differ by their own rounding: they are summed in another order.
        assert distance(p.full_tensor(), q) < 1e-6 + rounding
        assert int(again.state[p]["step"]) == 2 * HALF
        assert list(again.state[p]) == list(right.state[q])
        for key in list(right.state[q])[1:]:  # after the step: in the same order on all ranks
            state = again.state[p][key]
            assert isinstance(state, DTensor)
            assert state.placements == p.placements
            assert distance(state.full_tensor(), right.state[q][key]) < 1e-5


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for ours, theirs in PAIRS:
        for how in HOW:
            check(ours, theirs, mesh, how)
            print(f"{ours.__name__} {how} agrees", flush=True)
    dist.barrier()
    os._exit(0)  # now and then gloo's own threads abort a process that ends as others do


@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="two processes over gloo")
def test_a_sharded_run_with_a_checkpoint_is_an_unsharded_one_of_torch(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    code = "import sys; from tests.optim.test_distributed import main; main(int(sys.argv[1]), sys.argv[2])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err
        assert out.splitlines() == [f"{ours.__name__} {how} agrees" for ours, _ in PAIRS for how in HOW]
