"""How the places of the storybook world are painted, at each time of day: everything behind the things.

Each painter uses `rng` alike at every time of day, so that the same place keeps its shapes from day to night.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from iteris_sd.storybook.world.painting.brush import (
    BILINEAR,
    RGB,
    Brush,
    Point,
    darker,
    lighter,
    mix,
    puff,
    star,
)
from iteris_sd.storybook.world.painting.light import Light

Background = Callable[[Image.Image, np.random.Generator, Light], None]

_GLOW: RGB = (255, 208, 120)
_LAMP: RGB = (255, 236, 150)


# ---------------------------------------------------------------- washes and shapes


def _jitter(c: RGB, rng: np.random.Generator, amount: int = 9) -> RGB:
    r, g, b = rng.integers(-amount, amount + 1, 3).tolist()
    return (min(255, max(0, c[0] + r)), min(255, max(0, c[1] + g)), min(255, max(0, c[2] + b)))


def _wash(image: Image.Image, x0: float, y0: float, x1: float, y1: float, a: RGB, c: RGB) -> None:
    """A vertical gradient over a box (fractions of the picture)."""
    w, h = image.size
    left, top, right, bottom = round(x0 * w), round(y0 * h), round(x1 * w), round(y1 * h)
    t = ((np.arange(16) + 0.5) / 16)[:, None]
    ramp = (np.asarray(a) * (1 - t) + np.asarray(c) * t).round().astype(np.uint8)[:, None, :]
    image.paste(Image.fromarray(ramp).resize((right - left, bottom - top), BILINEAR), (left, top))


def _band(image: Image.Image, top: float, bottom: float, a: RGB, c: RGB) -> None:
    """A vertical gradient across the picture between two heights."""
    _wash(image, 0, top, 1, bottom, a, c)


def _box(image: Image.Image, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
    """A plain rectangle (fractions of the picture)."""
    w, h = image.size
    image.paste(colour, (round(x0 * w), round(y0 * h), round(x1 * w), round(y1 * h)))


def _shape(image: Image.Image, points: Sequence[Point], colour: RGB) -> None:
    """A plain polygon (fractions of the picture)."""
    w, h = image.size
    ImageDraw.Draw(image).polygon([(x * w, y * h) for x, y in points], fill=colour)


def _round(image: Image.Image, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
    """A plain ellipse (fractions of the picture)."""
    w, h = image.size
    ImageDraw.Draw(image).ellipse(((x - rx) * w, (y - ry) * h, (x + rx) * w, (y + ry) * h), fill=colour)


def _soft(
    image: Image.Image, x: float, y: float, rx: float, ry: float, colour: RGB, strength: float = 1.0
) -> None:
    """A soft ellipse that fades out at its border (fractions of the picture)."""
    w, h = image.size
    size = (max(2, round(2 * rx * w)), max(2, round(2 * ry * h)))
    blot = puff() if strength >= 1 else puff().point([round(v * strength) for v in range(256)])
    image.paste(colour, (round((x - rx) * w), round((y - ry) * h)), blot.resize(size, BILINEAR))


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
    phase, bend = rng.uniform(0, 6.28), rng.uniform(0, 6.28)
    xs = np.linspace(0, 1, 33)
    ys = base - rise * (
        0.6 * np.sin(waves * xs * 6.28 + phase) + 0.4 * np.sin(0.6 * waves * xs * 6.28 + bend)
    )
    _shape(image, [(0, foot), *zip(xs.tolist(), ys.tolist(), strict=True), (1, foot)], colour)


def _wave(image: Image.Image, y: float, rise: float, phase: float, colour: RGB) -> None:
    """A gently curved line, filled down to the bottom of the picture."""
    xs = np.linspace(0, 1, 25)
    ys = y + rise * np.sin(7 * xs + phase)
    _shape(image, [(0, 1), *zip(xs.tolist(), ys.tolist(), strict=True), (1, 1)], colour)


# ---------------------------------------------------------------- skies


def _sky(
    image: Image.Image,
    rng: np.random.Generator,
    light: Light,
    to: float,
    top: RGB,
    bottom: RGB,
    skyline: float | None = None,
) -> float:
    """The sky down to `to`, with stars and sun or moon above the skyline; the middle of these is returned.

    `top` and `bottom` are the place's own colours by day.
    """
    u = rng.uniform(0, 1)
    spots = rng.uniform(0, 1, (4, 2)).tolist()
    _band(image, 0, to, mix(light.top, top, light.own), mix(light.bottom, bottom, light.own))
    x, y = 0.12 + 0.26 * u, 0.08 + light.low * ((to if skyline is None else skyline) - 0.08)
    deep = min(0.24, (to if skyline is None else skyline) - 0.13)
    pen, (w, h) = ImageDraw.Draw(image), image.size
    for k, (a, c) in enumerate(spots[: light.stars]):
        sx, sy = (k + 0.2 + 0.6 * a) / 4, 0.05 + deep * c
        if math.hypot(sx - x, sy - y) > 0.17:
            pen.polygon(
                [(sx * w + dx, sy * h - dy) for dx, dy in star(0, 0, 0.028 * w)], fill=(255, 248, 206)
            )
    if light.disc is not None:
        _disc(image, x, y, light.size, light.disc, crescent=light.stars > 0)
    return x


def _disc(image: Image.Image, x: float, y: float, size: float, colour: RGB, *, crescent: bool) -> None:
    """The sun with its soft glow, or the moon as a crescent."""
    reach = 2.6 * size
    _soft(image, x, y, reach, reach, colour, 0.34 if crescent else 0.62)
    if not crescent:
        _round(image, x, y, size, size, colour)
        return
    turns = [math.pi * k / 20 for k in range(21)]
    outer = [(-math.sin(t), math.cos(t)) for t in turns]
    inner = [(-0.30 * math.sin(t), math.cos(t)) for t in reversed(turns)]
    c, s = math.cos(-0.5), math.sin(-0.5)
    _shape(
        image,
        [(x + size * (0.4 + a * c - b * s), y + size * (a * s + b * c)) for a, b in outer + inner],
        colour,
    )


def _clouds(
    image: Image.Image, rng: np.random.Generator, light: Light, top: float, bottom: float, n: int
) -> None:
    """A few soft clouds, unless there are stars."""
    for _ in range(n):
        x, y, s = rng.uniform(0.05, 0.95), rng.uniform(top, bottom), rng.uniform(0.8, 1.2)
        if light.stars:
            continue
        for dx, dy, rx, ry in (
            (-0.07, 0.008, 0.08, 0.045),
            (0.0, -0.014, 0.09, 0.065),
            (0.08, 0.006, 0.085, 0.05),
        ):
            _soft(image, x + dx * s, y + dy * s, 1.25 * rx * s, 1.25 * ry * s, light.cloud)


def _far(colour: RGB, light: Light, near: float = 0.0) -> RGB:
    """A distant colour in the haze of the time of day; `near` is 0 at the horizon and 1 in front."""
    return mix(colour, light.air, light.haze * (1 - near))


def _water(
    image: Image.Image, light: Light, x: float, top: float, bottom: float, far: RGB, near: RGB
) -> None:
    """Still water that takes on the sky's colours, with the gleam of sun or moon below it."""
    _band(image, top, bottom, mix(far, light.bottom, light.mirror), mix(near, light.top, 0.8 * light.mirror))
    if light.disc is not None:
        deep = bottom - top
        _soft(image, x, top + 0.5 * deep, 1.5 * light.size, 0.55 * deep, light.disc, 0.6)


def _window(image: Image.Image, light: Light, x0: float, y0: float, x1: float, y1: float, frame: RGB) -> None:
    """A window of four panes on the sky of the time of day."""
    bar = 0.011
    _box(image, x0 - 0.022, y0 - 0.022, x1 + 0.022, y1 + 0.022, frame)
    _wash(image, x0, y0, x1, y1, light.top, light.bottom)
    if light.disc is not None:
        _disc_inside(image, light, x0, y0, x1, y1)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    _box(image, x - bar, y0, x + bar, y1, frame)
    _box(image, x0, y - bar, x1, y + bar, frame)
    _box(image, x0 - 0.035, y1 + 0.016, x1 + 0.035, y1 + 0.04, darker(frame, 0.12))


def _disc_inside(image: Image.Image, light: Light, x0: float, y0: float, x1: float, y1: float) -> None:
    """Sun or moon in one pane of a window."""
    if light.disc is None:
        return
    w, h = image.size
    box = (round(x0 * w), round(y0 * h), round(x1 * w), round(y1 * h))
    pane = image.crop(box)
    _disc(pane, 0.25, 0.12 + 0.64 * light.low, 1.6 * light.size, light.disc, crescent=light.stars > 0)
    image.paste(pane, box)


def _shine(image: Image.Image, light: Light, x: float, y: float, reach: float) -> None:
    """The glow of a lamp, if lamps are lit."""
    if light.lamps:
        _soft(image, x, y, reach, reach, _GLOW, 0.72)


# ---------------------------------------------------------------- out of doors


def beach(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """Sky, turquoise sea with a sail, foam, warm sand."""
    sea = 0.40 + rng.uniform(-0.025, 0.025)
    shore = sea + 0.17 + rng.uniform(-0.015, 0.02)
    middle = _sky(image, rng, light, sea, _jitter((110, 188, 240), rng), _jitter((214, 238, 250), rng, 5))
    _clouds(image, rng, light, 0.07, 0.24, 2)
    deep, shallow = _jitter((26, 132, 178), rng), _jitter((88, 206, 208), rng)
    _water(image, light, middle, sea, shore + 0.04, deep, shallow)
    x = rng.uniform(0.50, 0.90)
    _shape(image, [(x, sea - 0.12), (x, sea - 0.005), (x + 0.07, sea - 0.005)], (252, 250, 244))
    hull = [(x - 0.03, sea), (x + 0.07, sea), (x + 0.05, sea + 0.022), (x - 0.015, sea + 0.022)]
    _shape(image, hull, (190, 84, 60))
    phase = rng.uniform(0, 6.28)
    _wave(image, shore - 0.012, 0.012, phase, (246, 252, 250))
    _wave(image, shore + 0.012, 0.012, phase, _jitter((216, 186, 136), rng, 5))
    _wave(image, shore + 0.035, 0.012, phase, (238, 212, 160))
    _band(image, shore + 0.055, 1.0, (238, 212, 160), _jitter((226, 190, 128), rng, 7))


def meadow(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """Blue sky, rolling green hills, grass with a few flowers."""
    line = 0.50 + rng.uniform(-0.03, 0.03)
    high, low = _jitter((120, 196, 246), rng), _jitter((226, 244, 252), rng, 4)
    _sky(image, rng, light, line + 0.05, high, low, line - 0.06)
    _clouds(image, rng, light, 0.08, 0.28, 2)
    _hill(image, rng, line - 0.05, 0.045, 1.2, _far(_jitter((132, 196, 120), rng), light), line + 0.1)
    _hill(image, rng, line + 0.02, 0.03, 0.9, _far(_jitter((104, 182, 84), rng), light, 0.6), line + 0.15)
    grass = _jitter((122, 198, 84), rng)
    _band(image, line + 0.08, 1.0, grass, darker(grass, 0.22))
    for k, (u, v) in enumerate(rng.uniform(0, 1, (5, 2)).tolist()):
        x, y, r = (k + 0.15 + 0.7 * u) / 5, line + 0.14 + v * (0.82 - line), 0.015 + 0.007 * v
        petals = ((255, 255, 252), (255, 224, 96), (250, 172, 196))[k % 3]
        _round(image, x, y, r, 0.8 * r, petals)


def snow(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """A pale winter sky, snowy fir trees, white drifts and a few flakes."""
    line = 0.52 + rng.uniform(-0.03, 0.03)
    high, low = _jitter((146, 168, 206), rng, 7), _jitter((222, 228, 240), rng, 4)
    _sky(image, rng, light, line + 0.04, high, low, line - 0.08)
    _hill(image, rng, line - 0.06, 0.04, 1.1, _far(_jitter((206, 218, 238), rng, 4), light), line + 0.1)
    for k, u in enumerate(rng.uniform(0, 1, 4).tolist()):
        _fir(image, (k + 0.1 + 0.8 * u) / 4, line + 0.03, rng.uniform(0.24, 0.36), light)
    _hill(image, rng, line + 0.02, 0.018, 0.9, (238, 243, 250), 1.0)
    _band(image, line + 0.05, 1.0, (240, 245, 251), _jitter((206, 218, 236), rng, 4))
    for k, (u, v) in enumerate(rng.uniform(0, 1, (6, 2)).tolist()):
        r = 0.02
        _soft(image, (k + 0.1 + 0.8 * u) / 6, 0.04 + 0.42 * v, r, r, (255, 255, 255))


def _fir(image: Image.Image, x: float, foot: float, tall: float, light: Light) -> None:
    """A dark fir with snow on its tiers."""
    green = _far((62, 104, 100), light, 0.5)
    for k, (top, half) in enumerate(((0.45, 0.30), (0.72, 0.24), (1.0, 0.17))):
        y, tip = foot - 0.27 * k * tall, foot - top * tall
        _shape(image, [(x - half * tall, y), (x + half * tall, y), (x, tip)], green)
        cap = [
            (x - half * tall * 0.55, (y + tip) / 2 + 0.03 * tall),
            (x + half * tall * 0.5, (y + tip) / 2),
            (x, tip),
        ]
        _shape(image, cap, (236, 242, 250))


def mountains(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """Tall violet-grey peaks with snow caps over a stony upland."""
    line = 0.56 + rng.uniform(-0.025, 0.025)
    high, low = _jitter((132, 178, 226), rng), _jitter((246, 226, 212), rng, 5)
    _sky(image, rng, light, line, high, low, 0.26)
    far, near = _jitter((150, 150, 186), rng, 7), _jitter((104, 104, 140), rng, 8)
    shift = rng.uniform(-0.12, 0.12)
    for cx, top, half, c, close in (
        (0.10, 0.20, 0.34, far, 0.2),
        (0.90, 0.17, 0.36, far, 0.2),
        (0.50, 0.06, 0.42, near, 0.6),
    ):
        x, y = cx + shift + rng.uniform(-0.03, 0.03), top + rng.uniform(0, 0.05)
        _peak(image, x, y, half, line + 0.03, _far(c, light, close))
    ground = _jitter((172, 170, 116), rng, 8)
    _hill(image, rng, line - 0.005, 0.02, 1.2, darker(ground, 0.18), line + 0.1)
    _band(image, line + 0.04, 1.0, ground, darker(ground, 0.22))
    for k, (u, v) in enumerate(rng.uniform(0, 1, (4, 2)).tolist()):
        r = 0.024 + 0.018 * v
        x, y = (k + 0.1 + 0.8 * u) / 4, line + 0.08 + v * (0.88 - line)
        stone = Brush(image, x * image.width, y * image.height, 2 * r * image.height)
        stone.oval(0, 0, 0.5, 0.32, (162, 156, 154))


def _peak(image: Image.Image, x: float, top: float, half: float, foot: float, colour: RGB) -> None:
    """One peak: a lit and a shaded flank, and a ragged snow cap."""
    tall = foot - top
    _shape(image, [(x - half, foot), (x, top), (x + half, foot)], lighter(colour, 0.12))
    dark = [(x, top), (x + half, foot), (x - 0.12 * half, foot), (x + 0.1 * half, top + 0.55 * tall)]
    _shape(image, dark, darker(colour, 0.18))
    k = 0.36
    cap = [
        (x, top),
        (x + k * half, top + k * tall),
        (x + 0.17 * half, top + 0.28 * tall),
        (x + 0.02 * half, top + 0.44 * tall),
        (x - 0.15 * half, top + 0.29 * tall),
        (x - k * half, top + k * tall),
    ]
    _shape(image, cap, (248, 250, 254))
    _shape(image, [cap[0], cap[1], cap[2], (x + 0.02 * half, top + 0.42 * tall)], (212, 220, 238))


def forest(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """Round-crowned trees before a deep wood, two taller ones at the sides, and a mossy floor."""
    line = 0.55 + rng.uniform(-0.02, 0.02)
    high, low = _jitter((150, 208, 226), rng), _jitter((232, 244, 214), rng, 5)
    _sky(image, rng, light, line, high, low, 0.22)
    wood = _jitter((112, 166, 116), rng, 7)
    for k, u in enumerate(rng.uniform(-0.03, 0.03, 5).tolist()):
        _round(image, 0.25 * k + u, 0.33 + 0.5 * u, 0.16, 0.13, _far(wood, light, 0.2))
    _band(image, 0.34, line + 0.04, _far(wood, light, 0.2), _far(darker(wood, 0.34), light, 0.5))
    for k, u in enumerate(rng.uniform(-0.025, 0.025, 3).tolist()):
        _tree(image, 0.22 + 0.28 * k + u, line + 0.02, 0.42 + 2 * u, _far((96, 160, 90), light, 0.7))
    moss = _jitter((112, 154, 80), rng, 7)
    _hill(image, rng, line, 0.012, 1.3, darker(moss, 0.12), line + 0.1)
    _band(image, line + 0.03, 1.0, moss, darker(moss, 0.30))
    for x, tall in ((-0.03, 0.50), (0.97, 0.62)):
        crown = _jitter((66, 134, 78), rng, 8)
        _tree(image, x + rng.uniform(-0.02, 0.02), line + 0.055, tall, _far(crown, light, 0.85))
    for u, v in rng.uniform(0, 1, (2, 2)).tolist():
        _soft(image, u, line + 0.16 + 0.22 * v, 0.30, 0.08, lighter(moss, 0.10), 0.5)


def _tree(image: Image.Image, x: float, foot: float, tall: float, crown: RGB) -> None:
    """A tree with a trunk and a crown of three round tufts."""
    w, h = image.size
    b = Brush(image, x * w, foot * h, tall * h)
    b.form(((-0.075, 0.0), (-0.05, 0.5), (0.05, 0.5), (0.075, 0.0)), mix((122, 82, 56), crown, 0.15))
    b.oval(0.17, 0.60, 0.22, 0.20, darker(crown, 0.12), shade=0.26)
    b.oval(-0.17, 0.60, 0.22, 0.20, crown, shade=0.26)
    b.oval(0.0, 0.76, 0.26, 0.24, crown, shade=0.26)


def desert(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """A hot sky, red table mountains, orange dunes and two cacti far away."""
    line = 0.50 + rng.uniform(-0.025, 0.025)
    high, low = _jitter((92, 180, 220), rng), _jitter((255, 232, 186), rng, 5)
    middle = _sky(image, rng, light, line + 0.04, high, low, line - 0.04)
    if light.disc is None:
        _disc(image, middle, 0.14, 0.075, (255, 244, 190), crescent=False)
    rock = _jitter((206, 120, 92), rng, 7)
    for cx, top, half in ((0.80, 0.20, 0.15), (0.54, 0.13, 0.10)):
        _mesa(image, cx + rng.uniform(-0.06, 0.06), line + 0.05, top + 0.03, half, _far(rock, light, 0.3))
    sand = _jitter((238, 164, 96), rng, 7)
    _hill(image, rng, line, 0.035, 1.0, _far(darker(sand, 0.10), light, 0.6), line + 0.2)
    for x, tall in ((rng.uniform(0.09, 0.20), 0.25), (rng.uniform(0.80, 0.91), 0.20)):
        _cactus(image, x, line + 0.05, tall, _far((72, 140, 92), light, 0.7))
    bend = rng.uniform(-0.12, 0.12)
    _dune(image, 0.30 + bend, line + 0.035, 0.75, lighter(sand, 0.06), darker(sand, 0.16))
    _band(image, line + 0.13, 1.0, sand, darker(sand, 0.20))
    _soft(image, 0.55 - bend, line + 0.30, 0.62, 0.11, lighter(sand, 0.22), 0.5)


def _mesa(image: Image.Image, x: float, foot: float, tall: float, half: float, colour: RGB) -> None:
    """A flat-topped rock, its right side in shade."""
    top, wide = foot - tall, 1.28 * half
    outline = [(x - wide, foot), (x - half, top + 0.3 * tall), (x - 0.9 * half, top), (x + 0.9 * half, top)]
    _shape(image, [*outline, (x + half, top + 0.3 * tall), (x + wide, foot)], lighter(colour, 0.14))
    shade = [(x + 0.3 * half, top), (x + 0.9 * half, top), (x + half, top + 0.3 * tall), (x + wide, foot)]
    _shape(image, [*shade, (x + 0.42 * half, foot)], darker(colour, 0.12))


def _dune(image: Image.Image, x: float, top: float, half: float, lit: RGB, shaded: RGB) -> None:
    """A broad dune with a curved crest: lit on the left, shaded on the right."""
    us = [k / 16 for k in range(-16, 17)]
    line = [(x + u * half, top + 0.105 * (1 - math.cos(math.pi * u) / 2 - 0.5)) for u in us]
    foot = top + 0.11
    _shape(image, [*line, (x + half, foot), (x - half, foot)], lit)
    crest = [(x + 0.10 * math.sin(3 * v), top + 0.11 * v) for v in (0.25, 0.5, 0.75, 1.0)]
    _shape(image, [*line[16:], (x + half, foot), *reversed(crest)], shaded)


def _cactus(image: Image.Image, x: float, foot: float, tall: float, green: RGB) -> None:
    """A simple cactus: a round-topped column with two raised arms."""
    w, h = image.size
    b = Brush(image, x * w, foot * h, tall * h)
    for s, y, up in ((-1, 0.36, 0.66), (1, 0.46, 0.80)):
        b.line(((0.0, y), (s * 0.26, y), (s * 0.26, up)), darker(green, 0.10), 0.13)
        b.dot(s * 0.26, up, 0.065, 0.065, darker(green, 0.10))
        b.dot(s * 0.26, y, 0.065, 0.065, darker(green, 0.10))
    b.blob(
        ((-0.10, 0.0), (-0.11, 0.5), (-0.09, 0.9), (0.0, 1.0), (0.09, 0.9), (0.11, 0.5), (0.10, 0.0)), green
    )


def lake(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """Far hills over still water, reeds at the sides, a grassy bank in front."""
    shore = 0.36 + rng.uniform(-0.02, 0.02)
    bank = 0.60 + rng.uniform(-0.02, 0.015)
    high, low = _jitter((138, 190, 232), rng), _jitter((236, 240, 232), rng, 5)
    middle = _sky(image, rng, light, shore, high, low, shore - 0.07)
    _clouds(image, rng, light, 0.06, 0.14, 1)
    back, front = _far(_jitter((126, 164, 178), rng), light), _far(_jitter((86, 142, 116), rng), light, 0.4)
    _hill(image, rng, shore - 0.09, 0.05, 0.8, back, shore)
    _hill(image, rng, shore - 0.035, 0.03, 1.3, front, shore)
    blue, pale = _jitter((96, 160, 196), rng, 7), _jitter((142, 196, 220), rng, 7)
    _water(image, light, middle, shore, bank + 0.04, mix(front, blue, 0.35), pale)
    for k, u in enumerate(rng.uniform(0.15, 0.85, 2).tolist()):
        _round(image, u, shore + 0.09 + 0.07 * k, 0.16 + 0.04 * k, 0.010, mix(pale, light.bottom, 0.5))
    grass = _jitter((132, 174, 86), rng, 7)
    phase = rng.uniform(0, 6.28)
    _wave(image, bank, 0.014, phase, darker(grass, 0.30))
    _wave(image, bank + 0.022, 0.014, phase, grass)
    _band(image, bank + 0.05, 1.0, grass, darker(grass, 0.24))
    for x, n in ((0.05 + rng.uniform(-0.02, 0.02), 3), (0.93 + rng.uniform(-0.02, 0.02), 3)):
        for k in range(n):
            _reed(image, x + 0.055 * (k - 1), bank + 0.07, rng.uniform(0.24, 0.34), rng.uniform(-0.2, 0.2))


def _reed(image: Image.Image, x: float, foot: float, tall: float, lean: float) -> None:
    """A bulrush: a stout stalk with one leaf and a brown head."""
    w, h = image.size
    b = Brush(image, x * w, foot * h, tall * h)
    green: RGB = (92, 134, 70)
    b.flat(((-0.05, 0.0), (0.3 * lean - 0.14, 0.62), (0.05, 0.0)), lighter(green, 0.12))
    b.line(((0.0, 0.0), (0.35 * lean, 0.8)), green, 0.065)
    b.oval(0.42 * lean, 0.86, 0.065, 0.15, (132, 88, 58), turn=-12 * lean)


_FRONTS: tuple[RGB, ...] = (
    (222, 150, 122),
    (240, 216, 168),
    (158, 186, 164),
    (162, 180, 208),
    (226, 176, 176),
    (196, 176, 204),
)


def city(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """A row of house fronts across a street, and the near pavement."""
    w, h = image.size
    foot = 0.52 + rng.uniform(-0.015, 0.015)
    high, low = _jitter((134, 190, 236), rng), _jitter((238, 238, 236), rng, 5)
    _sky(image, rng, light, foot, high, low, 0.24)
    _clouds(image, rng, light, 0.05, 0.12, 1)
    fronts = rng.permutation(len(_FRONTS)).tolist()
    x = -rng.uniform(0.02, 0.14)
    for k in range(5):
        wide, top, gabled = rng.uniform(0.25, 0.29), rng.uniform(0.16, 0.27), k % 2 == 0
        lit = (rng.random(4) < 0.6).tolist()
        _house(
            image, light, (x, top, x + wide, foot), _far(_FRONTS[fronts[k]], light, 0.75), lit, gabled=gabled
        )
        x += wide
    stone, road = _jitter((206, 200, 196), rng, 5), _jitter((124, 124, 138), rng, 5)
    _box(image, 0, foot, 1, foot + 0.035, darker(stone, 0.08))
    _band(image, foot + 0.035, foot + 0.145, darker(road, 0.10), road)
    for k in range(4):
        u = (k + rng.uniform(0.2, 0.3)) / 3.6 - 0.05
        _box(image, u, foot + 0.08, u + 0.12, foot + 0.1, (226, 222, 214))
    _box(image, 0, foot + 0.145, 1, foot + 0.175, lighter(stone, 0.35))
    _band(image, foot + 0.175, 1.0, stone, darker(stone, 0.18))
    joint = darker(stone, 0.16)
    for k in range(-2, 3):
        a, b = 0.5 + 0.26 * k, 0.5 + 0.42 * k
        _shape(
            image,
            [(a - 0.007, foot + 0.175), (a + 0.007, foot + 0.175), (b + 0.012, 1), (b - 0.012, 1)],
            joint,
        )


def _house(
    image: Image.Image,
    light: Light,
    box: tuple[float, float, float, float],
    wall: RGB,
    lit: Sequence[bool],
    *,
    gabled: bool,
) -> None:
    """A house front with four windows and a door, under a gable or a flat roof."""
    x0, top, x1, foot = box
    wide, roof = x1 - x0, mix(darker(wall, 0.45), (140, 74, 66), 0.45)
    _wash(image, x0, top, x1, foot, lighter(wall, 0.12), darker(wall, 0.10))
    if gabled:
        _shape(image, [(x0, top), ((x0 + x1) / 2, top - 0.12), (x1, top)], roof)
    else:
        _box(image, x0, top - 0.03, x1, top + 0.015, roof)
    tall = 0.27 * (foot - top)
    for k in range(4):
        left, y = x0 + wide * (0.17, 0.58)[k % 2], top + (foot - top) * (0.13, 0.55)[k // 2]
        glass = mix(light.bottom, light.top, 0.7 - light.mirror)
        if light.lamps:
            glass = (255, 214, 96) if lit[k] else darker(light.top, 0.2)
        if k == 3:
            _box(image, left - 0.01, y, left + 0.25 * wide + 0.01, foot, darker(roof, 0.12))
            continue
        _box(
            image, left - 0.016, y - 0.016, left + 0.25 * wide + 0.016, y + tall + 0.016, lighter(wall, 0.55)
        )
        _box(image, left, y, left + 0.25 * wide, y + tall, glass)


# ---------------------------------------------------------------- indoors


def living_room(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """A warm wall with a window and a standing lamp, a wooden floor and a round rug."""
    line = 0.56 + rng.uniform(-0.025, 0.025)
    wall = _jitter((236, 204, 164), rng, 10)
    _band(image, 0, line, lighter(wall, 0.15), darker(wall, 0.08))
    x, y = rng.uniform(0.12, 0.40), rng.uniform(0.07, 0.12)
    _window(image, light, x, y, x + 0.26, y + 0.27, (250, 246, 238))
    for side in (-0.09, 0.27):
        cloth = Brush(image, (x + side + 0.04) * image.width, (y + 0.36) * image.height, 0.40 * image.height)
        cloth.form(((-0.10, 0.0), (-0.085, 1.0), (0.085, 1.0), (0.10, 0.0)), (202, 96, 86), shade=0.22)
    _box(image, 0, line - 0.03, 1, line, (250, 244, 232))
    floor = _jitter((184, 124, 76), rng, 8)
    _band(image, line, 1.0, floor, darker(floor, 0.15))
    for v in (0.16, 0.42, 0.74):
        yy = line + v * (1 - line)
        _box(image, 0, yy - 0.008, 1, yy + 0.008, darker(floor, 0.14))
    lamp = x + 0.50 + rng.uniform(0, 0.03)
    _shine(image, light, lamp, 0.24, 0.42)
    _standing_lamp(image, light, lamp, line + 0.02, 0.42)
    rug, cx = _jitter((112, 140, 176), rng, 12), 0.5 + rng.uniform(-0.05, 0.05)
    _round(image, cx, 0.835, 0.47, 0.155, rug)
    _round(image, cx, 0.835, 0.41, 0.13, lighter(rug, 0.25))


def _standing_lamp(image: Image.Image, light: Light, x: float, foot: float, tall: float) -> None:
    """A lamp on a stand, its shade alight when lamps are lit."""
    w, h = image.size
    b = Brush(image, x * w, foot * h, tall * h)
    b.line(((0.0, 0.0), (0.0, 0.72)), (122, 84, 66), 0.06)
    b.oval(0.0, 0.02, 0.15, 0.04, (122, 84, 66))
    shade = ((-0.21, 0.66), (-0.12, 1.0), (0.12, 1.0), (0.21, 0.66))
    b.form(shade, _LAMP if light.lamps else (246, 216, 150), shade=0.10 if light.lamps else 0.26)


def kitchen(image: Image.Image, rng: np.random.Generator, light: Light) -> None:
    """A tiled wall with a window and a shelf, cupboards under a worktop, a chequered floor."""
    line = 0.57 + rng.uniform(-0.02, 0.015)
    tile = _jitter((188, 222, 212), rng, 8)
    _band(image, 0, line, lighter(tile, 0.30), tile)
    for k in range(4):
        for j in range(k % 2, 8, 2):
            _box(image, 0.125 * j, 0.11 * k, 0.125 * (j + 1), 0.11 * (k + 1), lighter(tile, 0.16))
    left = rng.uniform() < 0.5
    x, s = (0.09, 0.61) if left else (0.63, 0.05)
    x, s = x + rng.uniform(-0.02, 0.02), s + rng.uniform(-0.02, 0.02)
    _window(image, light, x, 0.07, x + 0.28, 0.29, (252, 250, 246))
    wood = _jitter((190, 136, 92), rng, 7)
    jars = [_jitter(c, rng, 8) for c in ((232, 122, 96), (248, 206, 110), (120, 164, 204))]
    _box(image, s, 0.235, s + 0.34, 0.262, wood)
    for k, colour in enumerate(jars):
        tall = (0.10, 0.075, 0.09)[k]
        jar = Brush(image, (s + 0.065 + 0.105 * k) * image.width, 0.235 * image.height, tall * image.height)
        jar.form(((-0.40, 0.0), (-0.44, 0.8), (-0.36, 1.0), (0.36, 1.0), (0.44, 0.8), (0.40, 0.0)), colour)
    top = line - 0.155
    _box(image, 0, top + 0.035, 1, line, (250, 244, 230))
    for k in range(4):
        a = 0.25 * k
        _wash(image, a + 0.02, top + 0.055, a + 0.23, line - 0.025, (238, 226, 206), (228, 214, 194))
        _round(image, a + 0.125, top + 0.085, 0.016, 0.012, wood)
    _box(image, 0, top, 1, top + 0.036, wood)
    _box(image, 0, line - 0.018, 1, line, darker(wood, 0.35))
    _chequered(image, line, _jitter((242, 232, 216), rng, 5), _jitter((176, 190, 204), rng, 7))
    hang = (x + 0.28 + s) / 2 if left else (x + s + 0.34) / 2
    _shine(image, light, hang, 0.17, 0.40)
    lamp = Brush(image, hang * image.width, 0.17 * image.height, 0.17 * image.height)
    lamp.line(((0.0, 0.45), (0.0, 1.05)), (92, 88, 96), 0.09)
    if light.lamps:
        lamp.oval(0.0, 0.0, 0.24, 0.16, _LAMP, shade=0.05)
    lamp.blob(
        ((-0.46, 0.0), (-0.30, 0.36), (0.0, 0.52), (0.30, 0.36), (0.46, 0.0), (0.0, -0.02)), (224, 108, 92)
    )


def _chequered(image: Image.Image, line: float, pale: RGB, dark: RGB) -> None:
    """A floor of large squares, seen slightly from above."""
    _band(image, line, 1.0, darker(pale, 0.05), pale)
    rows = (0.0, 0.14, 0.33, 0.60, 1.0)
    for k in range(4):
        a, b = rows[k], rows[k + 1]
        y0, y1 = line + a * (1 - line), line + b * (1 - line)
        near, far = 0.16 + 0.12 * b, 0.16 + 0.12 * a
        for j in range(-4 + k % 2, 4, 2):
            left, right = 0.5 + j * far, 0.5 + (j + 1) * far
            corners = [(left, y0), (right, y0), (0.5 + (j + 1) * near, y1), (0.5 + j * near, y1)]
            _shape(image, corners, mix(darker(dark, 0.08), dark, b))
