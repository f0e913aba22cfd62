"""``import metaopt`` is light, and its names are what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import metaopt

REPORT = """
import json, sys
import torch, numpy
before = set(sys.modules)
import metaopt
bare = set(sys.modules) - before
for name in metaopt.__all__:
    getattr(metaopt, name)
print(json.dumps({"bare": sorted(bare), "used": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def modules() -> Any:
    """The modules loaded by a fresh interpreter: by the bare import, by using every public name, and in all."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_loads_nothing_but_itself(modules: Any) -> None:
    assert modules["bare"] == ["metaopt"]


def test_every_public_name_needs_torch_and_numpy_alone(modules: Any) -> None:
    packages = {name.partition(".")[0] for name in modules["used"]}
    assert packages - set(sys.stdlib_module_names) == {"metaopt"}
    assert "metaopt.train" in modules["used"]


def test_no_extra_is_loaded(modules: Any) -> None:
    extras = {"wandb", "optuna", "triton", "matplotlib", "tyro", "sklearn", "rich", "yaml", "higher", "torchopt"}
    assert not extras & {name.partition(".")[0] for name in modules["all"]}


def test_the_slow_parts_of_torch_are_not_loaded(modules: Any) -> None:
    assert not {"torch._dynamo", "torch._inductor"} & set(modules["all"])


def test_every_public_name_is_there() -> None:
    assert sorted(metaopt.__all__) == metaopt.__all__
    for name in metaopt.__all__:
        assert getattr(metaopt, name) is not None
        assert name in dir(metaopt)
    for name in ("Hyperparameters", "PerParameter", "Schedule", "inner_loop", "meta_train"):
        assert getattr(metaopt, name).__name__ == name
        assert getattr(metaopt, name).__module__.startswith("metaopt.")
    for name in ("functional", "learned", "metagrad", "optim", "tasks"):
        assert getattr(metaopt, name).__name__ == f"metaopt.{name}"


@pytest.mark.parametrize("package", ["functional", "learned", "metagrad", "optim", "tasks"])
def test_every_public_name_of_a_package_is_there(package: str) -> None:
    module = getattr(metaopt, package)
    assert module.__all__
    for name in module.__all__:
        assert hasattr(module, name), name


def test_a_star_import_brings_the_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from metaopt import *", names)
    assert set(metaopt.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'metaopt' has no attribute 'optimizer'"):
        _ = metaopt.optimizer
    assert not hasattr(metaopt, "__path_of_no_return__")
    with pytest.raises(ImportError):
        exec("from metaopt import optimizer")


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert metaopt.__version__ == version("metaopt")
