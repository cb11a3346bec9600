"""The storybook world: what can be in a picture, how it is laid out and drawn, and what its caption says."""

from iteris_sd.storybook.world.catalogue import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    EXCLUSIVE,
    RELATIONS,
    SIZES,
    STRANGE,
    ClassSpec,
)
from iteris_sd.storybook.world.drawing import draw, placed
from iteris_sd.storybook.world.layout import CANVAS, Placed
from iteris_sd.storybook.world.painting.light import TIMES
from iteris_sd.storybook.world.scenes import (
    INDIVIDUALS,
    STYLES,
    Individual,
    Look,
    Scene,
    held_out,
    place,
    sample,
    sample_look,
)
from iteris_sd.storybook.world.wording import caption

__all__ = [
    "BACKGROUNDS",
    "CANVAS",
    "CLASSES",
    "ClassSpec",
    "COLOURS",
    "EXCLUSIVE",
    "STRANGE",
    "INDIVIDUALS",
    "RELATIONS",
    "SIZES",
    "STYLES",
    "TIMES",
    "Individual",
    "Look",
    "Placed",
    "Scene",
    "caption",
    "draw",
    "held_out",
    "place",
    "placed",
    "sample",
    "sample_look",
]
