"""Trained weights: saved, loaded, and those that come with metaopt.

    metaopt.learned.available()                          # {"mlp-mnist1d": "...", ...}
    learned = metaopt.learned.load("mlp-mnist1d")        # or the path of a file that `save` has written
    optimizer = metaopt.optim.Learned(model.parameters(), learned)

A file is in the safetensors format: tensors, and text beside them. Nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metaopt.learned.adafactor_mlp import AdafactorMLPOptimizer
from metaopt.learned.base import LearnedOptimizer
from metaopt.learned.lstm import LSTMOptimizer
from metaopt.learned.mlp import MLPOptimizer

VERSION = 1
_FOLDER = Path(__file__).parent / "weights"
_DESIGNS: Mapping[str, type[LearnedOptimizer]] = {
    design.architecture: design for design in (MLPOptimizer, AdafactorMLPOptimizer, LSTMOptimizer)
}


def save(optimizer: LearnedOptimizer, path: Path | str, card: str = "") -> Path:
    """Write the weights, and what is needed to build the optimizer again.

    Args:
        optimizer: what was meta-trained.
        path: the file; its folder is made.
        card: on what it was trained, how, and where it fails; kept in the file.

    Raises:
        TypeError: not a learned optimizer of this package.

    Example:
        >>> import tempfile
        >>> optimizer = MLPOptimizer(hidden=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(optimizer, Path(folder) / "mine.safetensors")
        ...     again = load(path)
        >>> torch.equal(next(again.parameters()), next(optimizer.parameters()))
        True
    """
    from safetensors.torch import save_file

    if getattr(optimizer, "architecture", None) not in _DESIGNS:
        raise TypeError(f"optimizer must be a learned optimizer of metaopt.learned, got {type(optimizer).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        "format": "metaopt.learned",
        "version": str(VERSION),
        "architecture": optimizer.architecture,
        "config": json.dumps(optimizer.config()),
        "card": card,
    }
    tensors = {name: p.detach().contiguous() for name, p in optimizer.named_parameters()}
    save_file(tensors, path, metadata=described)
    return path


def load(name: Path | str) -> LearnedOptimizer:
    """A learned optimizer with trained weights.

    Args:
        name: one of `available`, or the path of a file.

    Raises:
        ValueError: no such name or file; a file of another format, version or architecture, or damaged.
    """
    shipped = _FOLDER / f"{name}.safetensors"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"name must be one of {', '.join(available()) or 'none'} or a file, got name={str(name)!r}")
    described, tensors = _read(path)
    design = _DESIGNS.get(described["architecture"])
    if design is None:
        raise ValueError(
            f"{path}: architecture must be one of {', '.join(_DESIGNS)}, got {described['architecture']!r}"
        )
    # Not the generator of the user: the initial weights are replaced at once.
    with torch.random.fork_rng(devices=[]):
        optimizer = design(**json.loads(described["config"]))
    shapes = {name: tuple(p.shape) for name, p in optimizer.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != found:
        raise ValueError(f"{path}: weights must be those of {optimizer}, got shapes {found}")
    optimizer.load_state_dict(tensors)
    return optimizer


def card(name: Path | str) -> str:
    """On what the weights were trained, how, and where they fail."""
    shipped = _FOLDER / f"{name}.safetensors"
    return _read(shipped if shipped.is_file() else Path(name))[0]["card"]


def available() -> dict[str, str]:
    """The weights that come with metaopt, and the first line of their cards."""
    return {path.stem: card(path).partition("\n")[0] for path in sorted(_FOLDER.glob("*.safetensors"))}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What a file says of itself, and its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a file of weights, or damaged: {error}") from None
    if described.get("format") != "metaopt.learned":
        raise ValueError(f"{path} has not been written by metaopt.learned.save")
    if described["version"] != str(VERSION):
        raise ValueError(f"{path}: version must be {VERSION}, got {described['version']}; it needs a newer metaopt")
    return described, tensors
