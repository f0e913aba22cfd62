"""Where a fused update can run, and why not elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

_PARTS = {  # a complex number is two real ones
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_ON = {
    "cuda": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cpu": (torch.float32, torch.float64),
}


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(param: Tensor, state_dtype: torch.dtype | None = None) -> str | None:
    """Why no fused update can run on a parameter, or None if it can.

    Args:
        param: the parameter, or the part of it that lies on this process.
        state_dtype: of its state, if that is another than the parameter's.

    Example:
        >>> refusal(torch.zeros(2, dtype=torch.int32))
        'its dtype is torch.int32, and fused updates on cpu are for float32, float64, complex64 and complex128'
        >>> refusal(torch.zeros(2, device="meta"))
        'it lies on meta, and fused updates run on cuda and cpu'
    """
    device = param.device.type
    if device not in _ON:
        return f"it lies on {device}, and fused updates run on cuda and cpu"
    if not native(param):
        return f"it is a {type(param).__name__}, and fused updates are for plain tensors and DTensors"
    on_gpu = device == "cuda" or interpreted()
    allowed = _ON["cuda" if on_gpu else "cpu"]
    if _PARTS.get(param.dtype, param.dtype) not in allowed:
        names = [_name(dtype) for dtype in (*allowed, *_PARTS)]
        return (
            f"its dtype is {param.dtype}, and fused updates on {device} are for {', '.join(names[:-1])} and {names[-1]}"
        )
    if state_dtype not in (None, param.dtype) and not (on_gpu and state_dtype in allowed and not param.is_complex()):
        return f"its dtype is {param.dtype}, and fused updates on {device} keep no {_name(state_dtype)} state for it"
    module = "triton" if on_gpu else "numba"
    return None if _installed(module) else f"{module} is not installed: {_REMEDIES[module]}"


_PLAIN = (Tensor, torch.nn.Parameter)
_REMEDIES = {
    "triton": "it comes with torch's CUDA builds, or by pip install triton",
    "numba": 'pip install "metaopt[fused]"',
}


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def native(tensor: Tensor) -> bool:
    """Whether a tensor is one whose memory is its value: no subclass but Parameter and DTensor."""
    return type(tensor) in _PLAIN or is_distributed(tensor)


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing torch.distributed for the question."""
    kind = type(tensor)
    return kind not in _PLAIN and kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")
