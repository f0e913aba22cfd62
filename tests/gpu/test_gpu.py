"""The checks of ``check_kernels.py`` as tests: they need a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.check_kernels import Check, all_checks, place_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("check", list(all_checks()), ids=lambda check: check.name)
def test_kernels(check: Check) -> None:
    check.run(place_on("cuda"))
