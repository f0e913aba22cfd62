"""What the compiler makes of the kernels for a Hopper GPU, which needs none."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from metaopt.kernels.support import interpreted

pytest.importorskip("triton", reason="triton's wheels are for Linux")
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metaopt.functional import moments_step as moments_maths
from metaopt.functional import rprop_step as rprop_maths
from metaopt.kernels.gpu import differentiable, launch, moments_step, radam, rprop, rprop_step

pytestmark = pytest.mark.skipif(interpreted(), reason="nothing is compiled with TRITON_INTERPRET=1")

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


class Compiled(NamedTuple):
    """Machine code and what it occupies."""

    registers: int
    spilled: int
    shared: int
    loads: list[str]
    stores: list[str]
    text: str


def compiled(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], folder: Path) -> Compiled:
    """A kernel for types of arguments, tuples among them, and for the values of all others."""
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    flat: dict[tuple[int, ...], str] = {}
    for i, kind in enumerate(signature.values()):
        flat |= {(i, j): one for j, one in enumerate(kind)} if isinstance(kind, tuple) else {(i,): kind}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={path: constants.get(names[path[0]]) for path, kind in flat.items() if kind == "constexpr"},
        attrs={path: [["tt.divisibility", 16]] for path, kind in flat.items() if kind.startswith("*")},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.WARPS})
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", binary)
    text = tool("nvdisasm", "-c", binary)
    numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL", "SHARED")}  # type: ignore[index]
    return Compiled(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        numbers["SHARED"],
        re.findall(r"LDG\S*", text),
        re.findall(r"STG\S*", text),
        text,
    )


def tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


NUMBERS = {
    radam.update: ["lr", "beta1", "beta2", "eps", "weight_decay"],
    rprop.update: ["eta_minus", "eta_plus", "smallest", "largest"],
}
UPDATES = pytest.mark.parametrize("kernel", NUMBERS, ids=["radam", "rprop"])


def update(kernel: Any, folder: Path, param: Any, state: Any, vector: int, **tensors: str) -> Compiled:
    """An update kernel with numbers for hyperparameters, without switches but those that are given."""
    arguments = {"rows": "*i64", "owners": "*i64", **dict.fromkeys(NUMBERS[kernel], "fp64"), **tensors}
    if kernel is radam.update:
        arguments["coefficients"] = "*fp64"
    constants = {
        "PARAM_TYPE": param,
        "GRAD_TYPE": param,
        "STATE_TYPE": state,
        "COMPUTE_TYPE": tl.float64 if param == tl.float64 else tl.float32,
        "VECTOR": vector,
        "MAXIMIZE": False,
        "DECOUPLED": False,
        "BLOCK": launch.BLOCK,
    }
    return compiled(kernel, arguments, constants, folder)


@UPDATES
@pytest.mark.parametrize(
    ("param", "state", "vector", "wide"),
    [
        (tl.float32, tl.float32, 4, 14),  # 8 elements of each of 4 tensors loaded, of 3 stored: 2 instructions each
        (tl.bfloat16, tl.bfloat16, 8, 7),  # 1 each
        (tl.float16, tl.float16, 8, 7),
        (tl.bfloat16, tl.float32, 4, 8),  # the states' two; the parameter and gradient move 64 bits at once
    ],
    ids=str,
)
def test_whole_blocks_move_128_bits_at_once_without_spills(
    kernel: Any, param: Any, state: Any, vector: int, wide: int, tmp_path: Path
) -> None:
    made = update(kernel, tmp_path, param, state, vector)
    assert sum(".128" in name for name in made.loads + made.stores) == wide
    assert made.spilled == 0
    assert made.shared == 0
    assert made.registers <= 72


@UPDATES
def test_without_alignment_nothing_wide_is_loaded(kernel: Any, tmp_path: Path) -> None:
    """A 128-bit load from an address that is no multiple of 16 would be an error on the device."""
    made = update(kernel, tmp_path, tl.float32, tl.float32, 1)
    assert not any(".128" in name or ".64" in name for name in made.stores)
    assert made.spilled == 0
    assert made.registers <= 72


@UPDATES
def test_double_precision_does_not_spill(kernel: Any, tmp_path: Path) -> None:
    made = update(kernel, tmp_path, tl.float64, tl.float64, 2)
    assert sum(".128" in name for name in made.loads + made.stores) == 28
    assert made.spilled == 0


@UPDATES
def test_with_a_gradient_scaler_and_hyperparameters_on_the_device(kernel: Any, tmp_path: Path) -> None:
    """The kernel that GradScaler and tensor hyperparameters take is as wide, and stores the gradient too."""
    tensors = {"found_inf": "*fp32", "grad_scale": "*fp32"}
    tensors |= {f"{name}_pointer": "*fp32" for name in NUMBERS[kernel]}
    made = update(kernel, tmp_path, tl.float32, tl.float32, 4, **tensors)
    assert sum(".128" in name for name in made.stores) == 8
    assert sum(".128" in name for name in made.loads) == 8
    assert made.spilled == 0


@pytest.mark.parametrize("kernel", [radam.prepare, rprop.prepare], ids=["radam", "rprop"])
def test_the_preparation_computes_in_double_precision(kernel: Any, tmp_path: Path) -> None:
    arguments = {"rows": "*i64", "count": "i32"}
    if kernel is radam.prepare:
        arguments |= {"coefficients": "*fp64", "beta1": "fp64", "beta2": "fp64"}
    made = compiled(kernel, arguments, {"BLOCK": launch.PREPARED}, tmp_path)
    assert made.spilled == 0
    assert ("DFMA" in made.text) == (kernel is radam.prepare)


@pytest.mark.parametrize("kernel", [*NUMBERS, radam.prepare], ids=["radam", "rprop", "preparation"])
def test_numbers_reach_the_kernels_in_double_precision(kernel: Any) -> None:
    """Triton makes a Python float a float32 unless told otherwise, and 1 - beta2 would lose four digits."""
    wanted = NUMBERS.get(kernel, ["beta1", "beta2"])
    assert [p.name for p in kernel.params if p.annotation_type == "fp64"] == wanted


STEPS: dict[str, tuple[Any, Any]] = {
    "radam": (moments_step, moments_maths),
    "adamw": (moments_step, moments_maths),
    "rprop": (rprop_step, rprop_maths),
}
LEFT_OUT: dict[str, set[str]] = {
    "radam": {"root_correction", "weight_decay", "shrink", "maximize"},
    "adamw": {"weight_decay", "rectified", "maximize"},
    "rprop": set(),
}


def differentiable_step(
    name: str, folder: Path, dtype: str, *, back: bool, wanted: set[str] | None = None, each: bool = False
) -> Compiled:
    """A kernel of a differentiable step; backward with the gradients of the fields in ``wanted``, or of all."""
    module, maths = STEPS[name]
    fields = maths.Inputs._fields
    kinds = {field: "*u1" if field == "rectified" else f"*{dtype}" for field in fields}
    kinds |= dict.fromkeys(LEFT_OUT[name], "constexpr")
    wanted = set(fields) if wanted is None else wanted
    to = {field: kind if field in wanted - {"rectified"} else "constexpr" for field, kind in kinds.items()}
    three = (f"*{dtype}",) * 3
    arguments: dict[str, Any] = {"i": maths.Inputs(**kinds), "count": "i32"}
    arguments |= {"cotangents": three, "to": maths.Inputs(**to)} if back else {"new": three}
    constants = {"MAXIMIZE": False, "EACH": each, "BLOCK": differentiable.BLOCK}
    return compiled(module.backward if back else module.forward, arguments, constants, folder)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("name", "back", "wide", "registers"),
    [
        ("radam", False, 7, 40),  # 4 tensors loaded, 3 stored, 16 bytes of each in a thread
        ("adamw", False, 7, 40),
        ("rprop", False, 7, 40),
        ("radam", True, 10, 88),  # without decay the parameter is not read
        ("adamw", True, 11, 88),
        ("rprop", True, 9, 64),
    ],
)
def test_a_differentiable_step_moves_128_bits_at_once_without_spills(
    name: str, back: bool, wide: int, registers: int, dtype: str, tmp_path: Path
) -> None:
    made = differentiable_step(name, tmp_path, dtype, back=back)
    double = 2 if dtype == "fp64" else 1
    assert sum(".128" in op for op in made.loads + made.stores) == double * wide
    assert made.spilled == 0
    assert made.registers <= double * registers


@pytest.mark.parametrize("name", STEPS)
def test_a_derivative_in_the_tensors_alone_sums_nothing(name: str, tmp_path: Path) -> None:
    tensors = set(STEPS[name][1].Inputs._fields[:4])
    made = differentiable_step(name, tmp_path, "fp32", back=True, wanted=tensors)
    assert made.shared == 0
    assert "BAR" not in made.text
    assert "SHFL" not in made.text


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("back", [False, True])
def test_coefficients_of_each_element_are_read_as_widely(name: str, back: bool, tmp_path: Path) -> None:
    made = differentiable_step(name, tmp_path, "fp32", back=back, each=True)
    plain = differentiable_step(name, tmp_path, "fp32", back=back)
    count = len(set(STEPS[name][1].Inputs._fields[4:]) - LEFT_OUT[name] - {"rectified"})
    assert sum(".128" in op for op in made.loads) == sum(".128" in op for op in plain.loads) + count
    assert made.spilled == 0
