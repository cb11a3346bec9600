"""Scenes: what is in a picture, as values; the eight individuals; and scenes drawn by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iteris_sd.storybook.world.catalogue import BACKGROUNDS, CLASSES, COLOURS, RELATIONS, SIZES, UNNAMED
from iteris_sd.storybook.world.painting.light import TIMES

STYLES = ("plain", "watercolour")
MAX_THINGS = 3


@dataclass(frozen=True)
class Look:
    """What one thing looks like.  `mark`, `accent` and `UNNAMED` colours are for individuals only."""

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
            if colour is not None and colour not in CLASSES[self.cls].colours and colour not in UNNAMED:
                raise ValueError(f"{self.cls} has no colour {colour!r}")
        if self.mark == "badge" and CLASSES[self.cls].badge is None:
            raise ValueError(f"{self.cls} bears no badge")
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; known: {list(SIZES)}")

    @property
    def individual(self) -> bool:
        """Whether this is the look of a particular individual."""
        return self.mark is not None or self.colour in UNNAMED


@dataclass(frozen=True)
class Scene:
    """A place, one to three things, the relation of the first to the second, and the seed of all jitter.

    Without a relation the things are merely together.  A third thing stands beside the others.
    """

    background: str
    things: tuple[Look, ...]
    relation: str | None = None
    seed: int = 0
    time: str = "day"
    style: str = "plain"

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        for what, value, known in (
            ("background", self.background, BACKGROUNDS),
            ("time", self.time, TIMES),
            ("style", self.style, STYLES),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; known: {sorted(known)}")
        if not 1 <= len(self.things) <= MAX_THINGS:
            raise ValueError(f"a scene has one to {MAX_THINGS} things, not {len(self.things)}")
        if self.relation is None:
            return
        if self.relation not in RELATIONS or len(self.things) < 2:
            raise ValueError(
                f"relation {self.relation!r} of {len(self.things)} things; known: {list(RELATIONS)}"
            )
        rule = RELATIONS[self.relation]
        if len(self.things) > 2 and not rule.joined:
            raise ValueError(f"three things cannot be in relation {self.relation!r}")
        for look, allowed in zip(self.things, (rule.first, rule.second), strict=False):
            if allowed and look.cls not in allowed:
                raise ValueError(f"{look.cls!r} cannot take its part in {self.relation!r}")

    @property
    def held_out(self) -> bool:
        """Whether one of its things is a combination that is kept from training."""
        return any(held_out(look.cls, look.colour, self.background) for look in self.things)


def held_out(cls: str, colour: str, background: str) -> bool:
    """Whether a class x colour x background combination is never drawn in training (one in thirteen)."""
    if colour not in COLOURS:
        return False
    places = list(BACKGROUNDS).index(background), list(CLASSES).index(cls), COLOURS.index(colour)
    return (5 * places[0] + 7 * places[1] + 3 * places[2]) % 13 == 0


# ---------------------------------------------------------------- individuals


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
    individual: str,
    background: str,
    seed: int,
    others: Sequence[Look] = (),
    relation: str | None = None,
    time: str = "day",
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
    return Scene(background, things, relation, seed, time)


# ---------------------------------------------------------------- chance

_COUNTS = (0.26, 0.61, 0.13)  # how often one, two, three things
_TIMES = {"day": 0.70, "morning": 0.08, "sunset": 0.12, "night": 0.10}
_WATERCOLOUR = 0.10
_PATTERNED = 0.28


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def sample_look(
    cls: str, background: str, rng: np.random.Generator, *, sized: bool = True, unseen: bool = False
) -> Look:
    """A random look of a class; `unseen`: in one of the colours held out here, where there is one."""
    spec = CLASSES[cls]
    pattern = "plain" if rng.random() >= _PATTERNED else _pick(rng, spec.patterns[1:])
    size = _pick(rng, ("small", "medium", "medium", "large")) if sized else "medium"
    fitting = [c for c in spec.colours if held_out(cls, c, background) == unseen]
    return Look(cls, _pick(rng, fitting or tuple(spec.colours)), pattern, size)


def sample(
    seed: int | np.random.Generator, *, count: int | None = None, unseen: bool = False, calm: bool = False
) -> Scene:
    """A random scene of generic things, never an individual; `count` things, by chance if not given.

    `unseen`: every thing in a held-out colour where its class has one here; otherwise none is held out.
    `calm`: by day, in the plain style, no patterns.
    """
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    background, own = _pick(rng, tuple(BACKGROUNDS)), int(rng.integers(2**31))
    time = str(rng.choice(list(_TIMES), p=list(_TIMES.values())))
    style = STYLES[int(rng.random() < _WATERCOLOUR)]
    drawn = 1 + int(rng.choice(len(_COUNTS), p=_COUNTS))
    kinds, relation = _sample_kinds(rng, count or drawn)
    joined = relation is not None and RELATIONS[relation].joined
    looks = []
    for k, cls in enumerate(kinds):
        # In a pot, on a roof or on a nose, a thing has the size that fits: captions must not call it large.
        sized = not joined or (relation == "wearing" and k == 0 and len(kinds) == 2)
        looks.append(sample_look(cls, background, rng, sized=sized and len(kinds) < 3, unseen=unseen))
    if calm:
        time, style = "day", "plain"
        looks = [Look(look.cls, look.colour, "plain", look.size) for look in looks]
    return Scene(background, tuple(looks), relation, own, time, style)


def _sample_kinds(rng: np.random.Generator, count: int) -> tuple[list[str], str | None]:
    """The classes of `count` unlike things, and the relation of the first two."""
    names = list(CLASSES)
    if count == 1:
        return [_pick(rng, names)], None
    relation = _sample_relation(rng, joined=count > 2)
    rule = RELATIONS[relation] if relation else None
    first = _pick(rng, sorted(rule.first) if rule and rule.first else names)
    second = _pick(rng, [n for n in (sorted(rule.second) if rule and rule.second else names) if n != first])
    kinds = [first, second]
    while len(kinds) < count:
        kinds.append(_pick(rng, [n for n in names if n not in kinds]))
    return kinds, relation


def _sample_relation(rng: np.random.Generator, *, joined: bool) -> str | None:
    """A relation by weight; `joined`: one that leaves room for a third thing, or none."""
    rules = [r for r in RELATIONS.values() if r.joined or not joined]
    weights = [r.weight for r in rules] + [0.3 if joined else 0.04]
    chosen = int(rng.choice(len(weights), p=np.array(weights) / sum(weights)))
    return rules[chosen].name if chosen < len(rules) else None
