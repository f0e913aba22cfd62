"""Counting the memory of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Follows the memory of the tensors that operations make while this mode is active.

    Example:
        >>> with Made() as made:
        ...     x = torch.ones(1000)
        ...     y = (x * 2) + 1
        >>> made.alive()  # x and y; the product is gone
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of those that are still there."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())
