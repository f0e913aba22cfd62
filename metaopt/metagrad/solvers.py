"""Linear systems given by matrix-vector products: what implicit differentiation solves.

Vectors are lists of tensors. Both solvers stop at a relative residual, or after so many products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Vector = list[Tensor]
Product = Callable[[Vector], Vector]


class Solution(NamedTuple):
    """An approximate solution.

    Attributes:
        x: itself.
        residual: ``|b - A x| / |b|``.
        iterations: how many products it took.
        positive: whether every direction that was tried had positive curvature.
    """

    x: Vector
    residual: float
    iterations: int
    positive: bool


def conjugate_gradient(
    product: Product, b: Vector, tolerance: float, max_iterations: int, x: Vector | None = None
) -> Solution:
    """Solve ``A x = b`` for a symmetric positive definite A; stops where it meets a direction of other curvature.

    References:
        Hestenes & Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952.

    Example:
        >>> diagonal = torch.tensor([1.0, 4.0])
        >>> solution = conjugate_gradient(lambda v: [diagonal * v[0]], [torch.ones(2)], 1e-6, 10)
        >>> solution.x, solution.iterations
        ([tensor([1.0000, 0.2500])], 2)
    """
    scale = norm(b)
    x, residual = _start(product, b, x)
    direction, square = residual, dot(residual, residual)
    for iteration in range(max_iterations):
        if math.sqrt(square) <= tolerance * scale:
            return Solution(x, _relative(math.sqrt(square), scale), iteration, True)
        image = product(direction)
        curvature = dot(direction, image)
        if not curvature > 0:
            return Solution(x, _relative(math.sqrt(square), scale), iteration + 1, False)
        length = square / curvature
        x = added(x, length, direction)
        residual = added(residual, -length, image)
        last, square = square, dot(residual, residual)
        direction = added(residual, square / last, direction)
    return Solution(x, _relative(math.sqrt(square), scale), max_iterations, True)


def neumann(
    product: Product,
    b: Vector,
    tolerance: float,
    max_iterations: int,
    x: Vector | None = None,
    step_size: float | None = None,
) -> Solution:
    """Solve ``A x = b`` by the Neumann series ``a sum_k (I - a A)^k b``.

    Args:
        product: with A.
        b: the right-hand side.
        tolerance: of the relative residual.
        max_iterations: how many terms at most.
        x: where to start.
        step_size: a; it converges if every eigenvalue of ``a A`` is between 0 and 2. None: 1 over the largest.

    Example:
        >>> diagonal = torch.tensor([1.0, 4.0])
        >>> solution = neumann(lambda v: [diagonal * v[0]], [torch.ones(2)], 1e-3, 100)
        >>> torch.allclose(solution.x[0], torch.tensor([1.0, 0.25]), atol=2e-3)
        True
    """
    scale = norm(b)
    x, residual = _start(product, b, x)
    if step_size is None:
        step_size = 1.0 / max(_largest_eigenvalue(product, b), torch.finfo(b[0].dtype).tiny)
    size = norm(residual)
    for iteration in range(max_iterations):
        if size <= tolerance * scale:
            return Solution(x, _relative(size, scale), iteration, True)
        x = added(x, step_size, residual)
        residual = added(residual, -step_size, product(residual))
        size = norm(residual)
        if not math.isfinite(size):
            return Solution(x, size, iteration + 1, False)
    return Solution(x, _relative(size, scale), max_iterations, True)


def _start(product: Product, b: Vector, x: Vector | None) -> tuple[Vector, Vector]:
    """Where to begin, and the residual there."""
    if x is None:
        return [torch.zeros_like(part) for part in b], b
    return x, added(b, -1.0, product(x))


def _largest_eigenvalue(product: Product, b: Vector, iterations: int = 20) -> float:
    """By power iteration from b, and a little above it: too large is slow, too small diverges."""
    v, size = b, norm(b)
    for _ in range(iterations):
        if size == 0.0:
            return 0.0
        v = product([part / size for part in v])
        size = norm(v)
    return 1.1 * size


def _relative(size: float, scale: float) -> float:
    return size / scale if scale else 0.0


@torch.no_grad()
def dot(a: Vector, b: Vector) -> float:
    """In float64, whatever the tensors are."""
    return sum((x.to(torch.float64) * y.to(torch.float64)).sum().item() for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def added(a: Sequence[Tensor], factor: float, b: Sequence[Tensor]) -> Vector:
    """``a + factor b``."""
    return [torch.add(x, y, alpha=factor) for x, y in zip(a, b, strict=True)]
