"""MNIST-1D: ten classes of short noisy signals, made by a program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from metaopt.tasks.classification import Classification, Split, Splits

Array = np.ndarray[Any, Any]

# The constants are the paper's (figure 2 and the published generator).
_TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_ROWS, _TRAINING, _SEED = 5000, 4000, 42
_PADDING = (36, 60)  # zeros after a template, both ends included
_LONG, _LENGTH = 72, 40  # points of a signal while it is made, and when it is done
_TRANSLATION = 48
_SCALE, _SHEAR, _SMOOTH_NOISE, _NOISE = 0.4, 0.75, 0.25, 0.02


class MNIST1DData(NamedTuple):
    """Signals of shape (n, 40) and labels of shape (n,)."""

    train: Split
    test: Split


def _stretch(x: Array, length: int) -> Array:
    """``x`` at ``length`` points, linearly between its own."""
    stretched: Array = np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(x)), x)
    return stretched


def _smooth(x: Array) -> Array:
    """Rows under a Gaussian of width 2, cut off at 4 widths, and mirrored beyond their ends."""
    reach = 8
    weights = np.exp(-0.125 * np.arange(-reach, reach + 1) ** 2)
    weights /= weights.sum()
    wide, length = np.pad(x, ((0, 0), (reach, reach)), mode="symmetric"), x.shape[1]
    out: Array = x * weights[reach]
    for k in range(reach):  # from the outside to the middle, as scipy adds it up
        out += (wide[:, k : k + length] + wide[:, 2 * reach - k : 2 * reach - k + length]) * weights[k]
    return out


def generate_mnist1d() -> tuple[Array, Array]:
    """All 5,000 signals, float64 of shape (5000, 40), and their labels, shuffled."""
    templates = np.array(_TEMPLATES)
    templates -= templates.mean(1, keepdims=True)
    templates /= templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6
    labels = np.repeat(np.arange(10), _ROWS // 10)
    # numpy's legacy stream, which is frozen: the published data set is defined by it, draw by draw.
    random = np.random.RandomState(_SEED)
    signals, rough, noise, shears = [], [], [], []
    for template in templates[labels]:
        padding = _PADDING[0] + int(random.rand() * (_PADDING[1] - _PADDING[0] + 1))
        # A template that passes through 0 is lifted a little: exact zeros mark what is not template.
        signal = _stretch(np.concatenate([template + 1e-8, np.zeros(padding)]), _LONG)
        signal *= 1 + _SCALE * (random.rand() - 0.5)
        signals.append(np.roll(signal, random.randint(_TRANSLATION)))
        rough.append(_SMOOTH_NOISE * random.randn(_LONG))
        noise.append(_NOISE * random.randn(_LONG))
        shears.append(_SHEAR * (random.rand() - 0.5))
    x = np.stack(signals)
    x = np.where(x != 0, x, _smooth(np.stack(rough))) + np.stack(noise)
    x -= np.array(shears)[:, None] * np.linspace(-0.5, 0.5, _LONG)
    order = random.permutation(_ROWS)
    x = np.stack([_stretch(row, _LENGTH) for row in x])[order]
    return (x - x.mean()) / x.std(), labels[order]


@lru_cache(maxsize=1)
def load_mnist1d() -> MNIST1DData:
    """The published data set, made anew: 4,000 training and 1,000 test signals of 40 points, float32.

    The whole has mean 0 and standard deviation 1.

    Example:
        >>> load_mnist1d().train.images.shape
        torch.Size([4000, 40])

    References:
        Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D, ICML 2024, section 2; its package ``mnist1d``.
    """
    x, y = generate_mnist1d()
    images, labels = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.int64)
    sizes = [_TRAINING, _ROWS - _TRAINING]
    return MNIST1DData(*(Split(*part) for part in zip(images.split(sizes), labels.split(sizes), strict=True)))


def mlp1d(hidden: int = 50) -> nn.Module:
    """40-50-10 with tanh: 2,560 weights."""
    return nn.Sequential(nn.Linear(_LENGTH, hidden), nn.Tanh(), nn.Linear(hidden, 10))


class MNIST1D(Classification):
    """Classification of MNIST-1D: the inner loss on training batches, the meta-loss on rows held out of training.

    Args:
        network: makes the model, from (n, 40) to (n, 10), with buffers (if any) that training does not change.
        batch_size: signals per inner step.
        order: "random" draws them with replacement; "sequential" takes them as they come, step after step, and begins
            anew at the end.
        validation: how many of the 4,000 training rows, the last ones, are held out for the meta-loss. With 0 none
            are, and the meta-loss is that of all training rows.

    Raises:
        ValueError: ``batch_size`` below 1, an unknown ``order``, ``validation`` outside 0..3999.

    Example:
        >>> task = MNIST1D(batch_size=50, order="sequential", validation=0)
        >>> torch.equal(task.batch(81, None).labels, task.data.train.labels[50:100])
        True
        >>> task.meta_loss(task.init(torch.Generator().manual_seed(0)), {}).item() > 2
        True

    References:
        Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D, ICML 2024; section 3 meta-learns a learning rate.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module] = mlp1d,
        batch_size: int = 50,
        order: Literal["random", "sequential"] = "random",
        validation: int = 1000,
    ) -> None:
        if not 0 <= validation < _TRAINING:
            raise ValueError(f"validation must be in 0..{_TRAINING - 1}, got validation={validation}")
        rows, test = load_mnist1d()
        inner = _TRAINING - validation
        train = Split(rows.images[:inner], rows.labels[:inner])
        held_out = Split(rows.images[inner:], rows.labels[inner:]) if validation else train
        super().__init__(Splits(train, held_out, test), network, batch_size, order)
