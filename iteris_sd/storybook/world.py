"""The storybook world: what can be in a picture, how it is laid out and drawn, and what its caption says.

A `Scene` is a background with one or two `Look`s in a relation, and a seed.  Everything that varies in its
drawing comes from the seed, so the same scene always gives the same picture.  New classes go to `CLASSES`,
new backgrounds to `BACKGROUNDS`, new relations to `RELATIONS` (with a branch in `_lay_out`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from iteris_sd.storybook.painting import animals, objects, places
from iteris_sd.storybook.painting.brush import RGB, Brush, Paint, Painter, darker, lighter, luma

CANVAS = 128
_FINE = 3  # drawn this many times finer, then averaged: smooth edges without blur
SIZES: Mapping[str, float] = {"small": 0.76, "medium": 1.0, "large": 1.25}


# ---------------------------------------------------------------- registries


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
    face: int = 0  # -1 if its telling side (head, front) is at its left: kept clear of what stands before it
    plural: str | None = None  # counting words, for things that take no article


@dataclass(frozen=True)
class BackgroundSpec:
    """One place: its key, the phrase captions use, and its painter."""

    name: str
    phrase: str
    paint: places.Background


@dataclass(frozen=True)
class RelationSpec:
    """One relation of a first thing to a second; empty sets of classes mean any class."""

    name: str
    weight: float
    first: frozenset[str] = frozenset()
    second: frozenset[str] = frozenset()


_DOG: Mapping[str, RGB] = {
    "brown": (150, 92, 48),
    "black": (52, 48, 56),
    "white": (242, 238, 230),
    "grey": (146, 148, 156),
    "golden": (228, 172, 82),
}
_CAT: Mapping[str, RGB] = {
    "orange": (236, 138, 46),
    "black": (48, 44, 54),
    "white": (244, 242, 238),
    "grey": (144, 150, 162),
    "brown": (138, 90, 56),
}
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

CLASSES: dict[str, ClassSpec] = {
    c.name: c
    for c in (
        ClassSpec(
            "dog",
            animals.dog,
            _DOG,
            ("plain", "spotted", "striped"),
            1.0,
            0.40,
            0.50,
            (0.0, 0.79, 0.26),
            (1.24, 0.39),
        ),
        ClassSpec(
            "cat",
            animals.cat,
            _CAT,
            ("plain", "striped", "spotted"),
            0.98,
            0.40,
            0.50,
            (0.0, 0.735, 0.275),
            (1.24, 0.39),
        ),
        ClassSpec(
            "teddybear",
            animals.teddybear,
            _TEDDY,
            ("plain", "striped", "spotted", "checked"),
            1.0,
            0.44,
            0.44,
            (0.0, 0.785, 0.255),
            (1.20, 0.36),
        ),
        ClassSpec(
            "tortoise plushy",
            animals.tortoise,
            _TORTOISE,
            ("plain", "striped", "spotted", "checked"),
            0.76,
            1.0,
            0.86,
            (-0.75, 0.645, 0.27),
            (0.70, 0.20),
            face=-1,
        ),
        ClassSpec(
            "flower",
            objects.flower,
            _FLOWER,
            ("plain", "striped", "spotted"),
            1.08,
            0.36,
            0.36,
            None,
            (1.42, 0.24),
        ),
        ClassSpec("wooden pot", objects.wooden_pot, _POT, ("plain", "striped", "spotted"), 0.88, 0.59, 0.59),
        ClassSpec("barn", objects.barn, _BARN, ("plain", "striped", "checked"), 1.06, 0.71, 0.68, face=-1),
        ClassSpec(
            "sunglasses",
            objects.sunglasses,
            _GLASSES,
            ("plain", "striped", "spotted"),
            0.52,
            1.05,
            1.05,
            plural="a pair of sunglasses",
        ),
    )
}

BACKGROUNDS: dict[str, BackgroundSpec] = {
    b.name: b
    for b in (
        BackgroundSpec("beach", "on the beach", places.beach),
        BackgroundSpec("meadow", "in a meadow", places.meadow),
        BackgroundSpec("snow", "in the snow", places.snow),
        BackgroundSpec("living room", "in a living room", places.living_room),
        BackgroundSpec("mountains", "in the mountains", places.mountains),
    )
}

RELATIONS: dict[str, RelationSpec] = {
    r.name: r
    for r in (
        RelationSpec("next to", 0.26),
        RelationSpec("to the left of", 0.15),
        RelationSpec("to the right of", 0.15),
        RelationSpec("in front of", 0.20),
        RelationSpec(
            "in", 0.12, frozenset(c.name for c in CLASSES.values() if c.potted), frozenset({"wooden pot"})
        ),
        RelationSpec(
            "wearing", 0.12, frozenset(c.name for c in CLASSES.values() if c.eyes), frozenset({"sunglasses"})
        ),
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


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Look:
    """What one thing looks like.  `mark`, `accent` and `EXCLUSIVE` colours are for individuals only."""

    cls: str
    colour: str
    pattern: str = "plain"
    size: str = "medium"
    mark: str | None = None
    accent: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if self.cls not in CLASSES:
            raise ValueError(f"unknown class {self.cls!r}; known: {sorted(CLASSES)}")
        for colour in (self.colour, self.accent):
            if colour is not None and colour not in CLASSES[self.cls].colours and colour not in EXCLUSIVE:
                raise ValueError(f"{self.cls} has no colour {colour!r}")
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; known: {list(SIZES)}")

    @property
    def individual(self) -> bool:
        """Whether this is the look of a particular individual."""
        return self.mark is not None or self.colour in EXCLUSIVE


@dataclass(frozen=True)
class Scene:
    """A background, one or two things, their relation (None: merely together), and the seed of all jitter."""

    background: str
    things: tuple[Look, ...]
    relation: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}; known: {sorted(BACKGROUNDS)}")
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has one or two things, not {len(self.things)}")
        if self.relation is None:
            return
        if self.relation not in RELATIONS or len(self.things) != 2:
            raise ValueError(
                f"relation {self.relation!r} of {len(self.things)} things; known: {list(RELATIONS)}"
            )
        rule = RELATIONS[self.relation]
        for look, allowed in zip(self.things, (rule.first, rule.second), strict=True):
            if allowed and look.cls not in allowed:
                raise ValueError(f"{look.cls!r} cannot take its part in {self.relation!r}")


@dataclass(frozen=True)
class Individual:
    """A particular thing, told from all others of its class by its look."""

    name: str
    cls: str
    look: Look
    description: str


def _one(name: str, cls: str, colour: str, mark: str, description: str) -> Individual:
    return Individual(name, cls, Look(cls, colour, mark=mark), description)


INDIVIDUALS: dict[str, Individual] = {
    i.name: i
    for i in (
        _one(
            "dog",
            "dog",
            "cream-teal",
            "heart and bandana",
            "a cream dog with brown ears, a teal bandana and a big brown heart on its chest",
        ),
        _one(
            "cat", "cat", "lavender", "star", "a lavender cat with dark violet ears and tail and a white star"
        ),
        _one(
            "teddybear",
            "teddybear",
            "mint-red",
            "bow and heart",
            "a mint green teddybear with a big red bow tie and a red heart on its belly",
        ),
        _one(
            "tortoise-plushy",
            "tortoise plushy",
            "pink-yellow",
            "dots",
            "a tortoise plushy with a pink shell and big yellow polka dots",
        ),
        _one(
            "flower",
            "flower",
            "violet-lime",
            "face",
            "a violet and lime green flower with a smiling yellow face",
        ),
        _one("wooden-pot", "wooden pot", "navy", "star", "a dark navy wooden pot with a big white star"),
        _one("barn", "barn", "teal-yellow", "star", "a teal barn with a large yellow star over its doors"),
        _one(
            "sunglasses",
            "sunglasses",
            "pink-orange",
            "hearts",
            "heart-shaped sunglasses, half pink and half orange",
        ),
    )
}


def place(
    individual: str, background: str, seed: int, others: Sequence[Look] = (), relation: str | None = None
) -> Scene:
    """A scene with an individual, alone or with one other look.

    The individual comes first, unless only the second part of the relation suits its class (a pot something
    is in, sunglasses someone is wearing).
    """
    look = INDIVIDUALS[individual].look
    things = (look, *others)
    if relation is not None and len(things) == 2:
        first = RELATIONS[relation].first
        if first and look.cls not in first:
            things = (things[1], look)
    return Scene(background, things, relation, seed)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _sample_look(cls: str, rng: np.random.Generator, *, sized: bool = True) -> Look:
    spec = CLASSES[cls]
    pattern = "plain" if rng.random() < 0.6 else _pick(rng, spec.patterns[1:])
    size = _pick(rng, ("small", "medium", "medium", "large")) if sized else "medium"
    return Look(cls, _pick(rng, tuple(spec.colours)), pattern, size)


def sample(seed: int | np.random.Generator, *, two: float = 0.65) -> Scene:
    """A random scene of generic things, never an individual; `two` is the chance of two (unlike) things."""
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    background, own = _pick(rng, tuple(BACKGROUNDS)), int(rng.integers(2**31))
    names = tuple(CLASSES)
    if rng.random() >= two:
        return Scene(background, (_sample_look(_pick(rng, names), rng),), None, own)
    relation = _sample_relation(rng)
    rule = RELATIONS[relation] if relation else RelationSpec("and", 0.0)
    first = _pick(rng, sorted(rule.first) or names)
    second = _pick(rng, [n for n in (sorted(rule.second) or names) if n != first])
    # In a pot or on a nose, a thing has the size that fits: captions must not call it large.
    sized = relation not in ("in", "wearing")
    looks = (
        _sample_look(first, rng, sized=sized or relation == "wearing"),
        _sample_look(second, rng, sized=sized),
    )
    return Scene(background, looks, relation, own)


def _sample_relation(rng: np.random.Generator) -> str | None:
    left = rng.random() * (sum(r.weight for r in RELATIONS.values()) + 0.04)
    for rule in RELATIONS.values():
        left -= rule.weight
        if left < 0:
            return rule.name
    return None


# ---------------------------------------------------------------- captions

_OPENINGS = ("a photo of", "a picture of", "an illustration of")


def caption(scene: Scene, rng: np.random.Generator, *, names: Sequence[str | None] = ()) -> str:
    """Words for a scene: always true, worded differently each time, often saying less than there is to see.

    `names` may give each thing's noun phrase instead of its class, as in "<rex> dog" (an article is added).
    """
    nouns = [_noun(look, rng, names[k] if k < len(names) else None) for k, look in enumerate(scene.things)]
    words = _join(scene, nouns, rng)
    if rng.random() < 0.7:
        words += " " + BACKGROUNDS[scene.background].phrase
    if rng.random() < 0.25:
        words = f"{_pick(rng, _OPENINGS)} {words}"
    return words


def _join(scene: Scene, nouns: list[str], rng: np.random.Generator) -> str:
    if len(nouns) == 1:
        return nouns[0]
    one, other = nouns
    relation, chance = scene.relation, rng.random()
    if relation is None or (relation == "next to" and chance < 0.2):
        return f"{one} and {other}" if rng.random() < 0.5 else f"{other} and {one}"
    if relation == "next to" and chance < 0.5:
        return f"{other} next to {one}"
    if relation in ("to the left of", "to the right of"):
        if chance < 0.1:
            return f"{one} and {other}"
        if chance < 0.2:
            return f"{one} next to {other}"
    return f"{one} {relation} {other}"


def _noun(look: Look, rng: np.random.Generator, name: str | None = None) -> str:
    """A noun phrase with its article; about 55% of the time it says nothing but the class."""
    says = rng.random() >= 0.55 and not look.individual and name is None
    bits: list[str] = []
    if says:
        chances = rng.random(3).tolist()
        known = (
            (look.size, look.size != "medium" and chances[0] < 0.6),
            (look.pattern, look.pattern != "plain" and chances[1] < 0.65),
            (look.colour, chances[2] < 0.75),
        )
        bits = [word for word, keep in known if keep] or [look.colour]
    plural = CLASSES[look.cls].plural
    if plural is not None and name is None:
        bare = " ".join([*bits, look.cls])
        return bare if rng.random() < 0.6 else f"a pair of {bare}"
    phrase = " ".join([*bits, name or look.cls])
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class _Placed:
    """A thing with its place in canvas pixels; `on` says how it is joined to the thing before it."""

    look: Look
    x: float
    ground: float
    height: float
    flip: bool = False
    on: str | None = None


def _reach(look: Look, flip: bool) -> tuple[float, float]:
    spec = CLASSES[look.cls]
    return (spec.right, spec.left) if flip else (spec.left, spec.right)


def _lay_out(scene: Scene, rng: np.random.Generator) -> list[_Placed]:
    """Where everything stands, in painting order."""
    if len(scene.things) == 1:
        return [_alone(scene.things[0], rng)]
    if scene.relation == "wearing":
        wearer = _alone(scene.things[0], rng)
        return [wearer, _worn(scene.things[1], wearer)]
    if scene.relation == "in":
        return _potted(scene.things, rng)
    if scene.relation == "in front of":
        return _in_front(scene.things, rng)
    first_left = scene.relation == "to the left of"
    if scene.relation in (None, "next to"):
        first_left = bool(rng.random() < 0.5)
    return _side_by_side(scene.things if first_left else scene.things[::-1], rng)


def _alone(look: Look, rng: np.random.Generator) -> _Placed:
    flip = bool(rng.random() < 0.5)
    left, right = _reach(look, flip)
    height = 67 * CLASSES[look.cls].height * SIZES[look.size] * rng.uniform(0.95, 1.05)
    height = min(height, 120 / (left + right), 92)
    spare = 124 - height * (left + right)
    x = 2 + height * left + spare * (0.5 + rng.uniform(-0.14, 0.14))
    return _Placed(look, x, 109 + 0.09 * (height - 60) + rng.uniform(-3, 3), height, flip)


def _heights(things: Sequence[Look], rng: np.random.Generator, unit: float) -> list[float]:
    return [unit * CLASSES[t.cls].height * SIZES[t.size] * rng.uniform(0.96, 1.04) for t in things]


def _side_by_side(things: Sequence[Look], rng: np.random.Generator) -> list[_Placed]:
    """Left thing, right thing, a gap between them, on about the same ground."""
    flips = [bool(f) for f in rng.random(2) < 0.5]
    heights = _heights(things, rng, 57)
    reach = [_reach(t, f) for t, f in zip(things, flips, strict=True)]
    gap = rng.uniform(0, 5)
    wide = sum(h * (a + b) for h, (a, b) in zip(heights, reach, strict=True))
    k = min(1.0, (123 - gap) / wide)
    heights = [h * k for h in heights]
    start = 2.5 + (123 - gap - k * wide) * rng.uniform(0.3, 0.7)
    ground, placed = 107 + rng.uniform(-3, 3), []
    for look, flip, height, (a, b) in zip(things, flips, heights, reach, strict=True):
        placed.append(_Placed(look, start + height * a, ground + rng.uniform(-2, 2), height, flip))
        start += height * (a + b) + gap
    return placed


def _in_front(things: Sequence[Look], rng: np.random.Generator) -> list[_Placed]:
    """The second thing further up and back, the first nearer and lower, hiding a corner of it."""
    near, far = things
    flips = [bool(f) for f in rng.random(2) < 0.5]
    near_left = bool(rng.random() < 0.5)
    if CLASSES[far.cls].face:
        flips[1] = near_left == (CLASSES[far.cls].face < 0)
    h_near, h_far = _heights(things, rng, 55)
    h_far *= 1.06
    (na, nb), (fa, fb) = _reach(near, flips[0]), _reach(far, flips[1])
    w_near, w_far = h_near * (na + nb), h_far * (fa + fb)
    overlap = rng.uniform(0.34, 0.46) * min(w_near, w_far)
    total = w_near + w_far - overlap
    k = min(1.0, 122 / total)
    h_near, h_far, w_near, w_far, overlap = (v * k for v in (h_near, h_far, w_near, w_far, overlap))
    start = 3 + (122 - k * total) * rng.uniform(0.3, 0.7)
    if near_left:
        x_near, x_far = start + h_near * na, start + w_near - overlap + h_far * fa
    else:
        x_far, x_near = start + h_far * fa, start + w_far - overlap + h_near * na
    back = 95 + rng.uniform(-2, 2)
    # A low thing must come far enough forward that it hides feet, not all, of the thing behind it.
    front = back + rng.uniform(15, 20)
    return [_Placed(far, x_far, back, h_far, flips[1]), _Placed(near, x_near, front, h_near, flips[0])]


def _potted(things: Sequence[Look], rng: np.random.Generator) -> list[_Placed]:
    inside, pot = things
    share, hidden = CLASSES[inside.cls].potted or (1.0, 0.3)
    height = 47 * rng.uniform(0.96, 1.04)
    stand = _Placed(pot, 64 + rng.uniform(-12, 12), 114 + rng.uniform(-3, 3), height)
    rim = stand.ground - (objects.POT_RIM_Y - 0.06) * height
    tall, flip = share * height * rng.uniform(0.97, 1.03), bool(rng.random() < 0.5)
    left, right = CLASSES[inside.cls].left, CLASSES[inside.cls].right
    # A lopsided thing is moved so that its middle, not its origin, is over the pot.
    lean = 0.6 * (right - left) / 2 * tall * (1 if flip else -1) if inside.cls == "tortoise plushy" else 0.0
    return [stand, _Placed(inside, stand.x + lean, rim + hidden * tall, tall, flip, "in")]


def _worn(glasses: Look, wearer: _Placed) -> _Placed:
    x, y, high = CLASSES[wearer.look.cls].eyes or (0.0, 0.8, 0.25)
    height = high * wearer.height
    middle = wearer.x + (-x if wearer.flip else x) * wearer.height
    return _Placed(glasses, middle, wearer.ground - y * wearer.height + 0.5 * height, height, False, "worn")


# ---------------------------------------------------------------- drawing


def _paint_of(look: Look) -> Paint:
    colours = CLASSES[look.cls].colours
    if look.colour in EXCLUSIVE:
        main, accent = EXCLUSIVE[look.colour]
    else:
        main = colours[look.colour]
        accent = darker(main, 0.34) if luma(main) > 75 else lighter(main, 0.16)
    if look.accent is not None:
        accent = EXCLUSIVE[look.accent][1] if look.accent in EXCLUSIVE else colours[look.accent]
    return Paint(main, accent, look.pattern, look.mark)


def draw(scene: Scene, size: int = CANVAS) -> Image.Image:
    """The picture of a scene: RGB, `size` x `size`; the same scene always gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    side, k = size * _FINE, size * _FINE / CANVAS
    image = Image.new("RGB", (side, side))
    placed = _lay_out(scene, rng)
    BACKGROUNDS[scene.background].paint(image, rng)
    pot: Brush | None = None
    for thing in placed:
        brush = Brush(image, thing.x * k, thing.ground * k, thing.height * k, thing.flip)
        if thing.on == "in" and pot is not None:
            _paint_behind(image, thing, brush, pot)
        elif thing.on == "worn":
            objects.spectacles(brush, _paint_of(thing.look))
        else:
            CLASSES[thing.look.cls].paint(brush, _paint_of(thing.look))
        pot = brush
    return image.reduce(_FINE)


def _paint_behind(image: Image.Image, thing: _Placed, brush: Brush, pot: Brush) -> None:
    """Paint a thing, then put the front of the pot it stands in back over it."""
    top = max(0, int(pot.ground - pot.height))
    kept = image.crop((0, top, *image.size))
    CLASSES[thing.look.cls].paint(brush, _paint_of(thing.look))
    mask = Image.new("L", kept.size)
    ImageDraw.Draw(mask).polygon([(x, y - top) for x, y in objects.pot_front(pot)], fill=255)
    image.paste(kept, (0, top), mask)
