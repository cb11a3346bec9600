"""From a scene to its picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from iteris_sd.storybook.world.catalogue import BACKGROUNDS, CLASSES, UNNAMED
from iteris_sd.storybook.world.layout import CANVAS, Placed, lay_out
from iteris_sd.storybook.world.painting import light, objects, styles
from iteris_sd.storybook.world.painting.brush import Brush, Paint, darker, heart, lighter, luma, star
from iteris_sd.storybook.world.scenes import Look, Scene

_FINE = 3  # drawn this many times finer, then averaged: smooth edges without blur


def placed(scene: Scene) -> list[Placed]:
    """Where the things of a scene stand, as `draw` draws them, in pixels of 128."""
    return lay_out(scene, np.random.default_rng(scene.seed))


def draw(scene: Scene, size: int = CANVAS) -> Image.Image:
    """The picture of a scene: RGB, `size` x `size`; the same scene always gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    side, k = size * _FINE, size * _FINE / CANVAS
    image = Image.new("RGB", (side, side))
    things, shine = lay_out(scene, rng), light.TIMES[scene.time]
    BACKGROUNDS[scene.background].paint(image, rng, shine)
    before: Brush | None = None
    for thing in things:
        brush = Brush(image, thing.x * k, thing.ground * k, thing.height * k, thing.flip)
        if thing.on == "in" and before is not None:
            _paint_behind(image, thing, brush, before)
        elif thing.on == "wearing":
            objects.spectacles(brush, _paint_of(thing.look))
        else:
            _paint(brush, thing.look)
        before = brush
    image = light.graded(image.reduce(_FINE), shine)
    return styles.watercolour(image, rng) if scene.style == "watercolour" else image


def _paint(brush: Brush, look: Look) -> None:
    """Paint a thing, and its badge if it bears one."""
    spec, paint = CLASSES[look.cls], _paint_of(look)
    spec.paint(brush, paint)
    if look.mark == "badge" and spec.badge is not None:
        shape, x, y, radius = spec.badge
        brush.form({"star": star, "heart": heart}[shape](x, y, radius), paint.accent, shade=0.12)


def _paint_of(look: Look) -> Paint:
    colours = CLASSES[look.cls].colours
    if look.colour in UNNAMED:
        main, accent = UNNAMED[look.colour]
    else:
        main = colours[look.colour]
        accent = darker(main, 0.34) if luma(main) > 75 else lighter(main, 0.16)
    if look.accent is not None:
        accent = UNNAMED[look.accent][1] if look.accent in UNNAMED else colours[look.accent]
    return Paint(main, accent, look.pattern, look.mark)


def _paint_behind(image: Image.Image, thing: Placed, brush: Brush, pot: Brush) -> None:
    """Paint a thing, then put the front of the pot it stands in back over it."""
    top = max(0, int(pot.ground - pot.height))
    kept = image.crop((0, top, *image.size))
    _paint(brush, thing.look)
    mask = Image.new("L", kept.size)
    ImageDraw.Draw(mask).polygon([(x, y - top) for x, y in objects.pot_front(pot)], fill=255)
    image.paste(kept, (0, top), mask)
