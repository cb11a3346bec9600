"""How the places of the storybook world are painted: everything behind the things."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from iteris_sd.storybook.painting.brush import BILINEAR, RGB, darker, lighter, puff

Background = Callable[[Image.Image, np.random.Generator], None]


def _jitter(c: RGB, rng: np.random.Generator, amount: int = 9) -> RGB:
    r, g, b = rng.integers(-amount, amount + 1, 3).tolist()
    return (min(255, max(0, c[0] + r)), min(255, max(0, c[1] + g)), min(255, max(0, c[2] + b)))


def _band(image: Image.Image, top: float, bottom: float, a: RGB, c: RGB) -> None:
    """A vertical gradient across the picture between two heights (fractions of the picture)."""
    w, h = image.size
    y0, y1 = round(top * h), round(bottom * h)
    t = ((np.arange(16) + 0.5) / 16)[:, None]
    ramp = (np.asarray(a) * (1 - t) + np.asarray(c) * t).round().astype(np.uint8)[:, None, :]
    image.paste(Image.fromarray(ramp).resize((w, y1 - y0), BILINEAR), (0, y0))


def _hill(
    image: Image.Image,
    rng: np.random.Generator,
    base: float,
    rise: float,
    waves: float,
    colour: RGB,
    foot: float = 1.0,
) -> None:
    """A rolling line of hills, filled down to `foot`."""
    w, h = image.size
    phase, bend = rng.uniform(0, 6.28), rng.uniform(0, 6.28)
    xs = np.linspace(0, 1, 33)
    ys = base - rise * (
        0.6 * np.sin(waves * xs * 6.28 + phase) + 0.4 * np.sin(0.6 * waves * xs * 6.28 + bend)
    )
    pts = [(x * w, y * h) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
    ImageDraw.Draw(image).polygon([(0, foot * h), *pts, (w, foot * h)], fill=colour)


def _clouds(
    image: Image.Image, rng: np.random.Generator, top: float, bottom: float, colour: RGB, n: int
) -> None:
    """A few soft clouds."""
    w, h = image.size
    for _ in range(n):
        x, y, s = rng.uniform(0.05, 0.95) * w, rng.uniform(top, bottom) * h, rng.uniform(0.8, 1.2) * w
        for dx, dy, rx, ry in (
            (-0.07, 0.008, 0.08, 0.045),
            (0.0, -0.014, 0.09, 0.065),
            (0.08, 0.006, 0.085, 0.05),
        ):
            size = (round(2.5 * rx * s), round(2.5 * ry * s))
            box = (round(x + dx * s - size[0] / 2), round(y + dy * s - size[1] / 2))
            image.paste(colour, box, puff().resize(size, BILINEAR))


def beach(image: Image.Image, rng: np.random.Generator) -> None:
    """Sky, turquoise sea with a sail, foam, warm sand."""
    w, h = image.size
    sea = 0.40 + rng.uniform(-0.025, 0.025)
    shore = sea + 0.17 + rng.uniform(-0.015, 0.02)
    _band(image, 0, sea, _jitter((110, 188, 240), rng), _jitter((214, 238, 250), rng, 5))
    _clouds(image, rng, 0.07, 0.24, (250, 252, 255), 2)
    _band(image, sea, shore + 0.04, _jitter((26, 132, 178), rng), _jitter((88, 206, 208), rng))
    pen = ImageDraw.Draw(image)
    x = rng.uniform(0.06, 0.94) * w
    pen.polygon(
        [(x, (sea - 0.12) * h), (x, (sea - 0.005) * h), (x + 0.07 * w, (sea - 0.005) * h)],
        fill=(252, 250, 244),
    )
    pen.polygon(
        [
            (x - 0.03 * w, sea * h),
            (x + 0.07 * w, sea * h),
            (x + 0.05 * w, (sea + 0.022) * h),
            (x - 0.015 * w, (sea + 0.022) * h),
        ],
        fill=(190, 84, 60),
    )
    state = rng.uniform(0, 6.28)
    _wave(image, shore - 0.012, 0.012, state, (246, 252, 250))
    _wave(image, shore + 0.012, 0.012, state, _jitter((216, 186, 136), rng, 5))
    _wave(image, shore + 0.035, 0.012, state, (238, 212, 160))
    _band(image, shore + 0.055, 1.0, (238, 212, 160), _jitter((226, 190, 128), rng, 7))


def _wave(image: Image.Image, y: float, rise: float, phase: float, colour: RGB) -> None:
    w, h = image.size
    xs = np.linspace(0, 1, 25)
    ys = y + rise * np.sin(7 * xs + phase)
    pts = [(a * w, c * h) for a, c in zip(xs.tolist(), ys.tolist(), strict=True)]
    ImageDraw.Draw(image).polygon([(0, h), *pts, (w, h)], fill=colour)


def meadow(image: Image.Image, rng: np.random.Generator) -> None:
    """Blue sky, rolling green hills, grass with small flowers."""
    w, h = image.size
    line = 0.50 + rng.uniform(-0.03, 0.03)
    _band(image, 0, line + 0.05, _jitter((120, 196, 246), rng), _jitter((226, 244, 252), rng, 4))
    _clouds(image, rng, 0.08, 0.28, (255, 255, 255), 2)
    _hill(image, rng, line - 0.05, 0.045, 1.2, _jitter((132, 196, 120), rng), line + 0.1)
    _hill(image, rng, line + 0.02, 0.03, 0.9, _jitter((104, 182, 84), rng), line + 0.15)
    grass = _jitter((122, 198, 84), rng)
    _band(image, line + 0.08, 1.0, grass, darker(grass, 0.22))
    pen = ImageDraw.Draw(image)
    spots = rng.uniform(0, 1, (12, 2)).tolist()
    for k, (u, v) in enumerate(spots):
        x, y, r = u * w, (line + 0.14 + v * (0.84 - line)) * h, 0.009 * w * (0.8 + 0.7 * v)
        colour = ((255, 255, 255), (255, 226, 90), (248, 158, 186))[k % 3]
        pen.ellipse((x - r, y - r * 0.8, x + r, y + r * 0.8), fill=colour)


def snow(image: Image.Image, rng: np.random.Generator) -> None:
    """A pale winter sky, snowy fir trees, white drifts and a few flakes."""
    w, h = image.size
    line = 0.52 + rng.uniform(-0.03, 0.03)
    _band(image, 0, line + 0.04, _jitter((146, 168, 206), rng, 7), _jitter((222, 228, 240), rng, 4))
    _hill(image, rng, line - 0.06, 0.04, 1.1, _jitter((206, 218, 238), rng, 4), line + 0.1)
    for u in rng.uniform(0, 1, 4).tolist():
        _fir(image, u * w, (line + 0.03) * h, rng.uniform(0.20, 0.30) * h)
    _hill(image, rng, line + 0.02, 0.018, 0.9, (238, 243, 250), 1.0)
    _band(image, line + 0.05, 1.0, (240, 245, 251), _jitter((206, 218, 236), rng, 4))
    pen = ImageDraw.Draw(image)
    for u, v in rng.uniform(0, 1, (14, 2)).tolist():
        r = 0.009 * w
        pen.ellipse((u * w - r, v * 0.55 * h - r, u * w + r, v * 0.55 * h + r), fill=(252, 253, 255))


def _fir(image: Image.Image, x: float, foot: float, tall: float) -> None:
    """A dark fir with snow on its tiers."""
    pen = ImageDraw.Draw(image)
    for k, (top, half) in enumerate(((0.45, 0.30), (0.72, 0.24), (1.0, 0.17))):
        y = foot - (k * 0.27) * tall
        tip = foot - top * tall
        pen.polygon([(x - half * tall, y), (x + half * tall, y), (x, tip)], fill=(62, 104, 100))
        pen.polygon(
            [
                (x - half * tall * 0.55, (y + tip) / 2 + 0.03 * tall),
                (x + half * tall * 0.5, (y + tip) / 2),
                (x, tip),
            ],
            fill=(236, 242, 250),
        )


def living_room(image: Image.Image, rng: np.random.Generator) -> None:
    """A warm wall with a window and a lamp, a wooden floor and a round rug."""
    w, h = image.size
    line = 0.56 + rng.uniform(-0.025, 0.025)
    wall = _jitter((236, 204, 164), rng, 10)
    _band(image, 0, line, lighter(wall, 0.15), darker(wall, 0.08))
    pen = ImageDraw.Draw(image)
    x, y = rng.uniform(0.12, 0.52) * w, rng.uniform(0.07, 0.12) * h
    pen.rectangle((x - 0.02 * w, y - 0.02 * h, x + 0.28 * w, y + 0.29 * h), fill=(250, 246, 238))
    pen.rectangle((x, y, x + 0.26 * w, y + 0.27 * h), fill=_jitter((150, 206, 240), rng, 8))
    pen.rectangle((x + 0.12 * w, y, x + 0.14 * w, y + 0.27 * h), fill=(250, 246, 238))
    pen.rectangle((x, y + 0.125 * h, x + 0.26 * w, y + 0.145 * h), fill=(250, 246, 238))
    for side in (-0.08, 0.27):
        pen.rectangle((x + side * w, y - 0.03 * h, x + (side + 0.07) * w, y + 0.36 * h), fill=(196, 92, 84))
    pen.rectangle((0, (line - 0.03) * h, w, line * h), fill=(250, 244, 232))
    floor = _jitter((184, 124, 76), rng, 8)
    _band(image, line, 1.0, floor, darker(floor, 0.15))
    for v in (0.16, 0.42, 0.74):
        yy = (line + v * (1 - line)) * h
        pen.line((0, yy, w, yy), fill=darker(floor, 0.22), width=2)
    rug, cx = _jitter((112, 140, 176), rng, 12), (0.5 + rng.uniform(-0.05, 0.05)) * w
    pen.ellipse((cx - 0.47 * w, 0.68 * h, cx + 0.47 * w, 0.99 * h), fill=rug)
    pen.ellipse((cx - 0.41 * w, 0.705 * h, cx + 0.41 * w, 0.965 * h), fill=lighter(rug, 0.25))


def mountains(image: Image.Image, rng: np.random.Generator) -> None:
    """Tall violet-grey peaks with snow caps over a stony upland."""
    w, h = image.size
    line = 0.56 + rng.uniform(-0.025, 0.025)
    _band(image, 0, line, _jitter((132, 178, 226), rng), _jitter((246, 226, 212), rng, 5))
    far, near = _jitter((150, 150, 186), rng, 7), _jitter((104, 104, 140), rng, 8)
    shift = rng.uniform(-0.12, 0.12)
    for cx, top, half, c in ((0.10, 0.20, 0.34, far), (0.90, 0.17, 0.36, far), (0.50, 0.06, 0.42, near)):
        _peak(
            image,
            (cx + shift + rng.uniform(-0.03, 0.03)) * w,
            (top + rng.uniform(0, 0.05)) * h,
            half * w,
            (line + 0.03) * h,
            c,
        )
    ground = _jitter((172, 170, 116), rng, 8)
    _hill(image, rng, line - 0.005, 0.02, 1.2, darker(ground, 0.18), line + 0.1)
    _band(image, line + 0.04, 1.0, ground, darker(ground, 0.22))
    pen = ImageDraw.Draw(image)
    for u, v in rng.uniform(0, 1, (5, 2)).tolist():
        x, y, r = u * w, (line + 0.08 + v * (0.9 - line)) * h, (0.018 + 0.018 * v) * w
        pen.ellipse((x - r, y - 0.6 * r, x + r, y + 0.6 * r), fill=(140, 134, 134))
        pen.ellipse((x - r, y - 0.6 * r, x + 0.5 * r, y + 0.2 * r), fill=(180, 174, 170))


def _peak(image: Image.Image, x: float, top: float, half: float, foot: float, colour: RGB) -> None:
    """One peak: a lit and a shaded flank, and a ragged snow cap."""
    pen = ImageDraw.Draw(image)
    tall = foot - top
    pen.polygon([(x - half, foot), (x, top), (x + half, foot)], fill=lighter(colour, 0.12))
    pen.polygon(
        [(x, top), (x + half, foot), (x - 0.12 * half, foot), (x + 0.1 * half, top + 0.55 * tall)],
        fill=darker(colour, 0.18),
    )
    k = 0.36
    cap = [
        (x, top),
        (x + k * half, top + k * tall),
        (x + 0.17 * half, top + 0.28 * tall),
        (x + 0.02 * half, top + 0.44 * tall),
        (x - 0.15 * half, top + 0.29 * tall),
        (x - k * half, top + k * tall),
    ]
    pen.polygon(cap, fill=(248, 250, 254))
    pen.polygon([(x, top), cap[1], cap[2], (x + 0.02 * half, top + 0.42 * tall)], fill=(212, 220, 238))
