"""Weights in files: a round trip, what is refused, and what the shipped ones do on a model they never saw."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metaopt import learned
from metaopt.learned import AdafactorMLPOptimizer, LSTMOptimizer, MLPOptimizer
from metaopt.optim import Learned


@pytest.mark.parametrize(
    "optimizer",
    [MLPOptimizer(hidden=8, step_scale=0.02, magnitude_scale=0.5, lr=0.5), AdafactorMLPOptimizer(), LSTMOptimizer(6)],
    ids=repr,
)
def test_a_round_trip_gives_the_same_optimizer(optimizer: Any, tmp_path: Path) -> None:
    path = learned.save(optimizer, tmp_path / "new" / "mine.safetensors", card="Mine.\nOn what it was trained.")
    state = torch.get_rng_state()
    again = learned.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(again) == repr(optimizer)
    assert learned.card(path) == "Mine.\nOn what it was trained."
    params, grads = {"w": torch.randn(3, 2)}, {"w": torch.randn(3, 2)}
    for a, b in zip(
        optimizer.step(params, grads, optimizer.init(params)),
        again.step(params, grads, again.init(params)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


def rewritten(path: Path, **described: str) -> Path:
    """The same tensors, described otherwise."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path), path, metadata={**old, **described})
    return path


@pytest.mark.parametrize(
    ("described", "match"),
    [
        ({"architecture": "transformer"}, "architecture must be one of mlp, adafactor_mlp, lstm, got 'transformer'"),
        ({"version": "2"}, "version must be 1, got 2; it needs a newer metaopt"),
        ({"format": "pt"}, "has not been written by metaopt.learned.save"),
        ({"config": json.dumps({**MLPOptimizer().config(), "hidden": 16})}, "weights must be those of"),
        ({"architecture": "lstm", "config": json.dumps(LSTMOptimizer().config())}, "weights must be those of"),
    ],
)
def test_weights_of_something_else_are_refused(described: dict[str, str], match: str, tmp_path: Path) -> None:
    path = rewritten(learned.save(MLPOptimizer(), tmp_path / "mine.safetensors"), **described)
    with pytest.raises(ValueError, match=match):
        learned.load(path)


def test_a_damaged_or_foreign_file_is_refused_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    path = learned.save(MLPOptimizer(), tmp_path / "mine.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"mine\.safetensors is not a file of weights, or damaged"):
        learned.load(path)

    class Malicious:
        def __reduce__(self) -> Any:
            return (tmp_path / "ran").write_text, ("x",)

    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="not a file of weights"):
        learned.load(path)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*mlp-mnist1d.* or a file, got name='mpl'"):
        learned.load("mpl")


def test_what_is_no_learned_optimizer_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"learned optimizer of metaopt\.learned, got Linear"):
        learned.save(nn.Linear(2, 2), tmp_path / "x.safetensors")  # type: ignore[arg-type]


def test_there_is_one_of_each_design_with_a_card() -> None:
    shipped = learned.available()
    assert {learned.load(name).architecture for name in shipped} == {"mlp", "adafactor_mlp", "lstm"}
    for name, first in shipped.items():
        text = learned.card(name)
        assert text.startswith(first)
        for what in ("Horizon", "Estimator", "Cost", "Fails", "Retrain"):
            assert what in text, (name, what)


@pytest.mark.parametrize("name", learned.available())
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_shipped_optimizer_halves_the_loss_of_a_network_it_never_saw(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(256, 20)
    y = torch.sin(x @ torch.randn(20, 1) / 20**0.5) + 0.5 * x[:, :1]
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = Learned(model.parameters(), learned.load(name))
    losses = []
    for _ in range(101):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
