"""Pytrees of parameters: leaves, their names, and other trees of the same structure."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Tree:
    """The leaves of a pytree, in order, and what is needed to build a tree like it.

    Example:
        >>> import torch
        >>> tree = Tree({"layer": {"weight": torch.ones(2)}, "bias": torch.zeros(1)})
        >>> tree.names
        ['layer.weight', 'bias']
        >>> tree.match("grads", {"bias": None, "layer": {"weight": 1}})
        [1, None]
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.leaves, self.spec = pytree.tree_flatten(tree)
        self._names: list[str] | None = None

    @property
    def names(self) -> list[str]:
        """The path of each leaf, joined by dots: the names of ``named_parameters`` for a dict made of these."""
        if self._names is None:  # most steps never ask (functools.cached_property holds a lock, which does not compile)
            paths, _ = pytree.tree_flatten_with_path(self.tree)
            self._names = [".".join(_key(entry) for entry in path) for path, _ in paths]
        return self._names

    def match(self, what: str, other: Any) -> list[Any]:
        """The parts of ``other`` that stand where this tree has its leaves.

        Raises:
            ValueError: ``other``, which the message calls ``what``, has another structure.
        """
        try:
            parts: list[Any] = self.spec.flatten_up_to(other)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{what} must have the structure of params: {error}") from None
        return parts

    def unflatten(self, leaves: list[Any]) -> Any:
        return pytree.tree_unflatten(leaves, self.spec)

    def label(self, what: str, index: int) -> str:
        """How an error names leaf ``index`` of the tree called ``what``."""
        return f"{what}[{self.names[index]!r}]" if self.names[index] else what


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a pytree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
