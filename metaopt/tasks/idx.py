"""Images from a folder of IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from metaopt.tasks.classification import Split, Splits

_UNSIGNED_BYTES = 0x08  # the code of the only element type that these data sets use


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from error


def read_idx(path: str | Path, dimensions: int) -> Tensor:
    """The array in one IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        dimensions: how many the array must have; 3 for images, 1 for labels.

    Raises:
        ValueError: the file is not IDX, holds something other than unsigned bytes, has another number of dimensions,
            or is shorter or longer than its header says.

    References:
        LeCun, Cortes & Burges, The MNIST Database of Handwritten Digits, 1998, "File formats".
    """
    path = Path(path)
    content = _content(path)
    start = 4 + 4 * dimensions
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path} is no IDX file: it begins with {content[:4].hex() or 'nothing'}")
    if content[2] != _UNSIGNED_BYTES or content[3] != dimensions:
        raise ValueError(
            f"{path} must hold unsigned bytes (type 08) in {dimensions} dimensions, "
            f"got type {content[2]:02x} in {content[3]}"
        )
    if len(content) < start:
        raise ValueError(f"{path} ends within its header, after {len(content)} of {start} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} has {len(content) - start} bytes of data, its sizes {shape} ask for {math.prod(shape)}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def _pair(folder: Path, name: str) -> Split:
    images_at, labels_at = (_find(folder, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    images, labels = read_idx(images_at, 3), read_idx(labels_at, 1)
    if len(images) != len(labels):
        raise ValueError(f"{images_at} has {len(images)} images, {labels_at} has {len(labels)} labels")
    return Split(images.unsqueeze(1).float() / 255, labels.long())


def load_idx(folder: str | Path, validation: int = 10_000) -> Splits:
    """The images (n, 1, height, width) in [0, 1] and labels (n,) of a folder of four IDX files, gzipped or not.

    The files have MNIST's names: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte,
    t10k-labels-idx1-ubyte, with or without .gz.

    Args:
        folder: where they are.
        validation: how many of the training images, the last ones, become the validation split.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be (its name is in the message), or ``validation`` leaves no training
            images or none to validate on.

    Example:
        >>> load_idx("/no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: /no/such/folder has neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz

    References:
        LeCun, Cortes & Burges, The MNIST Database of Handwritten Digits, 1998; Xiao, Rasul & Vollgraf, Fashion-MNIST,
        arXiv:1708.07747.
    """
    folder = Path(folder)
    rows, test = _pair(folder, "train"), _pair(folder, "t10k")
    if rows.images.shape[2:] != test.images.shape[2:]:
        raise ValueError(
            f"{folder} has training images of {tuple(rows.images.shape[2:])} pixels, "
            f"test images of {tuple(test.images.shape[2:])}"
        )
    count = len(rows.labels)
    if not 1 <= validation < count:
        raise ValueError(f"validation must be in 1..{count - 1}, got validation={validation}")
    sizes = [count - validation, validation]
    train, held_out = (Split(*part) for part in zip(*(x.split(sizes) for x in rows), strict=True))
    return Splits(train, held_out, test)
