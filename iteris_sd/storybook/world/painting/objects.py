"""How the plants, buildings and belongings of the storybook world are painted."""

from __future__ import annotations

import math
from dataclasses import replace

from iteris_sd.storybook.world.painting.brush import (
    INK,
    RGB,
    WHITE,
    Brush,
    Paint,
    Point,
    darker,
    eye,
    heart,
    lighter,
    luma,
    mix,
    star,
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
            eye(b, s * 0.07, 0.71, 0.034)
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
        b.form(star(0, 0.39, 0.31), p.accent, shade=0.08)
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


def car(b: Brush, p: Paint) -> None:
    """A small round toy car from the side, its front at its left."""
    metal: RGB = (176, 178, 188)
    glass: RGB = (178, 222, 242)
    b.shadow(0.86, 0.10)
    b.form(((-0.74, 0.20), (-0.74, 0.12), (0.74, 0.12), (0.74, 0.20)), INK, shade=0.1)
    b.blob(_CABIN, p.main, p, shade=0.3)
    b.blob(_CAR, p.main, p, shade=0.38)
    b.blob(((-0.385, 0.585), (-0.30, 0.78), (-0.17, 0.87), (-0.015, 0.88), (-0.015, 0.585)), glass, shade=0.3)
    b.blob(((0.085, 0.585), (0.085, 0.88), (0.25, 0.86), (0.39, 0.76), (0.46, 0.585)), glass, shade=0.3)
    for x in (-0.27, 0.15):
        b.line(((x, 0.64), (x + 0.09, 0.79)), (244, 252, 255), 0.04)
    trim = darker(p.main, 0.3) if luma(p.main) > 70 else lighter(p.main, 0.3)
    arch = darker(p.main, 0.5) if luma(p.main) > 70 else (18, 16, 22)
    b.line(((-0.10, 0.36), (-0.02, 0.36)), trim, 0.045)
    b.oval(-0.84, 0.43, 0.075, 0.085, (255, 236, 150), shade=0.16)
    b.oval(0.89, 0.43, 0.045, 0.075, (226, 60, 50) if not _reddish(p.main) else (255, 176, 60), shade=0.2)
    b.oval(-0.87, 0.21, 0.11, 0.05, metal)
    b.oval(0.87, 0.21, 0.11, 0.05, metal)
    for x in (-0.50, 0.52):
        b.form(tuple((x + u, y) for u, y in _ARCH), arch, shade=0.1)
        b.oval(x, 0.20, 0.205, 0.205, (50, 48, 56), shade=0.3)
        b.oval(x, 0.20, 0.115, 0.115, (222, 224, 230), shade=0.3)
        b.dot(x, 0.20, 0.04, 0.04, (120, 120, 132))


def _reddish(c: RGB) -> bool:
    return c[0] > 180 and c[1] < 110 and c[2] < 110


_ARCH: tuple[Point, ...] = tuple(
    (0.25 * math.cos(math.pi * k / 12), 0.155 + 0.30 * math.sin(math.pi * k / 12)) for k in range(13)
)
_CABIN: tuple[Point, ...] = (
    (-0.50, 0.50),
    (-0.40, 0.76),
    (-0.24, 0.94),
    (0.02, 0.985),
    (0.28, 0.955),
    (0.48, 0.79),
    (0.60, 0.50),
    (0.05, 0.40),
)
_CAR: tuple[Point, ...] = (
    (-0.92, 0.20),
    (-0.93, 0.38),
    (-0.82, 0.535),
    (-0.52, 0.58),
    (-0.10, 0.575),
    (0.30, 0.58),
    (0.66, 0.575),
    (0.88, 0.51),
    (0.94, 0.36),
    (0.92, 0.20),
    (0.60, 0.155),
    (0.0, 0.15),
    (-0.60, 0.155),
)


def chair(b: Brush, p: Paint) -> None:
    """A wooden chair from the front and a little above: backrest with slats, broad seat, four legs."""
    wood = p.main
    deep = darker(wood, 0.32) if luma(wood) > 70 else lighter(wood, 0.1)
    b.shadow(0.38, 0.10, 0.46)
    for s in (-1, 1):
        b.form(((s * 0.18, 0.42), (s * 0.265, 0.42), (s * 0.265, 0.10), (s * 0.20, 0.10)), darker(wood, 0.42))
    b.form(((-0.24, 0.25), (0.24, 0.25), (0.24, 0.20), (-0.24, 0.20)), darker(wood, 0.46))
    for x in (-0.135, 0.0, 0.135):
        b.form(((x - 0.042, 0.46), (x - 0.042, 0.80), (x + 0.042, 0.80), (x + 0.042, 0.46)), deep, shade=0.26)
    for s in (-1, 1):
        b.form(((s * 0.20, 0.46), (s * 0.235, 0.96), (s * 0.315, 0.96), (s * 0.29, 0.46)), wood, shade=0.32)
    b.blob(_RAIL, wood, p, shade=0.3)
    b.form(
        ((-0.275, 0.56), (0.275, 0.56), (0.395, 0.405), (-0.395, 0.405)), lighter(wood, 0.08), p, shade=0.24
    )
    b.form(((-0.395, 0.41), (0.395, 0.41), (0.385, 0.335), (-0.385, 0.335)), deep, shade=0.24)
    for s in (-1, 1):
        b.form(((s * 0.265, 0.345), (s * 0.37, 0.345), (s * 0.355, 0.0), (s * 0.28, 0.0)), wood, shade=0.36)


_RAIL: tuple[Point, ...] = (
    (-0.35, 0.77),
    (-0.365, 0.88),
    (-0.31, 0.965),
    (-0.16, 0.99),
    (0.0, 1.0),
    (0.16, 0.99),
    (0.31, 0.965),
    (0.365, 0.88),
    (0.35, 0.77),
    (0.16, 0.735),
    (0.0, 0.73),
    (-0.16, 0.735),
)


def mushroom(b: Brush, p: Paint) -> None:
    """A toadstool: a big round cap on a thick pale stem."""
    stem: RGB = (246, 232, 206)
    b.shadow(0.32, 0.08)
    b.blob(_STEM, stem, shade=0.36)
    b.blob(
        (
            (-0.47, 0.47),
            (-0.25, 0.56),
            (0.25, 0.56),
            (0.47, 0.47),
            (0.25, 0.375),
            (0.0, 0.355),
            (-0.25, 0.375),
        ),
        darker(stem, 0.3),
        shade=0.28,
    )
    b.blob(_CAP, p.main, p, shade=0.4)


_STEM: tuple[Point, ...] = (
    (-0.14, 0.46),
    (-0.145, 0.25),
    (-0.215, 0.10),
    (-0.17, 0.005),
    (0.0, -0.02),
    (0.17, 0.005),
    (0.215, 0.10),
    (0.145, 0.25),
    (0.14, 0.46),
)
_CAP: tuple[Point, ...] = (
    (-0.54, 0.50),
    (-0.52, 0.66),
    (-0.42, 0.83),
    (-0.24, 0.96),
    (0.0, 1.0),
    (0.24, 0.96),
    (0.42, 0.83),
    (0.52, 0.66),
    (0.54, 0.50),
    (0.47, 0.435),
    (0.25, 0.475),
    (0.0, 0.485),
    (-0.25, 0.475),
    (-0.47, 0.435),
)


def teapot(b: Brush, p: Paint) -> None:
    """A round-bellied teapot, spout at its left, handle at its right, a knob on its lid."""
    clay = p.main
    trim = darker(clay, 0.3) if luma(clay) > 70 else lighter(clay, 0.3)
    b.shadow(0.46, 0.09)
    b.form(_HANDLE, clay, shade=0.4)
    b.blob(_SPOUT, clay, p)
    b.oval(-0.735, 0.655, 0.085, 0.045, darker(clay, 0.5), turn=24, shade=0.2)
    b.oval(0, 0.05, 0.28, 0.06, trim)
    b.blob(_BELLY, clay, p, shade=0.4)
    b.oval(0, 0.735, 0.285, 0.055, trim, shade=0.3)
    b.blob(((-0.25, 0.745), (-0.17, 0.83), (0.0, 0.865), (0.17, 0.83), (0.25, 0.745), (0.0, 0.715)), clay)
    b.oval(0, 0.915, 0.09, 0.085, trim)


_HANDLE: tuple[Point, ...] = tuple(
    [
        (0.42 + 0.36 * math.cos(math.pi * k / 12), 0.43 + 0.27 * math.sin(math.pi * k / 12))
        for k in range(-7, 8)
    ]
    + [
        (0.42 + 0.245 * math.cos(math.pi * k / 12), 0.43 + 0.155 * math.sin(math.pi * k / 12))
        for k in range(7, -8, -1)
    ]
)
_SPOUT: tuple[Point, ...] = (
    (-0.30, 0.42),
    (-0.50, 0.46),
    (-0.62, 0.58),
    (-0.67, 0.69),
    (-0.81, 0.63),
    (-0.73, 0.46),
    (-0.60, 0.27),
    (-0.40, 0.16),
    (-0.28, 0.20),
)
_BELLY: tuple[Point, ...] = (
    (-0.26, 0.73),
    (-0.42, 0.62),
    (-0.49, 0.43),
    (-0.44, 0.22),
    (-0.29, 0.07),
    (0.0, 0.03),
    (0.29, 0.07),
    (0.44, 0.22),
    (0.49, 0.43),
    (0.42, 0.62),
    (0.26, 0.73),
    (0.0, 0.755),
)


def umbrella(b: Brush, p: Paint) -> None:
    """An open umbrella leaning a little, on its hooked handle; five panels with a scalloped edge."""
    wood: RGB = (128, 78, 42)
    b.shadow(0.52, 0.06, 0.26, dx=0.02)
    b.shadow(0.12, 0.06, 0.6, dx=0.16)
    b.form(_lean(_UNDER), darker(p.main, 0.5), shade=0.3)
    b.line(_lean(((0.0, 0.98), (0.0, 0.16))), (112, 112, 124), 0.05)
    b.line(_lean(_HOOK), wood, 0.068)
    b.line(_lean(((0.0, 0.90), (0.0, 1.0))), wood, 0.06)
    for k in (0, 4, 1, 3, 2):
        tone = (lighter(p.main, 0.12), p.main, lighter(p.main, 0.1), p.main, lighter(p.main, 0.05))[k]
        b.form(_lean(_panel(k)), tone if p.pattern == "plain" else p.main, p, shade=0.38)


def _lean(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """The umbrella's own upright frame tilted to the left about its foot."""
    c, s = math.cos(math.radians(_TILT)), math.sin(math.radians(_TILT))
    return tuple((0.12 + x * c - y * s, x * s + y * c) for x, y in points)


_TILT = 10.0
_EDGES = (-0.60, -0.40, -0.14, 0.14, 0.40, 0.60)


def _panel(k: int) -> tuple[Point, ...]:
    """Panel `k` of the canopy: two ribs bowed outwards from the top and a scallop between their ends."""
    left, right = _EDGES[k], _EDGES[k + 1]
    down = [(left * math.sin(t), 0.50 + 0.44 * math.cos(t)) for t in _QUARTER]
    up = [(right * math.sin(t), 0.50 + 0.44 * math.cos(t)) for t in _QUARTER[::-1]]
    scallop = [
        (left + (right - left) * u, 0.50 + 0.075 * math.sin(math.pi * u)) for u in (0.15, 0.3, 0.5, 0.7, 0.85)
    ]
    return tuple(down + scallop + up)


_QUARTER = tuple(math.pi / 2 * k / 8 for k in range(9))
_UNDER: tuple[Point, ...] = (
    (-0.59, 0.515),
    (-0.56, 0.62),
    (0.56, 0.62),
    (0.59, 0.515),
    (0.30, 0.525),
    (0.0, 0.53),
    (-0.30, 0.525),
)
_HOOK: tuple[Point, ...] = (
    (0.0, 0.24),
    (0.0, 0.10),
    *(
        (0.075 - 0.075 * math.cos(math.pi * k / 6), 0.10 - 0.075 * math.sin(math.pi * k / 6))
        for k in range(7)
    ),
    (0.15, 0.13),
)
