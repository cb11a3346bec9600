"""What a caption says of a scene: always true, worded differently each time, often less than there is to see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iteris_sd.storybook.world.catalogue import BACKGROUNDS, CLASSES, RELATIONS
from iteris_sd.storybook.world.painting.light import TIMES
from iteris_sd.storybook.world.scenes import Look, Scene

_OPENINGS = {
    "plain": ("a photo of", "a picture of", "an illustration of"),
    "watercolour": ("a watercolour of", "a watercolour painting of"),
}


def caption(
    scene: Scene, rng: np.random.Generator, *, names: Sequence[str | None] = (), full: bool = False
) -> str:
    """Words for a scene.

    `names` may give each thing's noun phrase instead of its class, as in "<rex> dog" (an article is added).
    `full` says all there is to say.
    """
    nouns = [
        _noun(look, rng, names[k] if k < len(names) else None, full) for k, look in enumerate(scene.things)
    ]
    words = _join(scene, nouns, rng, full)
    if full or rng.random() < 0.75:
        words += " " + BACKGROUNDS[scene.background].phrase
    if scene.time != "day" and (full or rng.random() < 0.85):
        words += " " + TIMES[scene.time].phrase
    if scene.style != "plain" or rng.random() < 0.2:
        openings = _OPENINGS[scene.style]
        words = f"{openings[int(rng.integers(len(openings)))]} {words}"
    return words


def _join(scene: Scene, nouns: list[str], rng: np.random.Generator, full: bool) -> str:
    if len(nouns) == 1:
        return nouns[0]
    relation, chance = scene.relation, 1.0 if full else rng.random()
    if relation is None:
        shuffled = [nouns[k] for k in rng.permutation(len(nouns))]
        return f"{', '.join(shuffled[:-1])} and {shuffled[-1]}"
    one, other, *rest = nouns
    wordings = RELATIONS[relation].wordings
    said = wordings[int(rng.random() * rng.random() * len(wordings))]  # the first of them most often
    if relation == "next to" and chance < 0.5:
        one, other = other, one
        said = "and" if chance < 0.2 else said
    elif relation in ("to the left of", "to the right of") and chance < 0.2:
        said = "and" if chance < 0.1 else "next to"
    elif relation == "in front of" and scene.things[0].cls in _SITTING and rng.random() < 0.25:
        said = "sitting in front of"
    words = f"{one} {said} {other}"
    return f"{words} {'and' if rng.random() < 0.5 else 'next to'} {rest[0]}" if rest else words


_SITTING = frozenset({"dog", "cat", "teddybear", "rabbit"})


def _noun(look: Look, rng: np.random.Generator, name: str | None, full: bool) -> str:
    """A noun phrase with its article; often it says nothing but the class."""
    says = (full or rng.random() < 0.6) and not look.individual and name is None
    bits: list[str] = []
    if says:
        chances = [0.0] * 3 if full else rng.random(3).tolist()
        known = (
            (look.size, look.size != "medium" and chances[0] < 0.6),
            (look.pattern, look.pattern != "plain" and chances[1] < 0.65),
            (look.colour, chances[2] < 0.85),
        )
        bits = [word for word, keep in known if keep] or [look.colour]
    phrase = " ".join([*bits, name or look.cls])
    if CLASSES[look.cls].plural is not None:
        return phrase if rng.random() < 0.6 else f"a pair of {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
