"""What the figures were taken on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch


def describe(device: torch.device) -> dict[str, str]:
    """Processor and versions."""
    made = {"cpu": f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        made["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    made["python"] = platform.python_version()
    return {**made, **{name: version(name) for name in ("torch", "triton", "numba")}}


def version(package: str) -> str:
    """An installed package's version."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile has no compiler for a device, or None if it has."""
    if device.type == "cuda":
        return "triton is not installed" if version("triton") == "not installed" else None
    found = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and shutil.which(name)]
    return None if found else "there is no C++ compiler"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
