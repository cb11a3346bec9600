"""The brush every thing and place of the storybook world is painted with, its colours, light and patterns.

A painter works in its thing's own units: x is 0 in the middle, y is 0 on the ground and 1 at the top, both in
heights of the thing.  `Brush` turns these into pixels, mirrors them if asked, and lights each part from the
upper left.  Nothing here knows about captions, scenes or relations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Points = Sequence[Point]

INK: RGB = (38, 30, 34)
WHITE: RGB = (255, 255, 255)
NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR


# ---------------------------------------------------------------- colours


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """The colour a fraction `t` of the way from `a` to `b`."""
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def darker(c: RGB, t: float = 0.25) -> RGB:
    """`c` towards a warm near-black, so that shade never looks dirty grey."""
    return mix(c, (40, 24, 44), t)


def lighter(c: RGB, t: float = 0.25) -> RGB:
    """`c` towards a warm white."""
    return mix(c, (255, 252, 240), t)


def luma(c: RGB) -> float:
    """How bright `c` looks, 0 to 255."""
    return 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]


def contrast(c: RGB) -> RGB:
    """The colour of a pattern on `c`: dark on light things, light on dark ones."""
    return darker(c, 0.62) if luma(c) > 95 else lighter(c, 0.68)


@dataclass(frozen=True)
class Paint:
    """What a painter needs to know of a look: colours as numbers, and the names of its pattern and mark."""

    main: RGB
    accent: RGB
    pattern: str = "plain"
    mark: str | None = None


# ---------------------------------------------------------------- cached light, patterns and curves


@lru_cache(maxsize=4)
def _light(side: int = 64) -> Image.Image:
    """A grey tile, bright at the upper left and falling off to the lower right."""
    v = (np.arange(side) + 0.5) / side
    far = np.hypot(v[None, :] - 0.30, v[:, None] - 0.24)
    return Image.fromarray((255 * np.clip(1.0 - far / 0.88, 0, 1) ** 0.9).astype(np.uint8))


@lru_cache(maxsize=4)
def puff(side: int = 64) -> Image.Image:
    """A soft round blot, for shadows and glows."""
    v = (np.arange(side) + 0.5) / side * 2 - 1
    far = np.hypot(v[None, :], v[:, None])
    return Image.fromarray((255 * np.clip(1.15 * (1.0 - far), 0, 1) ** 0.8).astype(np.uint8))


_PATTERN_SIDE = 256  # covers 2 x 2 heights of a thing: 128 cells to a height


@lru_cache(maxsize=8)
def _pattern(kind: str) -> Image.Image:
    """A mask of the pattern over two heights of a thing each way, fixed to the thing's own frame."""
    v = (np.arange(_PATTERN_SIDE) + 0.5) / 128.0
    x, y = v[None, :] - 1.0, v[:, None]
    if kind == "striped":
        wave = np.sin(2 * math.pi * (y + 0.10 * x * x) / 0.17)
        grey = np.clip(wave * 4 + 0.3, 0, 1)
    elif kind == "spotted":
        step = 0.215
        row = np.floor(y / step)
        dx = (x + 0.5 * step * (row % 2) + 0.04) % step - step / 2
        dy = y % step - step / 2
        grey = np.clip((0.073 - np.hypot(dx, dy)) * 90 + 0.5, 0, 1)
    elif kind == "staves":
        grey = np.clip(np.cos(2 * math.pi * x / 0.30) * 6 + 0.5, 0, 1) * np.ones_like(y)
    else:  # checked
        step = 0.24
        grey = ((((x + 0.06) % step) < step / 2) * 0.5 + ((y % step) < step / 2) * 0.5) * np.ones_like(x + y)
    return Image.fromarray((255 * grey).astype(np.uint8))


@lru_cache(maxsize=2048)
def _spline(points: tuple[Point, ...], steps: int = 6) -> tuple[Point, ...]:
    """A smooth closed curve through `points` (Catmull-Rom); cached, as painters repeat their shapes."""
    p1 = np.asarray(points, dtype=float)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (p[:, None, :] for p in (p0, p1, p2, p3))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return tuple((float(x), float(y)) for x, y in curve.reshape(-1, 2))


@lru_cache(maxsize=512)
def oval_points(
    cx: float, cy: float, rx: float, ry: float, turn: float = 0.0, steps: int = 28
) -> tuple[Point, ...]:
    """An ellipse as points, turned by `turn` degrees counter-clockwise."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    out = []
    for k in range(steps):
        u, v = rx * math.cos(2 * math.pi * k / steps), ry * math.sin(2 * math.pi * k / steps)
        out.append((cx + u * c - v * s, cy + u * s + v * c))
    return tuple(out)


@lru_cache(maxsize=64)
def heart(cx: float, cy: float, r: float) -> tuple[Point, ...]:
    """A heart, about 2r wide."""
    out = []
    for k in range(32):
        t = 2 * math.pi * k / 32
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        out.append((cx + r * x / 16, cy + r * (y + 2) / 16))
    return tuple(out)


@lru_cache(maxsize=64)
def star(cx: float, cy: float, r: float, inner: float = 0.46) -> tuple[Point, ...]:
    """A five-pointed star, plump enough to read at a few pixels."""
    out = []
    for k in range(10):
        q = r if k % 2 == 0 else r * inner
        a = math.pi / 2 + math.pi * k / 5
        out.append((cx + q * math.cos(a), cy + q * math.sin(a)))
    return tuple(out)


# ---------------------------------------------------------------- the brush


class Brush:
    """Paints lit shapes, given in a thing's own units, on a picture."""

    def __init__(
        self, image: Image.Image, x: float, ground: float, height: float, flip: bool = False
    ) -> None:
        """A brush for one thing, its middle at `x`, its feet at `ground` and its height, all in pixels."""
        self.image, self.x, self.ground, self.height = image, x, ground, height
        self.sx = -height if flip else height
        self.pen = ImageDraw.Draw(image)

    def at(self, points: Points) -> list[Point]:
        """Own units to pixels."""
        x, g, sx, h = self.x, self.ground, self.sx, self.height
        return [(x + px * sx, g - py * h) for px, py in points]

    def shadow(
        self, half_width: float, depth: float = 0.09, strength: float = 0.55, dx: float = 0.05
    ) -> None:
        """The soft dark blot where the thing touches the ground; it leans right, away from the light."""
        w, h = 2 * half_width * self.height * 1.18, 2.6 * depth * self.height
        box = (round(self.x - w / 2 + dx * self.height), round(self.ground - h / 2))
        blot = puff().resize((max(2, round(w)), max(2, round(h))), BILINEAR)
        self.image.paste((34, 28, 58), box, blot.point(_fade(strength)))

    def form(self, points: Points, colour: RGB, paint: Paint | None = None, shade: float = 0.34) -> None:
        """A lit shape.  With `paint`, its pattern runs over it."""
        px = self.at(points)
        xs, ys = [p[0] for p in px], [p[1] for p in px]
        x0, y0 = math.floor(min(xs)), math.floor(min(ys))
        w, h = math.ceil(max(xs)) - x0 + 1, math.ceil(max(ys)) - y0 + 1
        mask = Image.new("L", (w, h))
        ImageDraw.Draw(mask).polygon([(a - x0, b - y0) for a, b in px], fill=255)
        glow = ImageChops.multiply(mask, _light().resize((w, h), BILINEAR))
        self._fill(mask, glow, (x0, y0), colour, shade)
        if paint is not None and paint.pattern != "plain":
            cut = self._pattern_cut(paint.pattern, x0, y0, w, h)
            self._fill(
                ImageChops.multiply(mask, cut),
                ImageChops.multiply(glow, cut),
                (x0, y0),
                contrast(colour),
                shade * 0.6,
            )

    def _fill(
        self, mask: Image.Image, glow: Image.Image, at: tuple[int, int], colour: RGB, shade: float
    ) -> None:
        self.image.paste(darker(colour, shade), at, mask)
        self.image.paste(lighter(colour, shade * 0.62), at, glow)

    def _pattern_cut(self, kind: str, x0: int, y0: int, w: int, h: int) -> Image.Image:
        """The part of the thing-wide pattern that lies under a tile, so that it runs on from part to part."""
        k = 128.0 / self.height
        left, top = (x0 - self.x) * k + 128.0, (y0 - self.ground) * k + 160.0
        return _pattern(kind).transform((w, h), Image.Transform.AFFINE, (k, 0, left, 0, k, top), NEAREST)

    def oval(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        colour: RGB,
        paint: Paint | None = None,
        turn: float = 0.0,
        shade: float = 0.34,
    ) -> None:
        """A lit ellipse."""
        self.form(oval_points(cx, cy, rx, ry, turn), colour, paint, shade)

    def blob(
        self, points: tuple[Point, ...], colour: RGB, paint: Paint | None = None, shade: float = 0.34
    ) -> None:
        """A lit smooth shape through `points`."""
        self.form(_spline(points), colour, paint, shade)

    def mirror_blob(
        self, points: tuple[Point, ...], colour: RGB, paint: Paint | None = None, shade: float = 0.34
    ) -> None:
        """The smooth shape and its mirror image: ears, arms, legs."""
        self.blob(points, colour, paint, shade)
        self.blob(tuple((-x, y) for x, y in points), colour, paint, shade)

    def flat(self, points: Points, colour: RGB) -> None:
        """An unlit polygon, for small details."""
        self.pen.polygon(self.at(points), fill=colour)

    def dot(self, cx: float, cy: float, rx: float, ry: float, colour: RGB) -> None:
        """An unlit ellipse."""
        (a, b), (c, d) = self.at(((cx - rx, cy + ry), (cx + rx, cy - ry)))
        self.pen.ellipse((min(a, c), b, max(a, c), d), fill=colour)

    def line(self, points: Points, colour: RGB, width: float) -> None:
        """A stroke with round joints."""
        self.pen.line(self.at(points), fill=colour, width=max(1, round(width * self.height)), joint="curve")

    def curve(self, a: Point, bend: Point, b: Point, colour: RGB, width: float) -> None:
        """A stroke from `a` to `b`, pulled towards `bend`."""
        pts = [
            (
                (1 - t) ** 2 * a[0] + 2 * t * (1 - t) * bend[0] + t * t * b[0],
                (1 - t) ** 2 * a[1] + 2 * t * (1 - t) * bend[1] + t * t * b[1],
            )
            for t in _TS
        ]
        self.line(pts, colour, width)


_TS = tuple(k / 10 for k in range(11))


@lru_cache(maxsize=64)
def _fade(strength: float) -> list[int]:
    return [round(v * strength) for v in range(256)]


def eye(b: Brush, x: float, y: float, r: float, iris: RGB = INK) -> None:
    """A round shiny eye."""
    b.dot(x, y, r, r * 1.12, iris)
    if iris != INK:
        b.dot(x, y, r * 0.5, r * 0.95, INK)
    b.dot(x - 0.3 * r, y + 0.42 * r, r * 0.36, r * 0.36, WHITE)


def eye_ring(colour: RGB) -> RGB:
    """A little lighter fur round the eyes of dark animals, or the eyes would drown."""
    return lighter(colour, 0.34) if luma(colour) < 95 else colour


Painter = Callable[[Brush, Paint], None]
