"""Gradients of a bounded norm, inside an inner loop that is differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt.checks import check_real
from metaopt.functional.tree import Tree
from metaopt.numerics import safe_sqrt


def clip_by_norm(grads: Any, max_norm: float | Tensor) -> Any:
    """The gradients, scaled down to a common norm where theirs is larger.

        grads * min(1, max_norm / |grads|)

    Differentiable in the gradients and in ``max_norm``, everywhere finite: at zero gradients, whose norm has no slope
    there, and where their squares would overflow.

    Args:
        grads: a pytree of tensors; None stays None.
        max_norm: of all of them together, >= 0; a number or a 0-d tensor, which is not checked.

    Raises:
        TypeError: ``max_norm`` is neither.
        ValueError: ``max_norm`` is negative or NaN.

    Example:
        >>> grads = {"w": torch.tensor([3.0, 4.0]), "b": None}
        >>> clip_by_norm(grads, 1.0)
        {'w': tensor([0.6000, 0.8000]), 'b': None}

    References:
        Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks, ICML 2013, algorithm 1.
    """
    check_real("max_norm", max_norm)
    if not isinstance(max_norm, Tensor) and not max_norm >= 0:
        raise ValueError(f"max_norm must be >= 0, got max_norm={max_norm}")
    tree = Tree(grads)
    given = [leaf for leaf in tree.leaves if leaf is not None and leaf.numel()]
    if not given:
        return grads
    # A common factor, taken out before squaring; as a constant, since it cancels.
    largest = torch.stack([leaf.detach().abs().amax().to(given[0].device) for leaf in given]).amax()
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    units = [leaf / unit.to(leaf) for leaf in given]
    relative = safe_sqrt(torch.stack([leaf.abs().square().sum().to(unit) for leaf in units]).sum())
    above = relative > max_norm / unit
    scale = max_norm / torch.where(above, relative, torch.ones_like(relative))
    # Not the gradient times a small factor, whose derivative sums up the gradient itself, and may overflow.
    clipped = iter([torch.where(above.to(g.device), u * scale.to(u), g) for u, g in zip(units, given, strict=True)])
    return tree.unflatten([leaf if leaf is None or not leaf.numel() else next(clipped) for leaf in tree.leaves])
