"""Launching the kernels: one table, one preparation and one update for all parameters of a dtype.

The host never waits for the device: hyperparameters that are tensors there are read by the kernels, the step counters
live there, and the table of addresses is uploaded only when an address has changed. A CUDA graph may therefore capture
a step. One warm-up step must have run before, as for anything that is captured: it leaves a page-locked buffer for the
table, should capturing give the gradients new addresses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from metaopt.kernels import layout
from metaopt.kernels.gpu import radam, rprop

BLOCK = 1024  # 8 elements of each tensor a thread: two 128-bit loads in float32, one in bfloat16
WARPS = 4
PREPARED = 128  # parameters that one program of the preparation takes

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.complex64: tl.float32,
    torch.complex128: tl.float64,
}


@dataclasses.dataclass
class Table:
    """The table of one launch on the device, kept as long as no address changes."""

    addresses: layout.Rows | None = None
    current: tuple[Tensor, Tensor] | None = None
    spare: Tensor | None = None  # page-locked, for one capture
    captured: list[Any] = dataclasses.field(default_factory=list)  # what graphs read whenever they are replayed

    def of(self, rows: layout.Rows, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows (``layout.tables``) and their owners on a device."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.current is None or self.addresses is None or not np.array_equal(rows, self.addresses):
            addresses = rows.copy()
            owners = layout.owners(rows, BLOCK)
            packed = torch.from_numpy(np.concatenate([rows.reshape(-1), owners]))
            if capturing:
                return self._captured(packed, rows, device)  # nothing is uploaded before the replay
            self.addresses = addresses
            self.current = _unpacked(packed.to(device) if device.type != "cuda" else self._upload(packed, device), rows)
        if capturing:
            self.captured.append(self.current)
        elif device.type == "cuda":  # it may have been uploaded on another stream
            self.current[0].record_stream(torch.cuda.current_stream(device))
        return self.current

    def _upload(self, packed: Tensor, device: torch.device) -> Tensor:
        if self.spare is None or len(self.spare) != len(packed):
            self.spare = torch.empty_like(packed, pin_memory=True)
        return packed.pin_memory().to(device, non_blocking=True)

    def _captured(self, packed: Tensor, rows: layout.Rows, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.spare is None or len(self.spare) != len(packed):
            raise RuntimeError(
                "the parameters or gradients of a captured step lie at new addresses, and no buffer is ready to upload "
                "them: run one step of this optimizer outside the graph before each capture"
            )
        staged, self.spare = self.spare.copy_(packed), None
        uploaded = staged.to(device, non_blocking=True)
        self.captured.append((staged, uploaded))
        self.current = None  # the next step outside a graph makes a new spare
        return _unpacked(uploaded, rows)


def _unpacked(packed: Tensor, rows: layout.Rows) -> tuple[Tensor, Tensor]:
    return packed[: rows.size].view(rows.shape), packed[rows.size :]


Cache = dict[Any, Table]


def step(
    algorithm: str,
    kind: layout.Kind,
    table: layout.Rows,
    values: tuple[Any, ...],
    flags: dict[str, bool],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    cache: Cache,
) -> None:
    """Update the parameters of a table in place.

    Args:
        algorithm: ``"radam"`` with values (lr, beta1, beta2, eps, weight_decay) and flags maximize and decoupled, or
            ``"rprop"`` with values (eta_minus, eta_plus, smallest, largest) and flag maximize.
        kind: device and dtypes.
        table: of addresses (``layout.tables``).
        values: numbers, or 0-d tensors on the device.
        flags: switches of the algorithm.
        grad_scale: what gradients are divided by, and the quotient stored.
        found_inf: where it is not 0, nothing changes.
        cache: keeps what lies on the device between steps.
    """
    whole = (table[:, :4] % 16 == 0).all(axis=1)
    with torch.cuda.device(kind[0].index if kind[0].type == "cuda" else -1):  # -1: none
        for aligned, part in ((True, table[whole]), (False, table[~whole])):
            if len(part):
                rows, owners = cache.setdefault((kind, aligned), Table()).of(part, kind[0])
                _launch(algorithm, kind, aligned, rows, owners, values, flags, grad_scale, found_inf)


def _launch(
    algorithm: str,
    kind: layout.Kind,
    aligned: bool,
    rows: Tensor,
    owners: Tensor,
    values: tuple[Any, ...],
    flags: dict[str, bool],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    kinds = [TYPES[dtype] for dtype in kind[1:]]
    param, grad, state = kinds
    count = len(rows)
    if rows.device.type != "cuda":  # the interpreter would round numbers to float32
        values = tuple(torch.as_tensor(value, dtype=torch.float64) for value in values)
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    pointers = [value if isinstance(value, Tensor) else None for value in values]
    types = {
        "PARAM_TYPE": param,
        "GRAD_TYPE": grad,
        "STATE_TYPE": state,
        "COMPUTE_TYPE": tl.float64 if param == tl.float64 else tl.float32,
        "VECTOR": 16 // max(dtype.primitive_bitwidth // 8 for dtype in kinds) if aligned else 1,
        **{name.upper(): flag for name, flag in flags.items()},
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }
    preparations = (triton.cdiv(count, PREPARED),)
    blocks = (len(owners),)
    if algorithm == "radam":
        coefficients = torch.empty(count, 4, dtype=torch.float64, device=rows.device)
        radam.prepare[preparations](
            rows, coefficients, count, *numbers[1:3], *pointers[1:3], found_inf, BLOCK=PREPARED, num_warps=WARPS
        )
        if len(owners):
            radam.update[blocks](rows, owners, coefficients, *numbers, *pointers, found_inf, grad_scale, **types)
    else:
        rprop.prepare[preparations](rows, count, found_inf, BLOCK=PREPARED, num_warps=WARPS)
        if len(owners):
            rprop.update[blocks](rows, owners, *numbers, *pointers, found_inf, grad_scale, **types)
