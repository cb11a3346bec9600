"""Times of day: the skies that places show, and the ambient light over a finished picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops

from iteris_sd.storybook.world.painting.brush import BILINEAR, RGB


@dataclass(frozen=True)
class Light:
    """One time of day: its words, its sky and its grade."""

    name: str
    phrase: str  # what captions say; empty if they say nothing
    top: RGB  # of the sky, before the grade
    bottom: RGB
    cloud: RGB
    own: float  # how much of a place's own daytime sky stays in the sky
    air: RGB  # what distant things fade into
    haze: float  # how far they fade
    mirror: float  # how far water takes on the sky's colours
    lit: RGB  # the grade: multiplied over the picture's upper left ...
    shaded: RGB  # ... and over its lower right
    lift: RGB = (0, 0, 0)  # the colour of the darkest shade
    vivid: float = 1.0  # how far colours are strengthened, so that tinted ones keep their names
    disc: RGB | None = None  # sun or moon, if one is to be seen
    size: float = 0.0  # its radius in picture widths
    low: float = 0.0  # 0: at the top of the sky, 1: at the skyline
    stars: int = 0
    lamps: bool = False  # whether lamps and windows glow


TIMES: dict[str, Light] = {
    t.name: t
    for t in (
        Light(
            "day",
            "",
            top=(122, 192, 244),
            bottom=(222, 240, 250),
            cloud=(255, 255, 255),
            own=1.0,
            air=(222, 240, 250),
            haze=0.0,
            mirror=0.0,
            lit=(255, 255, 255),
            shaded=(255, 255, 255),
        ),
        Light(
            "morning",
            "in the morning",
            top=(170, 206, 255),
            bottom=(255, 222, 206),
            cloud=(255, 240, 240),
            own=0.05,
            air=(250, 222, 220),
            haze=0.50,
            mirror=0.55,
            lit=(255, 250, 236),
            shaded=(255, 238, 232),
            lift=(30, 18, 22),
            vivid=1.14,
            disc=(255, 244, 196),
            size=0.085,
            low=0.62,
        ),
        Light(
            "sunset",
            "at sunset",
            top=(136, 98, 192),
            bottom=(255, 174, 98),
            cloud=(255, 188, 176),
            own=0.04,
            air=(204, 124, 152),
            haze=0.50,
            mirror=0.84,
            lit=(255, 238, 210),
            shaded=(244, 210, 216),
            lift=(14, 2, 14),
            vivid=1.18,
            disc=(255, 238, 150),
            size=0.135,
            low=0.88,
        ),
        Light(
            "night",
            "at night",
            top=(24, 38, 112),
            bottom=(92, 124, 190),
            cloud=(92, 116, 178),
            own=0.04,
            air=(70, 96, 168),
            haze=0.42,
            mirror=0.40,
            lit=(216, 211, 238),
            shaded=(168, 170, 210),
            lift=(4, 6, 18),
            vivid=1.22,
            disc=(255, 250, 214),
            size=0.085,
            low=0.24,
            stars=4,
            lamps=True,
        ),
    )
}


def graded(image: Image.Image, light: Light) -> Image.Image:
    """The picture under the ambient light of a time of day."""
    if light.name == "day":
        return image
    return ImageChops.multiply(image.convert("RGB", _matrix(light)), _veil(light, image.size))


@lru_cache(maxsize=16)
def _matrix(light: Light) -> tuple[float, ...]:
    """The part of the grade that is alike all over the picture: stronger colours, then a lifted shade."""
    rows: list[float] = []
    for channel, lift in enumerate(light.lift):
        keep = 1 - lift / 255
        shares = [keep * (1 - light.vivid) * v for v in (0.3, 0.59, 0.11)]
        shares[channel] += keep * light.vivid
        rows += [*shares, float(lift)]
    return tuple(rows)


@lru_cache(maxsize=16)
def _veil(light: Light, size: tuple[int, int]) -> Image.Image:
    """The tint of the light over the picture, falling off from the upper left to the lower right."""
    v = np.linspace(0, 1, 32)
    t = (0.35 * v[None, :] + 0.65 * v[:, None])[..., None]
    tint = np.asarray(light.lit) * (1 - t) + np.asarray(light.shaded) * t
    return Image.fromarray(tint.round().astype(np.uint8)).resize(size, BILINEAR)
