"""The digits: splits, initialisation, and networks that learn them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from sklearn import datasets
from torch import Tensor, nn

from metaopt.functional import radam
from metaopt.tasks import Digits, Splits, Task, convnet, load_digits, mlp


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small are no work for several threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(images: Tensor, labels: Tensor) -> list[tuple[float, ...]]:
    """Each example as one tuple, in the pixel values of the original."""
    return [(*image.tolist(), label) for image, label in zip((images.flatten(1) * 16), labels.tolist(), strict=True)]


# Data


def test_the_splits_are_the_whole_data_set_and_no_example_is_in_two() -> None:
    splits = load_digits()
    assert [len(split.labels) for split in splits] == [1000, 397, 400]
    bunch = datasets.load_digits()
    original = [(*image.flatten(), label) for image, label in zip(bunch.images, bunch.target, strict=True)]
    # As multisets: every example of the original once, in exactly one split.
    assert sorted(row for split in splits for row in rows(*split)) == sorted(original)
    assert len(set(original)) == len(original)


def test_every_split_has_every_class() -> None:
    for split in load_digits():
        counts = torch.bincount(split.labels, minlength=10)
        assert counts.shape == (10,)
        assert counts.min() > 0.06 * len(split.labels)


def test_images_have_a_channel_and_lie_in_the_unit_interval() -> None:
    for split in load_digits():
        assert split.images.shape == (len(split.labels), 1, 8, 8)
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert split.images.min() == 0.0
        assert split.images.max() == 1.0


def test_the_splits_are_the_same_whatever_the_state_of_the_random_numbers() -> None:
    first = load_digits()
    load_digits.cache_clear()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    second = load_digits()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(second, Splits)
    assert second is not first
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


# Initialisation and batches


@pytest.mark.parametrize("network", [mlp, convnet])
def test_initialisation_is_reproducible_from_the_generator_and_leaves_the_global_random_numbers_alone(
    network: Callable[[], nn.Module],
) -> None:
    before = torch.random.get_rng_state()
    task = Digits(network)
    first, same, other = task.init(seeded(1)), task.init(seeded(1)), task.init(seeded(2))
    task.batch(0, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(first) == [name for name, _ in network().named_parameters()]
    for name, p in first.items():
        assert torch.equal(p, same[name])
        assert not torch.equal(p, other[name])
        assert not p.requires_grad


def test_one_generator_gives_one_initialisation_after_another() -> None:
    task, generator = Digits(), seeded()
    first, second = task.init(generator), task.init(generator)
    assert not torch.equal(first["1.weight"], second["1.weight"])


def test_without_a_generator_torchs_own_decides() -> None:
    task = Digits()
    torch.manual_seed(5)
    first, batch = task.init(None), task.batch(0, None)
    generator = seeded(5)
    assert torch.equal(first["1.weight"], task.init(generator)["1.weight"])
    assert torch.equal(batch.labels, task.batch(0, generator).labels)


def test_initial_weights_are_distributed_as_torch_does_it() -> None:
    """nn.Linear: uniform between -1 / sqrt(fan in) and 1 / sqrt(fan in)."""
    task = Digits(lambda: mlp(hidden=64))
    weights = torch.cat([task.init(seeded(seed))["1.weight"].flatten() for seed in range(5)])
    bound = 1 / math.sqrt(64)
    assert weights.abs().max() < bound
    assert weights.abs().max() > 0.999 * bound
    assert weights.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_batches_are_drawn_from_the_training_split_with_replacement() -> None:
    task = Digits(batch_size=300)
    training = set(rows(*task.data.train))
    generator = seeded()
    first, second = task.batch(0, generator), task.batch(1, generator)
    assert first.images.shape == (300, 1, 8, 8)
    assert training.issuperset(rows(*first))
    assert len(set(rows(*first))) < 300
    assert not torch.equal(first.labels, second.labels)
    assert torch.equal(task.batch(0, seeded()).labels, first.labels)
    drawn = {row for step in range(30) for row in rows(*task.batch(step, generator))}
    assert len(drawn) > 990  # of 1000; each is missed with probability exp(-9)


# Losses


def test_its_losses_are_the_cross_entropy_of_the_module_with_these_parameters() -> None:
    task = Digits(convnet)
    params = task.init(seeded())
    model = convnet()
    model.load_state_dict(params)
    batch = task.batch(0, seeded())
    for got, (images, labels) in (
        (task.loss(params, batch, {}), batch),
        (task.meta_loss(params, {}), task.data.validation),
    ):
        logits = model(images).detach().double()
        by_hand = (logits.logsumexp(1) - logits[range(len(labels)), labels]).mean()
        assert got.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_the_test_loss_and_accuracy_are_counted_on_the_test_split() -> None:
    task = Digits()
    params = task.init(seeded())
    result = task.test(params)
    images, labels = task.data.test
    hidden = np.tanh(images.flatten(1).numpy() @ params["1.weight"].numpy().T + params["1.bias"].numpy())
    logits = (hidden @ params["3.weight"].numpy().T + params["3.bias"].numpy()).astype(np.float64)
    hits = int((logits.argmax(1) == labels.numpy()).sum())
    assert result["accuracy"].item() == pytest.approx(hits / 400, rel=1e-6)
    cross_entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(400), labels.numpy()]
    assert result["loss"].item() == pytest.approx(cross_entropy.mean(), rel=1e-6)


@pytest.mark.parametrize(("network", "weights"), [(mlp, 2410), (convnet, 1898)])
def test_the_networks_have_the_size_they_state(network: Callable[[], nn.Module], weights: int) -> None:
    assert sum(p.numel() for p in network().parameters()) == weights
    assert f"{weights:,} weights" in (network.__doc__ or "")


@pytest.mark.parametrize(("network", "lr", "steps"), [(mlp, 0.1, 80), (convnet, 0.1, 140)])
def test_radam_trains_a_network_to_nine_in_ten_and_a_fresh_one_guesses(
    network: Callable[[], nn.Module], lr: float, steps: int
) -> None:
    task, opt, generator = Digits(network, batch_size=64), radam(lr=lr), seeded()
    params = task.init(generator)
    assert task.test(params)["accuracy"] < 0.3
    state = opt.init(params)
    for step in range(steps):
        grads = torch.func.grad(task.loss)(params, task.batch(step, generator), {})
        params, state = opt.step(params, grads, state)
    assert task.test(params)["accuracy"] > 0.9
    assert task.meta_loss(params, {}) < 0.5


# Use


def test_it_is_a_task() -> None:
    assert isinstance(Digits(), Task)


def test_making_one_leaves_the_global_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    Digits(convnet)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be >= 1, got batch_size=0"):
        Digits(batch_size=0)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    load_digits.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'metaopt\[data\]'"):
        Digits()
