"""Shared by all tests."""

from __future__ import annotations

import warnings

import pytest
import torch

# Tensors here are small: a second thread costs more than it brings, and the second core has tests of its own to run.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def forward_mode() -> None:
    """torch scripts formulas of its own when forward mode is first used, by a torch.jit that warns that it is old."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)
