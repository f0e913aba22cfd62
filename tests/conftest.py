"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Experiments track their runs; a test that wants wandb says so.
os.environ["WANDB_MODE"] = "disabled"

# Tensors here are small: a second thread costs more than it brings, and the second core has tests of its own to run.
torch.set_num_threads(1)

# Property-based tests try the same few examples every time; with --long, many and others each time.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("short", max_examples=20, derandomize=True, database=None, **_COMMON)
settings.register_profile("long", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="the long profile: all that is marked long, and more random cases"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long"):
        settings.load_profile("long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked long is for the long profile."""
    if config.getoption("--long"):
        return
    later = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=later)
    items[:] = [item for item in items if item not in set(later)]


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long profile is asked for."""
    return bool(request.config.getoption("--long"))
