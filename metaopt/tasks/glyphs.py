"""Characters in the fonts that come with matplotlib: few-shot classification like Omniglot's, without a download."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.tasks.few_shot import FewShot
from metaopt.tasks.network import Conv

# The first is the one in which characters are compared.
_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
# Computer Modern has an order of its own, in which only Latin letters and digits are where Unicode has them.
_COMPUTER_MODERN = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")
_ALPHABETS = {
    "digits": range(0x30, 0x3A),
    "Latin": [*range(0x41, 0x5B), *range(0x61, 0x7B)],
    "punctuation": [*range(0x21, 0x30), *range(0x3A, 0x41), *range(0x5B, 0x61), *range(0x7B, 0x7F)],
    "Greek": range(0x391, 0x3CA),
    "Cyrillic": range(0x402, 0x450),
    "Armenian": range(0x531, 0x588),
    "Georgian": range(0x10D0, 0x10FB),
    "arrows": range(0x2190, 0x2200),
    "mathematics": range(0x2200, 0x2270),
}
_STYLES = 8  # fonts that must have a character
_DIFFERENCE = 0.15  # share of the ink of two characters in which they must differ
_CANVAS = 48  # pixels a side of a glyph before it is distorted and shrunk
_EXAMPLES = 20  # of each character, as in Omniglot


class GlyphBank(NamedTuple):
    """Images of shape (classes, 20, 1, size, size) in [0, 1], and the characters that they show, in the same order."""

    images: Tensor
    characters: str


def _fonts() -> list[tuple[Any, set[int]]]:
    """Each font with the code points that it is used for."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError:
        raise ImportError("the glyphs come with matplotlib's fonts: pip install 'metaopt[plots]'") from None
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = []
    for name in (*_FONTS, *_COMPUTER_MODERN):
        font = FT2Font(str(folder / f"{name}.ttf"))
        font.set_size(_CANVAS, 72)
        codes = set(font.get_charmap())
        if name in _COMPUTER_MODERN:
            codes = {code for code in codes if code < 0x80 and chr(code).isalnum()}
        fonts.append((font, codes))
    return fonts


def _draw(font: Any, code: int) -> Tensor:
    """One glyph, its longer side filling the canvas: shape (canvas, canvas)."""
    font.set_text(chr(code))
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = torch.as_tensor(font.get_image().copy()).float() / 255
    rows, columns = (ink.amax(side).nonzero().flatten().tolist() for side in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    square = F.pad(ink, (left, side - width - left, top, side - height - top))
    return F.interpolate(square[None, None], (_CANVAS, _CANVAS), mode="bilinear", antialias=True)[0, 0]


def _drawings() -> dict[int, Tensor]:
    """Characters that enough fonts have and that look like no other before: code to (fonts, canvas, canvas)."""
    (first, known), *others = _fonts()
    having = {
        code: [font for font, codes in others if code in codes]
        for code in (code for alphabet in _ALPHABETS.values() for code in alphabet)
        if code in known
    }
    codes = [code for code, fonts in having.items() if len(fonts) + 1 >= _STYLES]
    return {
        codes[i]: torch.stack([drawing, *(_draw(font, codes[i]) for font in having[codes[i]])])
        for i, drawing in _distinct(torch.stack([_draw(first, code) for code in codes])).items()
    }


def _distinct(drawings: Tensor) -> dict[int, Tensor]:
    """Those which differ enough from all kept before them, by their place."""
    coarse = F.avg_pool2d(drawings, 3).flatten(1)
    ink = coarse.sum(1)
    alike = (torch.cdist(coarse, coarse, p=1.0) < _DIFFERENCE * (ink + ink[:, None])).tolist()
    kept: list[int] = []
    for i in range(len(drawings)):
        if not any(alike[i][j] for j in kept):
            kept.append(i)
    return {i: drawings[i] for i in kept}


def _distort(images: Tensor, size: int, generator: Generator) -> Tensor:
    """Turned, sheared, stretched and moved a little, each in its own way: (n, canvas, canvas) to (n, 1, size, size)."""
    count = len(images)

    def around(middle: float, reach: float) -> Tensor:
        return middle + reach * (2 * torch.rand(count, generator=generator) - 1)

    # From a place in the result to the place in the drawing: a factor above 1 leaves a margin.
    turn, shear, x, y = around(0.0, 0.15), around(0.0, 0.15), around(1.25, 0.15), around(1.25, 0.15)
    to_x = torch.stack([x * turn.cos(), x * (shear - turn.sin()), around(0.0, 0.12)], 1)
    to_y = torch.stack([y * turn.sin(), y * turn.cos(), around(0.0, 0.12)], 1)
    # Four samples a pixel, whose mean is taken.
    grid = F.affine_grid(torch.stack([to_x, to_y], 1), [count, 1, 2 * size, 2 * size], align_corners=False)
    return F.avg_pool2d(F.grid_sample(images[:, None], grid, align_corners=False), 2).clamp(0.0, 1.0)


@lru_cache(maxsize=4)
def load_glyphs(size: int = 20) -> GlyphBank:
    """Every character that eight of the fonts have, 20 times: in each of its fonts in turn, each time distorted anew.

    Of characters that look alike (Latin A, Greek Alpha) the first is kept. The classes are in an order of their own,
    drawn once and for all, as are the distortions.

    Args:
        size: pixels a side, >= 8.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``size`` is below 8.

    Example:
        >>> images, characters = load_glyphs(14)
        >>> images.shape == (len(characters), 20, 1, 14, 14)
        True

    References:
        Lake, Salakhutdinov & Tenenbaum, Human-Level Concept Learning Through Probabilistic Program Induction, Science
        2015, for Omniglot.
    """
    if size < 8:
        raise ValueError(f"size must be >= 8, got size={size}")
    drawings = _drawings()
    generator = torch.Generator().manual_seed(0)
    codes = sorted(drawings)
    codes = [codes[i] for i in torch.randperm(len(codes), generator=generator)]
    images = [
        _distort(drawings[code][torch.arange(_EXAMPLES) % len(drawings[code])], size, generator) for code in codes
    ]
    return GlyphBank(torch.stack(images), "".join(map(chr, codes)))


class Glyphs(FewShot):
    """Few-shot classification of characters: ``ways`` of them a task, by a convolutional network.

    Args:
        split: "train" has three quarters of the characters, "test" the others.
        ways: characters of a task.
        shots: images of each for the inner loss.
        queries: other images of each, for the meta-loss; there are 20 images in all.
        size: pixels a side, >= 8.
        channels: of the network's convolutions.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an unknown ``split``, a number below its minimum, or more characters or images than there are.

    Example:
        >>> family = Glyphs(ways=5, shots=1, queries=5, size=14)
        >>> family.sample(8, None).support.images.shape
        torch.Size([8, 5, 1, 14, 14])

    References:
        Lake, Salakhutdinov & Tenenbaum, Science 2015 (Omniglot); Finn, Abbeel & Levine, ICML 2017, section 5.2, for
        the setting.
    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        size: int = 20,
        channels: tuple[int, ...] = (16, 32),
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got split={split!r}")
        images = load_glyphs(size).images
        training = len(images) * 3 // 4
        bank = images[:training] if split == "train" else images[training:]
        super().__init__(bank, Conv(1, *channels, side=size, outputs=ways), ways, shots, queries)
