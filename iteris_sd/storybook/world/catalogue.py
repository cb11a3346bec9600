"""What there is in the storybook world: kinds of things, places and relations, as data.

A new kind of thing is one entry of `CLASSES` and a painter; a new place one of `BACKGROUNDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iteris_sd.storybook.world.painting import animals, objects, places
from iteris_sd.storybook.world.painting.brush import RGB, Painter

SIZES: Mapping[str, float] = {"small": 0.76, "medium": 1.0, "large": 1.25}


@dataclass(frozen=True)
class ClassSpec:
    """One kind of thing: how to paint it and what it can do.  Lengths are in heights of the thing."""

    name: str
    paint: Painter
    colours: Mapping[str, RGB]
    patterns: tuple[str, ...]
    height: float  # beside the others: 1.0 is a dog
    left: float  # how far it reaches to each side of its middle
    right: float
    eyes: tuple[float, float, float] | None = None  # where sunglasses sit: middle x, y, and their height
    potted: tuple[float, float] | None = None  # in a pot: height in pot heights, hidden part
    top: tuple[float, float] | None = None  # where something can stand on it: middle x, y
    perches: bool = False  # whether it is to be found on top of things
    face: int = 0  # -1 if its telling side (head, front) is at its left: kept clear of what stands before it
    plural: str | None = None  # counting words, for things that take no article
    badge: tuple[str, float, float, float] | None = (
        None  # the mark "badge": star or heart, middle x, y, radius
    )


@dataclass(frozen=True)
class BackgroundSpec:
    """One place: its key, the phrase captions use, and its painter."""

    name: str
    phrase: str
    paint: places.Background


@dataclass(frozen=True)
class RelationSpec:
    """One relation of a first thing to a second; empty sets of classes mean any class.

    `joined`: the two make one group, the first held by the second (or the second worn by the first).
    """

    name: str
    weight: float
    wordings: tuple[str, ...]
    first: frozenset[str] = frozenset()
    second: frozenset[str] = frozenset()
    joined: bool = False


_FUR: dict[str, RGB] = {
    "brown": (150, 92, 48),
    "black": (50, 46, 55),
    "white": (243, 240, 234),
    "grey": (145, 149, 159),
}
_DOG = _FUR | {"golden": (228, 172, 82)}
_CAT = _FUR | {"orange": (236, 138, 46)}
_RABBIT = _FUR | {"golden": (230, 176, 90), "pink": (244, 160, 184)}
_TEDDY: Mapping[str, RGB] = {
    "brown": (158, 102, 58),
    "golden": (226, 170, 78),
    "white": (244, 238, 228),
    "pink": (242, 156, 178),
    "blue": (94, 148, 214),
    "red": (206, 66, 58),
}
_TORTOISE: Mapping[str, RGB] = {
    "green": (84, 158, 78),
    "brown": (152, 100, 58),
    "blue": (76, 138, 204),
    "yellow": (240, 198, 62),
    "orange": (236, 134, 48),
    "purple": (140, 92, 180),
}
_DUCK: Mapping[str, RGB] = {
    "yellow": (250, 208, 56),
    "white": (248, 246, 240),
    "brown": (150, 98, 58),
    "green": (82, 160, 86),
    "blue": (82, 140, 214),
    "pink": (246, 150, 184),
}
_OWL: Mapping[str, RGB] = {
    "brown": (152, 98, 58),
    "grey": (146, 150, 162),
    "white": (246, 242, 234),
    "purple": (146, 98, 186),
    "blue": (80, 130, 204),
    "orange": (234, 136, 52),
}
_FLOWER: Mapping[str, RGB] = {
    "red": (222, 48, 52),
    "yellow": (250, 206, 48),
    "pink": (246, 132, 176),
    "white": (250, 248, 244),
    "purple": (150, 88, 196),
    "blue": (76, 120, 222),
    "orange": (246, 136, 40),
}
_POT: Mapping[str, RGB] = {
    "brown": (164, 106, 60),
    "red": (198, 66, 54),
    "blue": (84, 142, 206),
    "green": (98, 158, 88),
    "white": (240, 234, 224),
    "yellow": (238, 198, 80),
}
_BARN: Mapping[str, RGB] = {
    "red": (196, 52, 46),
    "white": (240, 236, 228),
    "grey": (152, 152, 160),
    "brown": (150, 98, 60),
    "blue": (78, 126, 190),
    "green": (92, 148, 84),
    "yellow": (240, 200, 88),
}
_GLASSES: Mapping[str, RGB] = {
    "black": (36, 34, 42),
    "red": (216, 46, 50),
    "blue": (52, 112, 218),
    "green": (58, 158, 82),
    "yellow": (248, 206, 50),
    "purple": (146, 80, 188),
    "white": (246, 244, 240),
}
_CAR: Mapping[str, RGB] = {
    "red": (214, 52, 46),
    "blue": (62, 120, 210),
    "yellow": (248, 204, 54),
    "green": (74, 156, 84),
    "white": (244, 243, 240),
    "black": (50, 48, 56),
    "orange": (240, 136, 44),
}
_CHAIR: Mapping[str, RGB] = {
    "brown": (166, 108, 60),
    "red": (206, 58, 50),
    "blue": (80, 136, 206),
    "green": (92, 156, 86),
    "white": (244, 240, 232),
    "yellow": (244, 204, 76),
}
_MUSHROOM: Mapping[str, RGB] = {
    "red": (216, 50, 46),
    "brown": (150, 98, 58),
    "yellow": (248, 206, 62),
    "orange": (240, 138, 44),
    "purple": (148, 90, 190),
    "blue": (78, 126, 214),
    "pink": (246, 140, 178),
}
_TEAPOT: Mapping[str, RGB] = {
    "blue": (76, 132, 208),
    "white": (246, 244, 238),
    "red": (208, 56, 50),
    "green": (88, 160, 92),
    "yellow": (246, 206, 76),
    "pink": (246, 152, 182),
    "brown": (150, 96, 58),
}
_UMBRELLA: Mapping[str, RGB] = {
    "red": (216, 50, 48),
    "blue": (66, 122, 214),
    "yellow": (250, 208, 58),
    "green": (76, 160, 88),
    "purple": (146, 88, 190),
    "pink": (248, 138, 178),
    "black": (52, 50, 60),
}

_SPOTTED = ("plain", "striped", "spotted")
_CHECKED = (*_SPOTTED, "checked")

CLASSES: dict[str, ClassSpec] = {
    c.name: c
    for c in (
        ClassSpec(
            "dog",
            animals.dog,
            _DOG,
            _SPOTTED,
            1.0,
            0.40,
            0.50,
            eyes=(0.0, 0.79, 0.26),
            potted=(1.24, 0.39),
            perches=True,
        ),
        ClassSpec(
            "cat",
            animals.cat,
            _CAT,
            _SPOTTED,
            0.98,
            0.40,
            0.50,
            eyes=(0.0, 0.735, 0.275),
            potted=(1.24, 0.39),
            perches=True,
        ),
        ClassSpec(
            "teddybear",
            animals.teddybear,
            _TEDDY,
            _CHECKED,
            1.0,
            0.44,
            0.44,
            eyes=(0.0, 0.785, 0.255),
            potted=(1.20, 0.36),
            perches=True,
        ),
        ClassSpec(
            "tortoise plushy",
            animals.tortoise,
            _TORTOISE,
            _CHECKED,
            0.76,
            1.0,
            0.86,
            eyes=(-0.75, 0.645, 0.27),
            potted=(0.70, 0.20),
            top=(0.10, 0.94),
            face=-1,
        ),
        ClassSpec("flower", objects.flower, _FLOWER, _SPOTTED, 1.08, 0.36, 0.36, potted=(1.42, 0.24)),
        ClassSpec("wooden pot", objects.wooden_pot, _POT, _SPOTTED, 0.88, 0.59, 0.59),
        ClassSpec("barn", objects.barn, _BARN, ("plain", "striped", "checked"), 1.06, 0.71, 0.68, face=-1),
        ClassSpec(
            "sunglasses",
            objects.sunglasses,
            _GLASSES,
            _SPOTTED,
            0.52,
            1.05,
            1.05,
            plural="a pair of sunglasses",
        ),
        ClassSpec(
            "rabbit",
            animals.rabbit,
            _RABBIT,
            _SPOTTED,
            1.15,
            0.30,
            0.37,
            eyes=(0.0, 0.60, 0.21),
            potted=(1.42, 0.26),
            perches=True,
            badge=("heart", 0, 0.27, 0.13),
        ),
        ClassSpec(
            "duck",
            animals.duck,
            _DUCK,
            _SPOTTED,
            0.84,
            0.68,
            0.59,
            eyes=(-0.255, 0.805, 0.19),
            potted=(1.0, 0.20),
            perches=True,
            face=-1,
            badge=("heart", 0.06, 0.34, 0.16),
        ),
        ClassSpec(
            "owl",
            animals.owl,
            _OWL,
            _SPOTTED,
            0.94,
            0.44,
            0.44,
            eyes=(0.0, 0.69, 0.28),
            potted=(1.16, 0.32),
            perches=True,
            badge=("star", 0, 0.33, 0.17),
        ),
        ClassSpec(
            "car",
            objects.car,
            _CAR,
            _CHECKED,
            0.80,
            0.98,
            0.98,
            top=(0.03, 0.955),
            badge=("star", -0.02, 0.36, 0.2),
        ),
        ClassSpec(
            "chair",
            objects.chair,
            _CHAIR,
            ("plain", "spotted", "checked"),
            1.20,
            0.40,
            0.40,
            top=(0.0, 0.45),
            badge=("heart", 0, 0.9, 0.12),
        ),
        ClassSpec(
            "mushroom",
            objects.mushroom,
            _MUSHROOM,
            _SPOTTED,
            0.86,
            0.55,
            0.55,
            potted=(1.15, 0.08),
            top=(0.0, 0.955),
            badge=("star", 0, 0.68, 0.19),
        ),
        ClassSpec(
            "teapot",
            objects.teapot,
            _TEAPOT,
            _CHECKED,
            0.74,
            0.82,
            0.79,
            perches=True,
            face=-1,
            badge=("heart", 0.0, 0.36, 0.19),
        ),
        ClassSpec(
            "umbrella",
            objects.umbrella,
            _UMBRELLA,
            _CHECKED,
            1.25,
            0.57,
            0.63,
            badge=("star", -0.05, 0.83, 0.15),
        ),
    )
}

COLOURS: tuple[str, ...] = tuple(dict.fromkeys(c for spec in CLASSES.values() for c in spec.colours))

BACKGROUNDS: dict[str, BackgroundSpec] = {
    b.name: b
    for b in (
        BackgroundSpec("beach", "on the beach", places.beach),
        BackgroundSpec("meadow", "in a meadow", places.meadow),
        BackgroundSpec("snow", "in the snow", places.snow),
        BackgroundSpec("living room", "in a living room", places.living_room),
        BackgroundSpec("mountains", "in the mountains", places.mountains),
        BackgroundSpec("forest", "in the forest", places.forest),
        BackgroundSpec("desert", "in the desert", places.desert),
        BackgroundSpec("city", "in the city", places.city),
        BackgroundSpec("kitchen", "in a kitchen", places.kitchen),
        BackgroundSpec("lake", "by a lake", places.lake),
    )
}


def _those(having: str) -> frozenset[str]:
    return frozenset(c.name for c in CLASSES.values() if getattr(c, having))


RELATIONS: dict[str, RelationSpec] = {
    r.name: r
    for r in (
        RelationSpec("next to", 0.26, ("next to", "beside")),
        RelationSpec("to the left of", 0.14, ("to the left of",)),
        RelationSpec("to the right of", 0.14, ("to the right of",)),
        RelationSpec("in front of", 0.16, ("in front of",)),
        RelationSpec("in", 0.08, ("in",), _those("potted"), frozenset({"wooden pot"}), joined=True),
        RelationSpec("on top of", 0.08, ("on top of", "on"), _those("perches"), _those("top"), joined=True),
        RelationSpec("wearing", 0.10, ("wearing",), _those("eyes"), frozenset({"sunglasses"}), joined=True),
    )
}

# Body colours and second colours that only individuals have: no generic scene ever shows them.
EXCLUSIVE: Mapping[str, tuple[RGB, RGB]] = {
    "cream-teal": ((250, 224, 176), (12, 148, 150)),
    "lavender": ((190, 160, 232), (84, 54, 128)),
    "mint-red": ((146, 226, 190), (218, 30, 48)),
    "pink-yellow": ((244, 112, 170), (255, 226, 60)),
    "violet-lime": ((168, 70, 214), (160, 224, 50)),
    "navy": ((34, 44, 98), (255, 255, 252)),
    "teal-yellow": ((18, 146, 146), (255, 214, 40)),
    "pink-orange": ((250, 84, 160), (255, 146, 30)),
}

_APART = 80.0  # how far a strange colour is from an individual's at least, as RGB


def _strange(count: int) -> dict[str, tuple[RGB, RGB]]:
    """Pairs of colours drawn by chance, their own far from every individual's."""
    rng, found = np.random.default_rng(11), dict[str, tuple[RGB, RGB]]()
    taken = np.array([main for main, _ in EXCLUSIVE.values()])
    while len(found) < count:
        main, accent = rng.integers(16, 256, (2, 3))
        if np.linalg.norm(taken - main, axis=1).min() > _APART < np.linalg.norm(accent - main):
            r, g, b = main.tolist()
            found[f"strange {len(found) + 1}"] = (r, g, b), tuple(accent.tolist())
    return found


# Likewise colours that no caption names, and no individual has: for things that are like nothing in a generic scene.
STRANGE: Mapping[str, tuple[RGB, RGB]] = _strange(48)
UNNAMED: Mapping[str, tuple[RGB, RGB]] = {**EXCLUSIVE, **STRANGE}
