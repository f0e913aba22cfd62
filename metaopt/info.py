"""What there is: versions, devices and compiled paths; learned optimizers and experiments."""

from __future__ import annotations

import ast
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# distribution -> the extra that brings it, or "" if metaopt does not work without it
_PACKAGES = {
    "torch": "",
    "numpy": "",
    "safetensors": "",
    "rich": "",
    "numba": "fused",
    "triton": "",
    "scikit-learn": "data",
    "matplotlib": "plots",
    "tyro": "experiments",
    "wandb": "wandb",
    "optuna": "sweeps",
    "pyyaml": "sweeps",
    "psycopg": "sweeps",
    "higher": "higher",
    "torchopt": "peers",
}


def show(console: Console | None = None) -> None:
    """Print versions, devices and what can be used of the compiled paths."""
    console = console or Console()
    from metaopt import __version__

    rows = [("metaopt", __version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    rows += [(name, _version(name, extra)) for name, extra in _PACKAGES.items()]
    console.print(_table("versions", rows))
    console.print(_table("devices", _devices()))
    console.print(_table("compiled paths", _paths()))


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _version(name: str, extra: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f'not installed: pip install "metaopt[{extra}]"' if extra else "not installed"


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        rows.append((f"cuda:{index}", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"))
    if len(rows) == 1:
        built = torch.version.cuda
        rows.append(("cuda", f"none found (torch was built for CUDA {built})" if built else "none: torch without CUDA"))
    return rows


def _paths() -> list[tuple[str, str]]:
    """Name, and "yes" or why not."""
    import torch

    from metaopt.kernels import refusal

    cpu = refusal(torch.zeros(1))
    gpu = refusal(torch.zeros(1, device="cuda")) if torch.cuda.is_available() else "there is no CUDA device"
    return [
        ("fused updates and steps, cpu (numba)", _answer(cpu)),
        ("fused updates and steps, cuda (triton)", _answer(gpu)),
        ("compile=True", _answer(_no_compiler())),
    ]


def _answer(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"


def _no_compiler() -> str | None:
    """Why torch.compile cannot work here, or None. On a CPU it needs a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        compiler = "g++"
    return None if shutil.which(compiler) else "no C++ compiler was found: install g++, or name one in CXX"


def contents(console: Console | None = None) -> None:
    """Print the learned optimizers and the experiments."""
    console = console or Console()
    from metaopt import learned

    console.print(_table("learned optimizers: metaopt.learned.load(NAME)", list(learned.available().items())))
    found = experiments(Path.cwd())
    if found:
        console.print(_table("experiments: python -m experiments.NAME", list(found.items())))
    else:
        console.print(
            "experiments: none here; they are in metaopt's repository, in the folder experiments", markup=False
        )


def experiments(folder: Path) -> dict[str, str]:
    """The modules of a folder's ``experiments`` package, and the first lines of their docstrings; none is run."""
    found = {}
    for path in sorted((folder / "experiments").glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.partition("\n")[0]
    return found
