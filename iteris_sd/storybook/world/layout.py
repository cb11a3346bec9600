"""Where everything in a scene stands, in pixels of a 128 px canvas, in painting order.

Things that are joined (in a pot, on a roof, on a nose) form one group, which is placed as one thing is: its base
is laid out, and the other is put where it belongs on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from iteris_sd.storybook.world.catalogue import CLASSES, RELATIONS, SIZES
from iteris_sd.storybook.world.painting import objects
from iteris_sd.storybook.world.scenes import Look, Scene

CANVAS = 128
_MARGIN = 2.5


@dataclass(frozen=True)
class Placed:
    """A thing with its place; `on` says how it is joined to the thing placed before it."""

    look: Look
    x: float
    ground: float
    height: float
    flip: bool = False
    on: str | None = None

    @property
    def middle(self) -> float:
        """The middle of what it covers from left to right."""
        left, right = _reach(self.look, self.flip)
        return self.x + self.height * (right - left) / 2


@dataclass(frozen=True)
class _Group:
    """A base, and what is joined to it; `size` is the base's height before it is fitted to the picture."""

    base: Look
    size: float
    flip: bool
    joined: Look | None = None
    how: str | None = None

    def at(self, x: float, ground: float, scale: float) -> list[Placed]:
        """The base with its foot at (x, ground), and the other on it, `scale` times their sizes."""
        stand = Placed(self.base, x, ground, self.size * scale, self.flip)
        if self.joined is None:
            return [stand]
        return [stand, _JOINTS[self.how or ""](self.joined, stand)]

    def extent(self) -> tuple[float, float, float]:
        """How far it reaches left, right and up from its foot, at scale 1."""
        placed = self.at(0.0, 0.0, 1.0)
        sides = [(p, *_reach(p.look, p.flip)) for p in placed]
        return (
            max(a * p.height - p.x for p, a, _ in sides),
            max(b * p.height + p.x for p, _, b in sides),
            max(p.height - p.ground for p in placed),
        )


def lay_out(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Where everything stands."""
    rule = RELATIONS[scene.relation] if scene.relation else None
    joined = rule is not None and rule.joined
    if scene.relation == "in front of":
        return _in_front(scene.things, rng)
    first = [_joined(scene.things, rule.name, rng)] if rule and joined else []
    groups = first + [_single(look, rng) for look in scene.things[2 if joined else 0 :]]
    if len(groups) == 1:
        return _alone(groups[0], rng)
    if scene.relation == "to the right of":
        groups.reverse()
    elif scene.relation != "to the left of":
        groups = [groups[k] for k in rng.permutation(len(groups))]
    return _side_by_side(groups, rng)


def _reach(look: Look, flip: bool) -> tuple[float, float]:
    spec = CLASSES[look.cls]
    return (spec.right, spec.left) if flip else (spec.left, spec.right)


def _single(look: Look, rng: np.random.Generator) -> _Group:
    size = 57 * CLASSES[look.cls].height * SIZES[look.size] * rng.uniform(0.96, 1.04)
    return _Group(look, size, bool(rng.random() < 0.5))


def _joined(things: Sequence[Look], how: str, rng: np.random.Generator) -> _Group:
    """The first two things as one group."""
    one, other = things[:2]
    base, joined = (one, other) if how == "wearing" else (other, one)
    room = {"wearing": 57.0, "in": 47.0, "on top of": 46.0}[how] * rng.uniform(0.96, 1.04)
    high = 1.0 if how == "in" else CLASSES[base.cls].height * SIZES[base.size]
    return _Group(base, room * high, bool(rng.random() < 0.5), joined, how)


def _alone(group: _Group, rng: np.random.Generator) -> list[Placed]:
    """One group near the middle, as large as looks well."""
    left, right, up = group.extent()
    scale = 67 / 57 * rng.uniform(0.96, 1.04)
    scale = min(scale, 120 / (left + right), (92 if group.joined is None else 98) / up)
    spare = 124 - scale * (left + right)
    x = 2 + scale * left + spare * (0.5 + rng.uniform(-0.14, 0.14))
    ground = 109 + 0.09 * (scale * group.size - 60) + rng.uniform(-3, 3)
    return group.at(x, ground, scale)


def _side_by_side(groups: Sequence[_Group], rng: np.random.Generator) -> list[Placed]:
    """From left to right with small gaps, on about the same ground."""
    extents = [g.extent() for g in groups]
    gaps = rng.uniform(0, 5) * (len(groups) - 1)
    wide = sum(left + right for left, right, _ in extents)
    scale = min(1.0, (CANVAS - 2 * _MARGIN - gaps) / wide, 92 / max(up for *_, up in extents))
    start = _MARGIN + (CANVAS - 2 * _MARGIN - gaps - scale * wide) * rng.uniform(0.3, 0.7)
    ground, placed = 107 + rng.uniform(-3, 3), []
    for group, (left, right, _) in zip(groups, extents, strict=True):
        placed += group.at(start + scale * left, ground + rng.uniform(-2, 2), scale)
        start += scale * (left + right) + gaps / (len(groups) - 1)
    return placed


def _in_front(things: Sequence[Look], rng: np.random.Generator) -> list[Placed]:
    """The second thing further up and back, the first nearer and lower, hiding a corner of it."""
    near, far = (_single(look, rng) for look in things)
    near_left = bool(rng.random() < 0.5)
    if CLASSES[far.base.cls].face:
        far = replace(far, flip=near_left == (CLASSES[far.base.cls].face < 0))
    far = replace(far, size=1.06 * far.size)
    (na, nb, _), (fa, fb, _) = near.extent(), far.extent()
    overlap = rng.uniform(0.34, 0.46) * min(na + nb, fa + fb)
    total = na + nb + fa + fb - overlap
    scale = min(0.965, 122 / total)
    start = 3 + (122 - scale * total) * rng.uniform(0.3, 0.7)
    if near_left:
        x_near, x_far = start + scale * na, start + scale * (na + nb - overlap + fa)
    else:
        x_far, x_near = start + scale * fa, start + scale * (fa + fb - overlap + na)
    back = 95 + rng.uniform(-2, 2)
    # A low thing must come far enough forward that it hides feet, not all, of the thing behind it.
    front = back + rng.uniform(15, 20)
    return far.at(x_far, back, scale) + near.at(x_near, front, scale)


def _in_pot(inside: Look, pot: Placed) -> Placed:
    share, hidden = CLASSES[inside.cls].potted or (1.0, 0.3)
    tall = share * pot.height
    left, right = CLASSES[inside.cls].left, CLASSES[inside.cls].right
    # A lopsided thing is moved so that its middle, not its origin, is over the pot.
    lopsided = inside.cls in ("tortoise plushy", "duck")
    lean = 0.6 * (left - right) / 2 * tall if lopsided else 0.0
    rim = pot.ground - (objects.POT_RIM_Y - 0.06) * pot.height
    return Placed(inside, pot.x + (-lean if pot.flip else lean), rim + hidden * tall, tall, pot.flip, "in")


def _on_top(thing: Look, support: Placed) -> Placed:
    x, y = CLASSES[support.look.cls].top or (0.0, 1.0)
    height = 41 * CLASSES[thing.cls].height * support.height / (46 * CLASSES[support.look.cls].height)
    middle = support.x + (-x if support.flip else x) * support.height
    return Placed(thing, middle, support.ground - y * support.height, height, support.flip, "on top of")


def _worn(glasses: Look, wearer: Placed) -> Placed:
    x, y, high = CLASSES[wearer.look.cls].eyes or (0.0, 0.8, 0.25)
    height = high * wearer.height
    middle = wearer.x + (-x if wearer.flip else x) * wearer.height
    return Placed(glasses, middle, wearer.ground - y * wearer.height + 0.5 * height, height, False, "wearing")


_JOINTS = {"in": _in_pot, "on top of": _on_top, "wearing": _worn}
