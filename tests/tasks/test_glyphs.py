"""The glyphs: every image shows something, every class differs from every other, and a few examples teach it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from metaopt.tasks import Glyphs, load_glyphs
from metaopt.tasks.glyphs import GlyphBank

SIZE = 14


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def bank() -> GlyphBank:
    return load_glyphs(SIZE)


def test_there_are_hundreds_of_characters_each_once(bank: GlyphBank) -> None:
    assert bank.images.shape == (len(bank.characters), 20, 1, SIZE, SIZE)
    assert len(set(bank.characters)) == len(bank.characters) > 400
    assert set("0123456789ABQRabgλπЖ∞→") <= set(bank.characters)
    assert not set("ΑВо") & set(bank.characters)  # Greek and Cyrillic letters that look like Latin ones


def test_no_image_is_blank_and_all_lie_in_the_unit_interval(bank: GlyphBank) -> None:
    assert bank.images.min() >= 0
    assert bank.images.max() <= 1
    assert bank.images.amax((2, 3, 4)).min() > 0.3
    ink = bank.images.mean((2, 3, 4))
    assert ink.min() > 0.02
    assert ink.max() < 0.8


def test_no_two_images_of_a_class_are_the_same(bank: GlyphBank) -> None:
    flat = bank.images.flatten(2)
    distances = torch.cdist(flat, flat) + 10 * torch.eye(20)
    assert distances.min() > 0.1


def test_classes_are_told_apart_by_their_mean_image(bank: GlyphBank) -> None:
    """Means of ten examples name the class of half of the others, in other fonts; by chance it is one in 400."""
    means, rest = bank.images[:, :10].mean(1).flatten(1), bank.images[:, 10:].flatten(2)
    nearest = torch.cdist(rest, means).argmin(-1)
    right = (nearest == torch.arange(len(means))[:, None]).float().mean()
    assert right > 0.45
    apart = torch.cdist(means, means) + 10 * torch.eye(len(means))
    assert apart.min() > 0.3


def test_the_images_are_the_same_whatever_the_state_of_the_random_numbers(bank: GlyphBank) -> None:
    load_glyphs.cache_clear()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = load_glyphs(SIZE)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.characters == bank.characters
    assert torch.equal(again.images, bank.images)
    assert load_glyphs(SIZE) is again


def test_no_character_is_in_both_splits(bank: GlyphBank) -> None:
    train, test = Glyphs("train", size=SIZE).bank, Glyphs("test", size=SIZE).bank
    assert torch.equal(torch.cat([train, test]), bank.images)
    assert len(train) == len(bank.images) * 3 // 4


def test_five_examples_of_each_of_five_characters_teach_them() -> None:
    family, generator = Glyphs("test", ways=5, shots=5, queries=10, size=SIZE), seeded()
    configs = family.sample(4, generator)
    params: Any = torch.vmap(lambda c: family.task(c).init(generator), randomness="different")(configs)
    gradients = torch.vmap(lambda c, p: torch.func.grad(family.task(c).loss)(p, c.support, {}))
    for _ in range(60):
        grads = gradients(configs, params)
        params = {name: p - 0.2 * grads[name] for name, p in params.items()}
    accuracy = torch.vmap(lambda c, p: family.task(c).test(p)["accuracy"])(configs, params)
    assert accuracy.mean() > 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split must be 'train' or 'test', got split='validation'"),
        ({"size": 7}, "size must be >= 8, got size=7"),
        ({"size": SIZE, "shots": 10, "queries": 11}, "at most 20, the examples of a class, got shots=10"),
        ({"size": SIZE, "channels": ()}, "channels must be two or more"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Glyphs(**arguments)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'metaopt\[plots\]'"):
        load_glyphs(SIZE + 1)
