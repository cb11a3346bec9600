"""How every thing and every background of the storybook world is painted, stroke by stroke.

A painter works in its thing's own units: x is 0 in the middle, y is 0 on the ground and 1 at the top, both in
heights of the thing.  `Brush` turns these into pixels, mirrors them if asked, and lights each part from the
upper left.  Nothing here knows about captions, scenes or relations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Points = Sequence[Point]

INK: RGB = (38, 30, 34)
WHITE: RGB = (255, 255, 255)
_NEAREST, _BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR


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
def _puff(side: int = 64) -> Image.Image:
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
def _oval(
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
        puff = _puff().resize((max(2, round(w)), max(2, round(h))), _BILINEAR)
        self.image.paste((34, 28, 58), box, puff.point(_fade(strength)))

    def form(self, points: Points, colour: RGB, paint: Paint | None = None, shade: float = 0.34) -> None:
        """A lit shape.  With `paint`, its pattern runs over it."""
        px = self.at(points)
        xs, ys = [p[0] for p in px], [p[1] for p in px]
        x0, y0 = math.floor(min(xs)), math.floor(min(ys))
        w, h = math.ceil(max(xs)) - x0 + 1, math.ceil(max(ys)) - y0 + 1
        mask = Image.new("L", (w, h))
        ImageDraw.Draw(mask).polygon([(a - x0, b - y0) for a, b in px], fill=255)
        glow = ImageChops.multiply(mask, _light().resize((w, h), _BILINEAR))
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
        return _pattern(kind).transform((w, h), Image.Transform.AFFINE, (k, 0, left, 0, k, top), _NEAREST)

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
        self.form(_oval(cx, cy, rx, ry, turn), colour, paint, shade)

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


def _eye(b: Brush, x: float, y: float, r: float, iris: RGB = INK) -> None:
    """A round shiny eye."""
    b.dot(x, y, r, r * 1.12, iris)
    if iris != INK:
        b.dot(x, y, r * 0.5, r * 0.95, INK)
    b.dot(x - 0.3 * r, y + 0.42 * r, r * 0.36, r * 0.36, WHITE)


def _eye_ring(colour: RGB) -> RGB:
    """A little lighter fur round the eyes of dark animals, or the eyes would drown."""
    return lighter(colour, 0.34) if luma(colour) < 95 else colour


# ---------------------------------------------------------------- things

Painter = Callable[[Brush, Paint], None]


def dog(b: Brush, p: Paint) -> None:
    """A sitting dog, floppy ears, seen from the front."""
    fur, pale = p.main, lighter(p.main, 0.55)
    ear = p.accent
    b.shadow(0.36)
    b.blob(((0.22, 0.10), (0.40, 0.16), (0.50, 0.36), (0.46, 0.40), (0.37, 0.26), (0.22, 0.20)), fur, p)
    b.mirror_blob(((0.16, 0.0), (0.36, 0.02), (0.37, 0.17), (0.25, 0.28), (0.13, 0.20)), fur, p)
    b.blob(
        (
            (-0.19, 0.06),
            (-0.25, 0.28),
            (-0.20, 0.54),
            (0.0, 0.62),
            (0.20, 0.54),
            (0.25, 0.28),
            (0.19, 0.06),
            (0.0, 0.03),
        ),
        fur,
        p,
    )
    b.oval(0, 0.38, 0.13, 0.18, pale, shade=0.2)
    b.mirror_blob(
        ((0.03, 0.02), (0.02, 0.20), (0.05, 0.36), (0.15, 0.36), (0.17, 0.18), (0.17, 0.02)), fur, shade=0.26
    )
    b.oval(-0.11, 0.035, 0.10, 0.05, pale, shade=0.2)
    b.oval(0.11, 0.035, 0.10, 0.05, pale, shade=0.2)
    if p.mark == "heart and bandana":
        b.form(heart(0, 0.26, 0.19), (112, 58, 28), shade=0.15)
        b.form(((-0.25, 0.58), (0.25, 0.58), (0.15, 0.47), (0.0, 0.36), (-0.15, 0.47)), p.accent, shade=0.2)
        ear = (112, 58, 28)
    b.oval(0, 0.745, 0.265, 0.235, fur, p)
    b.mirror_blob(((0.14, 0.94), (0.28, 0.90), (0.37, 0.68), (0.36, 0.53), (0.27, 0.52), (0.22, 0.68)), ear)
    for s in (-1, 1):
        b.dot(s * 0.105, 0.795, 0.066, 0.07, _eye_ring(fur))
        _eye(b, s * 0.105, 0.79, 0.043)
    b.oval(0, 0.655, 0.155, 0.115, pale, shade=0.18)
    b.dot(0, 0.60, 0.042, 0.048, (232, 110, 120))
    b.curve((-0.10, 0.645), (-0.05, 0.595), (0, 0.655), INK, 0.02)
    b.curve((0.10, 0.645), (0.05, 0.595), (0, 0.655), INK, 0.02)
    b.oval(0, 0.71, 0.066, 0.048, INK, shade=0.25)


def cat(b: Brush, p: Paint) -> None:
    """A sitting cat with pointed ears, whiskers and its tail curled up beside it."""
    fur, pale = p.main, lighter(p.main, 0.62)
    marked = p.mark == "star"
    point = p.accent if marked else fur
    b.shadow(0.36, dx=0.08)
    b.blob(
        (
            (0.10, 0.02),
            (0.34, 0.02),
            (0.48, 0.14),
            (0.50, 0.34),
            (0.42, 0.47),
            (0.33, 0.48),
            (0.32, 0.41),
            (0.38, 0.38),
            (0.40, 0.26),
            (0.35, 0.15),
            (0.12, 0.12),
        ),
        point,
        None if marked else p,
    )
    b.blob(
        (
            (-0.22, 0.02),
            (-0.28, 0.16),
            (-0.20, 0.42),
            (-0.12, 0.60),
            (0.12, 0.60),
            (0.20, 0.42),
            (0.28, 0.16),
            (0.22, 0.02),
        ),
        fur,
        p,
    )
    b.oval(0, 0.40, 0.11, 0.17, pale, shade=0.16)
    b.mirror_blob(
        ((0.02, 0.01), (0.02, 0.20), (0.05, 0.33), (0.12, 0.33), (0.14, 0.18), (0.14, 0.01)), fur, shade=0.24
    )
    b.oval(-0.085, 0.03, 0.085, 0.042, pale, shade=0.2)
    b.oval(0.085, 0.03, 0.085, 0.042, pale, shade=0.2)
    if marked:
        b.form(star(0, 0.31, 0.21), (255, 255, 252), shade=0.06)
    for s in (-1, 1):
        b.form(((s * 0.05, 0.84), (s * 0.255, 1.0), (s * 0.275, 0.70)), point)
        b.flat(((s * 0.12, 0.85), (s * 0.225, 0.945), (s * 0.235, 0.78)), mix(point, (244, 150, 160), 0.72))
    b.blob(
        (
            (0.0, 0.905),
            (0.17, 0.88),
            (0.27, 0.74),
            (0.31, 0.62),
            (0.18, 0.54),
            (0.0, 0.515),
            (-0.18, 0.54),
            (-0.31, 0.62),
            (-0.27, 0.74),
            (-0.17, 0.88),
        ),
        fur,
        p,
    )
    b.oval(-0.06, 0.605, 0.085, 0.062, pale, shade=0.12)
    b.oval(0.06, 0.605, 0.085, 0.062, pale, shade=0.12)
    for s in (-1, 1):
        _eye(b, s * 0.125, 0.735, 0.062, (150, 205, 70))
        for dy in (0.035, -0.025):
            b.line(((s * 0.12, 0.615 + dy * 0.3), (s * 0.40, 0.63 + dy * 1.6)), _whisker(fur), 0.014)
    b.flat(((-0.042, 0.672), (0.042, 0.672), (0, 0.628)), (228, 110, 122))
    b.curve((-0.07, 0.60), (-0.03, 0.57), (0, 0.625), INK, 0.016)
    b.curve((0.07, 0.60), (0.03, 0.57), (0, 0.625), INK, 0.016)


def _whisker(fur: RGB) -> RGB:
    return (250, 248, 240) if luma(fur) < 150 else (96, 84, 84)


def teddybear(b: Brush, p: Paint) -> None:
    """A seated teddy bear, arms out, the soles of its feet towards us."""
    plush, pale = p.main, lighter(p.main, 0.58)
    if luma(plush) > 205:
        pale = (236, 206, 170)
    b.shadow(0.42)
    for s in (-1, 1):
        b.oval(s * 0.205, 0.91, 0.105, 0.10, plush)
        b.oval(s * 0.205, 0.905, 0.06, 0.058, pale, shade=0.15)
    b.oval(0, 0.34, 0.255, 0.27, plush, p)
    b.oval(0, 0.32, 0.165, 0.18, pale, shade=0.18)
    if p.mark == "bow and heart":
        b.form(heart(0, 0.30, 0.16), p.accent, shade=0.15)
    for s in (-1, 1):
        b.oval(s * 0.315, 0.40, 0.10, 0.185, plush, p, turn=s * 28)
        b.oval(s * 0.275, 0.125, 0.15, 0.135, plush, p)
        b.oval(s * 0.29, 0.115, 0.09, 0.085, pale, shade=0.15)
    b.oval(0, 0.745, 0.27, 0.235, plush, p)
    b.oval(0, 0.665, 0.135, 0.105, pale, shade=0.18)
    for s in (-1, 1):
        b.dot(s * 0.115, 0.785, 0.06, 0.06, _eye_ring(plush))
        _eye(b, s * 0.115, 0.785, 0.04)
    b.curve((-0.065, 0.635), (0, 0.575), (0.065, 0.635), INK, 0.018)
    b.line(((0, 0.69), (0, 0.61)), INK, 0.016)
    b.oval(0, 0.70, 0.055, 0.04, INK, shade=0.25)
    if p.mark == "bow and heart":
        for s in (-1, 1):
            b.blob(
                ((0.0, 0.52), (s * 0.16, 0.62), (s * 0.27, 0.60), (s * 0.27, 0.42), (s * 0.16, 0.41)),
                p.accent,
            )
        b.oval(0, 0.515, 0.06, 0.065, darker(p.accent, 0.15))


def tortoise(b: Brush, p: Paint) -> None:
    """A plush tortoise from the side: a big panelled dome of a shell, the head at its left turned to us."""
    skin: RGB = (206, 212, 132)
    shell, seam = p.main, darker(p.main, 0.5)
    if luma(shell) < 80:
        seam = lighter(shell, 0.5)
    b.shadow(0.78, 0.10)
    b.blob(((0.62, 0.22), (0.86, 0.14), (0.70, 0.34)), skin)
    for x in (-0.30, 0.52):
        b.blob(((x - 0.14, 0.02), (x - 0.16, 0.26), (x + 0.16, 0.26), (x + 0.16, 0.02), (x, -0.02)), skin)
    b.blob(((-0.42, 0.14), (-0.72, 0.30), (-0.72, 0.52), (-0.42, 0.42)), skin)
    b.form(_DOME, shell, p, shade=0.4)
    if p.pattern == "plain" and p.mark is None:
        b.line(_HEX + _HEX[:1], seam, 0.03)
        for a, c in zip(_HEX, _HEX_OUT, strict=True):
            b.line((a, c), seam, 0.03)
    if p.mark == "dots":
        for x, y, r in ((0.10, 0.76, 0.155), (-0.27, 0.50, 0.15), (0.46, 0.50, 0.15), (0.10, 0.38, 0.13)):
            b.oval(x, y, r, r, p.accent, shade=0.12)
    b.blob(
        ((-0.52, 0.25), (0.10, 0.27), (0.72, 0.25), (0.76, 0.17), (0.10, 0.10), (-0.56, 0.17)),
        mix(lighter(shell, 0.35), skin, 0.3),
    )
    b.oval(-0.74, 0.58, 0.25, 0.235, skin)
    for s in (-1, 1):
        _eye(b, -0.76 + s * 0.105, 0.635, 0.058)
        b.dot(-0.76 + s * 0.165, 0.525, 0.04, 0.03, (240, 150, 130))
    b.curve((-0.85, 0.53), (-0.76, 0.43), (-0.67, 0.53), INK, 0.024)


_DOME: tuple[Point, ...] = tuple(
    (0.10 + 0.62 * math.cos(math.pi * k / 20), 0.17 + 0.82 * math.sin(math.pi * k / 20) ** 0.92)
    for k in range(21)
)
_HEX: tuple[Point, ...] = (
    (-0.06, 0.82),
    (0.26, 0.82),
    (0.38, 0.58),
    (0.26, 0.36),
    (-0.06, 0.36),
    (-0.18, 0.58),
)
_HEX_OUT: tuple[Point, ...] = (
    (-0.12, 0.93),
    (0.32, 0.93),
    (0.66, 0.60),
    (0.34, 0.18),
    (-0.14, 0.18),
    (-0.46, 0.60),
)


def flower(b: Brush, p: Paint) -> None:
    """One big bloom on a stem with two leaves."""
    leaf: RGB = (70, 150, 62)
    b.shadow(0.20, 0.07)
    b.line(((0.0, 0.0), (0.015, 0.2), (0.0, 0.55)), darker(leaf, 0.15), 0.055)
    b.blob(((0.0, 0.06), (0.14, 0.22), (0.36, 0.30), (0.30, 0.14), (0.14, 0.05)), leaf)
    b.blob(((0.0, 0.10), (-0.12, 0.28), (-0.35, 0.36), (-0.30, 0.18), (-0.14, 0.09)), leaf)
    two_tone = p.mark == "face"
    for k in range(8):
        a = math.radians(45 * k + 22.5)
        colour = p.accent if two_tone and k % 2 else p.main
        b.oval(
            round(0.205 * math.cos(a), 4),
            round(0.67 + 0.205 * math.sin(a), 4),
            0.145,
            0.10,
            colour,
            p,
            turn=45 * k + 22.5,
            shade=0.24,
        )
    heart_of: RGB = (246, 190, 48) if not _yellowish(p.main) else (150, 84, 36)
    if two_tone:
        b.oval(0, 0.67, 0.185, 0.185, (255, 222, 92), shade=0.16)
        for s in (-1, 1):
            _eye(b, s * 0.07, 0.71, 0.034)
        b.curve((-0.095, 0.64), (0, 0.53), (0.095, 0.64), INK, 0.028)
    else:
        b.oval(0, 0.67, 0.125, 0.125, heart_of, shade=0.3)


def _yellowish(c: RGB) -> bool:
    return c[0] > 215 and c[1] > 150 and c[2] < 110


def wooden_pot(b: Brush, p: Paint) -> None:
    """A barrel-like planter of staves held by two metal hoops, earth in its mouth."""
    wood, hoop = p.main, (150, 150, 160)
    b.shadow(0.50, 0.10)
    # Stripes on a barrel are painted staves; spots go over smooth wood, or staves and spots would fight.
    b.form(_POT, wood, replace(p, pattern="staves") if p.pattern == "striped" else p, shade=0.4)
    gap = darker(wood, 0.36) if luma(wood) > 60 else lighter(wood, 0.22)
    for k in (-2, -1, 0, 1, 2) if p.pattern == "plain" else ():
        u = math.sin(k * 0.44)
        b.curve(
            (0.53 * u, 0.88 - 0.12 * math.cos(k * 0.5)),
            (0.56 * u, 0.4),
            (0.41 * u, -0.05 + 0.012 * k * k),
            gap,
            0.022,
        )
    for top, half in ((0.60, 0.525), (0.24, 0.475)):
        b.blob(
            (
                (-half, top + 0.05),
                (0, top - 0.045),
                (half, top + 0.05),
                (half, top - 0.035),
                (0, top - 0.13),
                (-half, top - 0.035),
            ),
            hoop,
            shade=0.42,
        )
    if p.mark == "star":
        b.form(star(0, 0.39, 0.31), (255, 255, 252), shade=0.08)
    b.oval(0, POT_RIM_Y, POT_RIM_RX + 0.05, POT_RIM_RY + 0.035, lighter(wood, 0.2))
    b.oval(0, POT_RIM_Y - 0.005, POT_RIM_RX - 0.03, POT_RIM_RY - 0.02, (72, 46, 32), shade=0.3)


POT_RIM_Y, POT_RIM_RX, POT_RIM_RY = 0.86, 0.50, 0.105
_POT: tuple[Point, ...] = (
    (-0.53, 0.86),
    (-0.545, 0.62),
    (-0.51, 0.3),
    (-0.42, 0.02),
    (-0.25, -0.03),
    (0.0, -0.05),
    (0.25, -0.03),
    (0.42, 0.02),
    (0.51, 0.3),
    (0.545, 0.62),
    (0.53, 0.86),
)


def pot_front(b: Brush) -> list[Point]:
    """The part of a pot (and of all below it) that hides what stands in it, in pixels."""
    ry, rx = POT_RIM_RY - 0.02, POT_RIM_RX - 0.03
    arc = [
        (rx * math.cos(math.pi * (1 + k / 16)), POT_RIM_Y - 0.005 + ry * math.sin(math.pi * (1 + k / 16)))
        for k in range(17)
    ]
    rim = [(-0.62, POT_RIM_Y), (-0.56, POT_RIM_Y), *arc, (0.56, POT_RIM_Y), (0.62, POT_RIM_Y)]
    return b.at([(-2.0, POT_RIM_Y), *rim, (2.0, POT_RIM_Y), (2.0, -0.6), (-2.0, -0.6)])


def barn(b: Brush, p: Paint) -> None:
    """A barn with a gambrel roof, a cross on its big doors and a hayloft window."""
    wall, marked = p.main, p.mark == "star"
    trim: RGB = (252, 248, 238) if luma(wall) < 205 else (150, 60, 50)
    roof: RGB = (96, 88, 100) if luma(wall) > 110 or wall[0] > wall[2] + 60 else (150, 132, 128)
    side = 0.38
    b.shadow(0.68, 0.07)
    b.form(
        ((0.28, 0.0), (0.28, 0.50), (0.28 + side, 0.50), (0.28 + side, 0.0)), darker(wall, 0.22), p, shade=0.3
    )
    b.form(
        ((0.28, 0.46), (0.17, 0.80), (0.17 + side, 0.80), (0.31 + side, 0.46)), darker(roof, 0.12), shade=0.3
    )
    b.form(
        ((0.17, 0.79), (-0.18, 1.0), (-0.16 + side, 1.0), (0.17 + side, 0.79)), lighter(roof, 0.12), shade=0.3
    )
    b.form(
        ((-0.64, 0.0), (-0.64, 0.47), (-0.54, 0.76), (-0.18, 0.97), (0.18, 0.76), (0.28, 0.47), (0.28, 0.0)),
        wall,
        p,
        shade=0.28,
    )
    b.line(((-0.70, 0.44), (-0.56, 0.79), (-0.18, 1.0), (0.20, 0.79), (0.34, 0.44)), trim, 0.055)
    b.flat(((-0.42, 0.02), (-0.42, 0.42), (0.06, 0.42), (0.06, 0.02)), trim)
    for x in (-0.385, -0.165):
        b.form(((x, 0.02), (x, 0.385), (x + 0.19, 0.385), (x + 0.19, 0.02)), darker(wall, 0.16), shade=0.2)
        b.line(((x, 0.02), (x + 0.19, 0.385)), trim, 0.032)
        b.line(((x + 0.19, 0.02), (x, 0.385)), trim, 0.032)
    if marked:
        b.form(star(-0.18, 0.655, 0.25), p.accent, shade=0.12)
    else:
        b.flat(((-0.28, 0.54), (-0.28, 0.74), (-0.08, 0.74), (-0.08, 0.54)), trim)
        b.flat(((-0.25, 0.57), (-0.25, 0.71), (-0.11, 0.71), (-0.11, 0.57)), (66, 50, 60))
    b.flat(((0.40, 0.20), (0.40, 0.36), (0.54, 0.36), (0.54, 0.20)), trim)
    b.flat(((0.425, 0.225), (0.425, 0.335), (0.515, 0.335), (0.515, 0.225)), (120, 170, 200))


_LENS: tuple[Point, ...] = (
    (0.10, 0.86),
    (0.52, 0.94),
    (0.98, 0.88),
    (1.02, 0.52),
    (0.82, 0.10),
    (0.48, 0.03),
    (0.20, 0.18),
    (0.07, 0.52),
)
_LENS_IN: tuple[Point, ...] = (
    (0.22, 0.75),
    (0.53, 0.80),
    (0.87, 0.75),
    (0.89, 0.50),
    (0.74, 0.22),
    (0.48, 0.17),
    (0.28, 0.28),
    (0.19, 0.52),
)


def sunglasses(b: Brush, p: Paint) -> None:
    """A pair of sunglasses standing on its lenses, arms folded back."""
    b.shadow(1.02, 0.13)
    for s in (-1, 1):
        b.form(((s * 0.92, 0.86), (s * 1.02, 0.86), (s * 0.84, 1.12), (s * 0.76, 1.12)), darker(p.main, 0.3))
    spectacles(b, p)


def spectacles(b: Brush, p: Paint) -> None:
    """The front of a pair of sunglasses alone, as it sits on a face."""
    hearts = p.mark == "hearts"
    lens: RGB = (40, 36, 56)
    b.form(((-0.22, 0.62), (-0.20, 0.76), (0, 0.82), (0.20, 0.76), (0.22, 0.62), (0, 0.69)), p.main)
    for s in (-1, 1):
        if hearts:
            frame, glass = p.main if s < 0 else p.accent, mix(p.accent if s < 0 else p.main, WHITE, 0.25)
            b.form(heart(s * 0.56, 0.50, 0.54), frame, shade=0.22)
            b.form(heart(s * 0.56, 0.52, 0.33), glass, shade=0.22)
            b.line(((s * 0.56 - 0.17, 0.56), (s * 0.56 - 0.05, 0.72)), WHITE, 0.07)
            continue
        flip = tuple((s * x, y) for x, y in _LENS)
        b.blob(flip, p.main, p, shade=0.3)
        b.blob(tuple((s * x, y) for x, y in _LENS_IN), lens, shade=0.2)
        x = s * 0.54 - 0.12
        b.line(((x - 0.08, 0.42), (x + 0.10, 0.70)), (150, 165, 196), 0.07)
        b.line(((x + 0.08, 0.40), (x + 0.22, 0.62)), (110, 122, 156), 0.04)


# ---------------------------------------------------------------- backgrounds

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
    image.paste(Image.fromarray(ramp).resize((w, y1 - y0), _BILINEAR), (0, y0))


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
            image.paste(colour, box, _puff().resize(size, _BILINEAR))


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
