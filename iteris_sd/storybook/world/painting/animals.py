"""How the animals and soft toys of the storybook world are painted."""

from __future__ import annotations

import math

from iteris_sd.storybook.world.painting.brush import (
    INK,
    RGB,
    Brush,
    Paint,
    Point,
    darker,
    eye,
    eye_ring,
    heart,
    lighter,
    luma,
    mix,
    star,
)


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
        b.dot(s * 0.105, 0.795, 0.066, 0.07, eye_ring(fur))
        eye(b, s * 0.105, 0.79, 0.043)
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
        eye(b, s * 0.125, 0.735, 0.062, (150, 205, 70))
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
        b.dot(s * 0.115, 0.785, 0.06, 0.06, eye_ring(plush))
        eye(b, s * 0.115, 0.785, 0.04)
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
        eye(b, -0.76 + s * 0.105, 0.635, 0.058)
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


def rabbit(b: Brush, p: Paint) -> None:
    """A sitting rabbit with tall upright ears, big hind feet and a white puff of a tail."""
    fur, pale = p.main, lighter(p.main, 0.66)
    inner = mix(fur, (248, 150, 166), 0.78)
    b.shadow(0.34)
    b.oval(0.27, 0.13, 0.095, 0.09, (250, 247, 240) if luma(fur) < 215 else darker(fur, 0.12), shade=0.22)
    b.mirror_blob(((0.06, 0.02), (0.08, 0.22), (0.19, 0.28), (0.28, 0.18), (0.28, 0.05), (0.16, 0.0)), fur, p)
    b.blob(
        (
            (-0.17, 0.04),
            (-0.22, 0.22),
            (-0.14, 0.42),
            (0.0, 0.47),
            (0.14, 0.42),
            (0.22, 0.22),
            (0.17, 0.04),
            (0.0, 0.01),
        ),
        fur,
        p,
    )
    b.oval(0, 0.245, 0.105, 0.145, pale, shade=0.16)
    b.mirror_blob(
        ((0.02, 0.14), (0.03, 0.25), (0.075, 0.30), (0.125, 0.25), (0.115, 0.15), (0.065, 0.115)),
        fur,
        shade=0.26,
    )
    b.oval(-0.155, 0.045, 0.13, 0.058, pale, shade=0.2, turn=4)
    b.oval(0.155, 0.045, 0.13, 0.058, pale, shade=0.2, turn=-4)
    for s in (-1, 1):
        b.blob(tuple((s * x, y) for x, y in _EAR), fur, p)
        b.blob(tuple((s * x, y) for x, y in _EAR_IN), inner, shade=0.2)
    b.blob(
        (
            (0.0, 0.725),
            (0.14, 0.70),
            (0.215, 0.60),
            (0.235, 0.50),
            (0.155, 0.415),
            (0.0, 0.385),
            (-0.155, 0.415),
            (-0.235, 0.50),
            (-0.215, 0.60),
            (-0.14, 0.70),
        ),
        fur,
        p,
    )
    for s in (-1, 1):
        b.dot(s * 0.105, 0.59, 0.058, 0.064, eye_ring(fur))
        eye(b, s * 0.105, 0.59, 0.043)
        b.dot(s * 0.155, 0.50, 0.036, 0.026, mix(fur, (246, 130, 140), 0.62))
    b.form(((-0.033, 0.47), (0.033, 0.47), (0.027, 0.405), (-0.027, 0.405)), (255, 253, 246), shade=0.1)
    b.oval(-0.052, 0.488, 0.068, 0.05, pale, shade=0.12)
    b.oval(0.052, 0.488, 0.068, 0.05, pale, shade=0.12)
    b.form(((-0.038, 0.545), (0.038, 0.545), (0.0, 0.497)), (226, 96, 116), shade=0.12)


_EAR: tuple[Point, ...] = (
    (0.035, 0.66),
    (0.03, 0.82),
    (0.075, 0.96),
    (0.125, 1.0),
    (0.18, 0.95),
    (0.195, 0.80),
    (0.155, 0.64),
)
_EAR_IN: tuple[Point, ...] = (
    (0.075, 0.70),
    (0.075, 0.82),
    (0.10, 0.92),
    (0.13, 0.945),
    (0.155, 0.91),
    (0.155, 0.80),
    (0.13, 0.70),
)


def duck(b: Brush, p: Paint) -> None:
    """A plump duck from the side, its head and broad beak at its left, its tail cocked."""
    down = p.main
    orange: RGB = (244, 132, 30)
    b.shadow(0.40)
    for x in (-0.06, 0.15):
        b.form(
            ((x - 0.025, 0.14), (x + 0.035, 0.14), (x + 0.03, 0.03), (x - 0.03, 0.03)), darker(orange, 0.2)
        )
        b.blob(((x - 0.14, 0.0), (x - 0.10, 0.045), (x, 0.075), (x + 0.06, 0.03), (x + 0.04, 0.0)), orange)
    b.blob(_DUCK, down, p)
    b.blob(_WING, darker(down, 0.14) if luma(down) > 70 else lighter(down, 0.14), p, shade=0.3)
    b.oval(-0.23, 0.755, 0.225, 0.215, down, p, shade=0.26)
    b.blob(_BEAK, orange)
    b.curve((-0.64, 0.695), (-0.53, 0.665), (-0.40, 0.71), darker(orange, 0.5), 0.024)
    b.dot(-0.275, 0.815, 0.068, 0.074, eye_ring(down))
    eye(b, -0.275, 0.815, 0.05)
    b.dot(-0.205, 0.705, 0.045, 0.032, mix(down, (250, 120, 120), 0.5))


_BEAK: tuple[Point, ...] = (
    (-0.385, 0.815),
    (-0.47, 0.78),
    (-0.57, 0.745),
    (-0.66, 0.735),
    (-0.665, 0.675),
    (-0.58, 0.625),
    (-0.46, 0.61),
    (-0.375, 0.64),
)
_DUCK: tuple[Point, ...] = (
    (-0.36, 0.62),
    (-0.42, 0.42),
    (-0.38, 0.22),
    (-0.20, 0.09),
    (0.06, 0.06),
    (0.32, 0.13),
    (0.47, 0.30),
    (0.58, 0.56),
    (0.53, 0.60),
    (0.36, 0.52),
    (0.16, 0.49),
    (0.0, 0.53),
    (-0.06, 0.64),
)
_WING: tuple[Point, ...] = (
    (-0.14, 0.36),
    (-0.02, 0.44),
    (0.18, 0.43),
    (0.42, 0.42),
    (0.34, 0.27),
    (0.18, 0.18),
    (0.0, 0.19),
    (-0.12, 0.26),
)


def owl(b: Brush, p: Paint) -> None:
    """An owl from the front: an egg of a body, ear tufts, huge round eyes, wings at its sides."""
    down, pale = p.main, lighter(p.main, 0.62)
    wing = darker(down, 0.13) if luma(down) > 70 else lighter(down, 0.14)
    orange: RGB = (246, 152, 40)
    b.shadow(0.34)
    for s in (-1, 1):
        b.form(((s * 0.08, 0.80), (s * 0.17, 0.905), (s * 0.335, 1.0), (s * 0.345, 0.70)), down, p)
    b.blob(_OWL, down, p)
    b.oval(0, 0.285, 0.185, 0.215, pale, shade=0.18)
    for x, y in ((-0.085, 0.37), (0.085, 0.37), (0.0, 0.27), (-0.085, 0.17), (0.085, 0.17)):
        b.curve(
            (x - 0.055, y + 0.02),
            (x, y - 0.06),
            (x + 0.055, y + 0.02),
            mix(pale, darker(down, 0.4), 0.55),
            0.026,
        )
    for s in (-1, 1):
        b.blob(tuple((s * x, y) for x, y in _OWL_WING), wing, p)
        for x in (0.055, 0.115, 0.175):
            b.oval(s * x, 0.035, 0.036, 0.048, orange, shade=0.24)
    for s in (-1, 1):
        b.oval(s * 0.155, 0.685, 0.175, 0.178, pale, shade=0.2)
    for s in (-1, 1):
        b.oval(s * 0.145, 0.69, 0.118, 0.122, (255, 214, 64), shade=0.16)
        eye(b, s * 0.138, 0.69, 0.076)
    b.form(((-0.052, 0.645), (0.0, 0.675), (0.052, 0.645), (0.0, 0.53)), orange, shade=0.34)


_OWL: tuple[Point, ...] = (
    (0.0, 0.895),
    (-0.19, 0.87),
    (-0.32, 0.775),
    (-0.365, 0.60),
    (-0.36, 0.34),
    (-0.28, 0.12),
    (-0.12, 0.03),
    (0.0, 0.02),
    (0.12, 0.03),
    (0.28, 0.12),
    (0.36, 0.34),
    (0.365, 0.60),
    (0.32, 0.775),
    (0.19, 0.87),
)
_OWL_WING: tuple[Point, ...] = (
    (0.31, 0.54),
    (0.40, 0.46),
    (0.425, 0.28),
    (0.36, 0.10),
    (0.27, 0.14),
    (0.215, 0.30),
    (0.23, 0.46),
)
