"""The parameters whose update is timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

Shape = tuple[int, ...]


@dataclasses.dataclass
class Workload:
    """Shapes of parameters and their dtype."""

    name: str
    shapes: list[Shape]
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def title(self) -> str:
        counted = "1 tensor" if len(self.shapes) == 1 else f"{len(self.shapes):,} tensors"
        return f"{self.name}: {counted}, {self.elements:,} elements, {str(self.dtype).removeprefix('torch.')}"


def gpt2() -> list[Shape]:
    """GPT-2 small, its output embedding tied to the input's."""
    width, blocks = 768, 12
    norm: list[Shape] = [(width,), (width,)]
    block: list[Shape] = [
        *norm,
        *((width, 3 * width), (3 * width,), (width, width), (width,)),
        *norm,
        *((width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    ]
    shapes = [(50257, width), (1024, width), *(block * blocks), *norm]
    assert sum(map(math.prod, shapes)) == 124_439_808
    return shapes


def resnet50() -> list[Shape]:
    """ResNet-50 for 1,000 classes."""
    shapes: list[Shape] = []

    def convolution(into: int, out: int, size: int) -> None:
        shapes.extend([(out, into, size, size), (out,), (out,)])  # with batch normalization

    convolution(3, 64, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(blocks):
            convolution(into, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if number == 0:
                convolution(into, 4 * width, 1)
            into = 4 * width
    shapes += [(1000, into), (1000,)]
    assert sum(map(math.prod, shapes)) == 25_557_032
    return shapes


def workloads(gpu: bool, quick: bool) -> dict[str, Workload]:
    """All workloads by their letter."""
    big = (10**8 if gpu else 2 * 10**7) // (20 if quick else 1)
    thousands = 500 if quick else 5000
    made: dict[str, Callable[[], Workload]] = {
        "b": lambda: Workload("one big tensor", [(big,)]),
        "a": lambda: Workload("many tensors", [(100_000,)] * (20 if quick else 200)),
        "c": lambda: Workload("thousands of small tensors", [(100,)] * thousands),
        "gpt2": lambda: Workload("GPT-2 small", _scaled(gpt2(), quick)),
        "resnet50": lambda: Workload("ResNet-50", _scaled(resnet50(), quick)),
    }
    if gpu:
        made["b-bf16"] = lambda: Workload("one big tensor", [(big,)], torch.bfloat16)
    order = ("b", "b-bf16", "gpt2", "resnet50", "a", "c")  # compiled in this order while there is time for it
    return {letter: made[letter]() for letter in order if letter in made}


def _scaled(shapes: list[Shape], quick: bool) -> list[Shape]:
    return [(math.ceil(shape[0] / 20), *shape[1:]) for shape in shapes] if quick else shapes
