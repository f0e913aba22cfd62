"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

# Experiments track their runs; a test that wants wandb says so.
os.environ["WANDB_MODE"] = "disabled"

# Tensors here are small: a second thread costs more than it brings, and the second core has tests of its own to run.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long profile: many more random cases (an hour)")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long profile is asked for."""
    return bool(request.config.getoption("--long"))
