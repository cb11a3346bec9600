"""Painting styles: what may be done to a finished picture as a whole."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

_BICUBIC = Image.Resampling.BICUBIC
_PAPER = np.asarray((252, 249, 242), dtype=np.float32)


def watercolour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as a watercolour: thin uneven washes, pigment gathered at edges, a rough border of paper.

    A picture is taken as pigment on paper: what is multiplied is how far each colour is from the paper's.
    """
    k = image.width / 128
    pools, blooms, rough = (_clouded(rng, cells, image.size) for cells in (4, 9, 15))
    soft = image.filter(ImageFilter.GaussianBlur(0.55 * k))
    edges = _edges(soft, k)
    inside = _to_border(image.size) / k - 4.6 + 1.5 * blooms + 1.5 * rough
    painted = np.clip(inside / 1.6 + 0.5, 0, 1)
    rim = np.clip(1 - np.abs(inside - 1.4) / 2.2, 0, 1)
    density = (0.76 + 0.16 * pools + 0.12 * blooms + 0.34 * edges + 0.22 * rim) * painted
    pigment = _PAPER - np.asarray(soft, dtype=np.float32)
    washed = _PAPER - pigment * density[..., None]
    return Image.fromarray(np.clip(washed + 0.5, 0, 255).astype(np.uint8))


def _clouded(rng: np.random.Generator, cells: int, size: tuple[int, int]) -> np.ndarray:
    """Smooth random variation, about -1 to 1, with so many cells across the picture."""
    grey = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grey.resize(size, _BICUBIC))


def _edges(image: Image.Image, k: float) -> np.ndarray:
    """Where pigment gathers: the darker side of the edges of shapes, 0 to 1, softly."""
    grey = image.convert("L")
    wide = np.asarray(grey.filter(ImageFilter.GaussianBlur(2.2 * k)), dtype=np.float32)
    return np.clip((wide - np.asarray(grey, dtype=np.float32)) / 36 - 0.04, 0, 1)


@lru_cache(maxsize=4)
def _to_border(size: tuple[int, int]) -> np.ndarray:
    """The distance of each pixel to the border of the picture, rounded at the corners."""
    w, h = size
    x, y = np.arange(w) + 0.5, np.arange(h) + 0.5
    a, b = np.minimum(x, w - x)[None, :], np.minimum(y, h - y)[:, None]
    reach = 0.09 * w
    corner = reach - np.hypot(np.maximum(reach - a, 0), np.maximum(reach - b, 0))
    return np.minimum(np.minimum(a, b), corner).astype(np.float32)
