"""Fixtures of the functional optimizers' tests."""

from __future__ import annotations

import pytest

from tests.functional.cases import Problem


@pytest.fixture(scope="session")
def problem() -> Problem:
    """Nothing modifies it: that is one of the tests."""
    return Problem()
