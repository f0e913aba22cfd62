"""IDX files: what is read is what was written, and a file that is not whole is named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metaopt.tasks import Classification, Splits, Task, load_idx

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {}
    for split, rows in (("train", 12), ("test", 4)):
        images, labels = NAMES[split]
        arrays[images] = random.integers(0, 256, (rows, 5, 3))
        arrays[labels] = random.integers(0, 10, rows)
    return arrays


@pytest.fixture
def folder(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def zipped(folder: Path, name: str) -> Path:
    plain, packed = folder / name, folder / f"{name}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return packed


@pytest.mark.parametrize(
    "packed", [[], [NAMES["train"][0], NAMES["test"][1]], [n for two in NAMES.values() for n in two]]
)
def test_images_and_labels_are_what_was_written_gzipped_or_not(
    folder: Path, arrays: dict[str, np.ndarray], packed: list[str]
) -> None:
    for name in packed:
        zipped(folder, name)
    data = load_idx(str(folder), validation=2)
    assert isinstance(data, Splits)
    assert [tuple(split.images.shape) for split in data] == [(10, 1, 5, 3), (2, 1, 5, 3), (4, 1, 5, 3)]
    for images, labels, rows, name in (
        (*data.train, slice(0, 10), "train"),
        (*data.validation, slice(10, 12), "train"),
        (*data.test, slice(0, 4), "test"),
    ):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        np.testing.assert_allclose(images.squeeze(1).numpy(), arrays[NAMES[name][0]][rows] / 255, rtol=1e-6)
        assert labels.tolist() == arrays[NAMES[name][1]][rows].tolist()


def test_what_is_read_can_be_trained_on(folder: Path) -> None:
    task = Classification(
        load_idx(folder, validation=2), lambda: nn.Sequential(nn.Flatten(), nn.Linear(15, 10)), batch_size=4
    )
    assert isinstance(task, Task)
    assert task.loss(task.init(None), task.batch(0, None), {}).isfinite()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no IDX file: it begins with nothing"),
        (b"\x89PNG....", "is no IDX file: it begins with 89504e47"),
        (b"\0\0\x0d\x03" + bytes(12), "must hold unsigned bytes .type 08. in 3 dimensions, got type 0d in 3"),
        (b"\0\0\x08\x01\0\0\0\x01\x07", ".* in 3 dimensions, got type 08 in 1"),
        (b"\0\0\x08\x03" + bytes(7), "ends within its header, after 11 of 16 bytes"),
        (idx(np.zeros((12, 5, 3)))[:-1], r"has 179 bytes of data, its sizes \(12, 5, 3\) ask for 180"),
        (idx(np.zeros((12, 5, 3))) + b"\0", r"has 181 bytes of data, its sizes \(12, 5, 3\) ask for 180"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(folder: Path, content: bytes, message: str) -> None:
    path = folder / NAMES["train"][0]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte {message}"):
        load_idx(folder, validation=2)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_broken_gzip_file_is_named(folder: Path, damage: str) -> None:
    path = zipped(folder, NAMES["test"][0])
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:-9], "flipped": flipped, "not gzip": b"hello"}[damage])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is no whole gzip file"):
        load_idx(folder, validation=2)


def test_images_and_labels_that_do_not_match_are_refused(folder: Path) -> None:
    (folder / NAMES["test"][1]).write_bytes(idx(np.zeros(5)))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte has 4 images, .*t10k-labels-idx1-ubyte has 5 labels"):
        load_idx(folder, validation=2)


def test_training_and_test_images_of_different_sizes_are_refused(folder: Path) -> None:
    (folder / NAMES["test"][0]).write_bytes(idx(np.zeros((4, 6, 3))))
    with pytest.raises(ValueError, match=r"training images of \(5, 3\) pixels, test images of \(6, 3\)"):
        load_idx(folder, validation=2)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / NAMES["train"][1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte.gz"):
        load_idx(folder, validation=2)


@pytest.mark.parametrize("validation", [0, 12])
def test_a_validation_split_of_nothing_or_everything_is_refused(folder: Path, validation: int) -> None:
    with pytest.raises(ValueError, match=f"validation must be in 1..11, got validation={validation}"):
        load_idx(folder, validation=validation)
