"""Proof that nothing was modified in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves


@contextmanager
def untouched(*trees: Any) -> Iterator[None]:
    """Assert that the tensors in some pytrees keep their values, and that nothing wrote into them."""
    tensors = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]
    before = [(x._version, x.detach().clone()) for x in tensors]
    yield
    for x, (version, value) in zip(tensors, before, strict=True):
        assert x._version == version
        assert_close(x.detach(), value, rtol=0, atol=0, equal_nan=True)
