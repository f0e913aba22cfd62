"""`FewShot` and what is made with it: every task has classes of its own, and no example on both sides."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from metaopt.tasks import Dense, Episode, Examples, FewShot, MNIST1DSubsets, load_mnist1d

CLASSES, EXAMPLES = 9, 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(episodes: Episode) -> Episode:
    return Episode(*(Examples(part.images[0], part.labels[0]) for part in episodes))


def coded(**arguments: Any) -> FewShot:
    """Examples that say what they are: (class, number, 0.5)."""
    numbers = torch.cartesian_prod(torch.arange(CLASSES), torch.arange(EXAMPLES)).reshape(CLASSES, EXAMPLES, 2)
    bank = torch.cat([numbers.float(), torch.full((CLASSES, EXAMPLES, 1), 0.5)], -1)
    return FewShot(bank, Dense(3, 4), **{"ways": 4, "shots": 2, "queries": 3, **arguments})


def test_a_label_stands_for_one_class_on_both_sides_and_no_example_is_on_both() -> None:
    episodes = coded().sample(50, seeded())
    assert episodes.support.images.shape == (50, 8, 3)
    assert episodes.query.images.shape == (50, 12, 3)
    seen = set()
    for task in range(50):
        examples = {}
        for part, per_class in ((episodes.support, 2), (episodes.query, 3)):
            images, labels = part.images[task], part.labels[task]
            assert labels.bincount().tolist() == [per_class] * 4
            for (character, number, _), label in zip(images.tolist(), labels.tolist(), strict=True):
                assert (character, number) not in examples
                examples[character, number] = label
        classes = {label: {c for (c, _), other in examples.items() if other == label} for label in range(4)}
        assert all(len(found) == 1 for found in classes.values())
        assert len(set.union(*classes.values())) == 4
        seen.add(tuple(min(found) for found in classes.values()))
    assert len(seen) > 40  # of 3,024 ordered choices


def test_every_class_and_every_example_is_drawn_as_often_as_any_other() -> None:
    images = coded().sample(2000, seeded()).query.images.flatten(0, 1)
    counts = torch.zeros(CLASSES, EXAMPLES).index_put(
        (images[:, 0].long(), images[:, 1].long()), torch.ones(len(images)), accumulate=True
    )
    expected = 2000 * 12 / (CLASSES * EXAMPLES)
    assert bool(((counts / expected - 1).abs() < 5 / expected**0.5).all())


def test_a_permuted_task_has_one_order_for_all_its_inputs() -> None:
    episodes = coded(permute=True).sample(40, seeded())
    orders = set()
    for task in range(40):
        images = torch.cat([episodes.support.images[task], episodes.query.images[task]])
        constant = [column for column in range(3) if bool((images[:, column] == 0.5).all())]
        assert len(constant) == 1
        orders.add(constant[0])
    assert orders == {0, 1, 2}


def test_batches_are_the_whole_support_or_drawn_from_it() -> None:
    config = first(coded().sample(1, seeded()))
    assert coded().task(config).batch(0, None) is config.support
    batch = coded(batch_size=100).task(config).batch(0, seeded())
    assert batch.images.shape == (100, 3)
    whole, drawn = (
        {(*x, y) for x, y in zip(*map(torch.Tensor.tolist, p), strict=True)} for p in (config.support, batch)
    )
    assert drawn == whole  # each of 8 is missed with probability exp(-13)


def test_accuracy_is_counted_on_the_query_examples() -> None:
    family = coded()
    task = family.task(first(family.sample(1, seeded())))
    always_two = {"w1": torch.zeros(3, 4), "b1": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    result = task.test(always_two)
    assert result["accuracy"].item() == 0.25
    assert result["loss"] == task.meta_loss(always_two, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 0}, "ways must be in 1..9, the number of classes, got ways=0"),
        ({"ways": 10}, "ways must be in 1..9, the number of classes, got ways=10"),
        ({"shots": 0}, "at most 6, the examples of a class, got shots=0 and queries=3"),
        ({"queries": 5}, "at most 6, the examples of a class, got shots=2 and queries=5"),
        ({"batch_size": 0}, "batch_size must be >= 1 or None, got batch_size=0"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        coded(**arguments)


@pytest.mark.parametrize("split", ["train", "test"])
def test_subsets_of_mnist1d_are_rows_of_their_split_with_consistent_labels(split: Any) -> None:
    rows = getattr(load_mnist1d(), split)
    known = {tuple(image): label for image, label in zip(rows.images.tolist(), rows.labels.tolist(), strict=True)}
    episodes = MNIST1DSubsets(split, ways=4, shots=5, queries=10, permute=False).sample(3, seeded())
    for task in range(3):
        pairs = {
            (label, known[tuple(image)])
            for part in episodes
            for image, label in zip(part.images[task].tolist(), part.labels[task].tolist(), strict=True)
        }
        assert len(pairs) == 4
        assert len({digit for _, digit in pairs}) == 4


def test_permuted_subsets_have_the_same_numbers_in_another_order() -> None:
    plain, permuted = (MNIST1DSubsets(permute=permute).sample(2, seeded()) for permute in (False, True))
    assert not torch.equal(plain.query.images, permuted.query.images)
    assert torch.equal(plain.query.images.sort(-1).values, permuted.query.images.sort(-1).values)


def test_an_unknown_split_of_mnist1d_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got split='validation'"):
        MNIST1DSubsets("validation")  # type: ignore[arg-type]
