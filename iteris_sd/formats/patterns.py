"""PEFT's patterns of module names: the part of regular expressions that settings use, in time linear in a name.

Settings come from strangers, and Python's own engine can be made to search for hours. Here a state is a set of places
in the name, one bit of an integer each, and every step moves all of them at once: bit i is set where the pattern, as
far as it is read, can end before character i. Understood are literals, ``.``, ``\\d``, ``\\w``, classes, ``*``, ``+``
and ``?`` behind one of these (lazy ones too, which name the same), ``^``, ``$``, and groups with ``|``.

What nearly all settings hold are plain names, one for each layer. They have one length, so that Python's engine has
one place to compare at, and nothing to search for.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import accumulate
from operator import or_
from typing import Protocol

from iteris_sd import limits
from iteris_sd.errors import UserError

_PIECE = re.compile(
    r"(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<bar>\|)|(?P<start>\^)|(?P<end>\$)"
    r"|(?P<one>\[\^?\]?[^\[\]\\]*\]|\\[dw]|\\[^\w\s]|\.|[\w/:-])(?P<repeat>[*+?]\??|)(?![*+?{])"
)
_RANGE = re.compile(r"(?P<low>.)-(?P<high>.)|(?P<only>.)", re.DOTALL)
_PLAIN = re.compile(r"\^?(?P<name>(?:[\w/:.-]|\\[^\w\s])+)\$?")


@dataclass(frozen=True)
class _One:
    """One character, in a class's ranges or ``outside`` them, and how often: once, ``*``, ``+`` or ``?``."""

    spelled: str
    ranges: Sequence[tuple[str, str]]
    outside: bool
    repeat: str


_Step = _One | str | list[list["_Step"]]  # a character, "^" or "$", or a group's alternatives


class Pattern(Protocol):
    """A pattern as PEFT means it: it names every module whose path ends with it, behind a dot or at the start.

    ``work``: what looking at one module costs, in characters of expressions.
    """

    @property
    def work(self) -> int: ...

    def names(self, path: str) -> bool:
        """Whether it names the module at ``path``."""


@dataclass(frozen=True, eq=False)
class _Plain:
    """A pattern without choices: ``spelled`` holds ``length`` characters."""

    spelled: re.Pattern[str]
    length: int
    work: int = 1

    def names(self, path: str) -> bool:
        start = len(path) - self.length
        begins = start == 0 or (start > 0 and path[start - 1] == ".")
        return begins and self.spelled.fullmatch(path, start) is not None


@dataclass(frozen=True, eq=False)
class _Expression:
    alternatives: Sequence[Sequence[_Step]]
    work: int

    def names(self, path: str) -> bool:
        place = _place(path)
        return bool(_any(self.alternatives, place.starts, place) >> place.length)


class _Place:
    """A module's path: which of its characters, one bit each, are those of a class."""

    def __init__(self, path: str) -> None:
        self.length = len(path)
        places: dict[str, int] = {}
        for i, character in enumerate(path):
            places[character] = places.get(character, 0) | 1 << i
        self._characters = sorted(places)
        self._before = list(accumulate(map(places.__getitem__, self._characters), or_, initial=0))
        self._all = self._before[-1]
        self.starts = 1 | places.get(".", 0) << 1
        self._held = {
            ".": self._all & ~places.get("\n", 0),
            r"\d": sum(bits for character, bits in places.items() if character.isdecimal()),
            r"\w": sum(bits for character, bits in places.items() if character.isalnum() or character == "_"),
        }

    def held(self, one: _One) -> int:
        """The characters that a class holds; each is looked at once, as patterns of one file are much alike."""
        found = self._held.get(one.spelled)
        if found is None:
            found = reduce(or_, (self._within(*ends) for ends in one.ranges))
            found = self._held[one.spelled] = self._all ^ found if one.outside else found
        return found

    def _within(self, low: str, high: str) -> int:
        """The characters from ``low`` to ``high``, in time that does not grow with how many there are."""
        return (
            self._before[bisect_right(self._characters, high)]
            ^ self._before[bisect_left(self._characters, low)]
        )


@lru_cache(maxsize=2)  # all patterns are compared with one layer before the next, which has two paths
def _place(path: str) -> _Place:
    return _Place(path)


@lru_cache(maxsize=limits.MAX_ALPHA_PATTERNS)
def read(text: str) -> Pattern:
    """The pattern that ``text`` spells. Raises UserError when it is longer than is read, or not all understood."""
    if len(text) > limits.MAX_PATTERN_CHARS:
        raise UserError(
            f"Its settings hold a pattern of {len(text):,} characters; at most {limits.MAX_PATTERN_CHARS} are read."
        )
    plain = _PLAIN.fullmatch(text)
    if plain is not None:
        return _Plain(re.compile(text), len(re.sub(r"\\.", ".", plain["name"])))
    return _Expression(_parsed(text), len(text))


def _parsed(text: str) -> list[list[_Step]]:
    """The alternatives that a pattern spells."""
    open_groups: list[list[list[_Step]]] = [[[]]]
    end = 0
    while end < len(text):
        piece = _PIECE.match(text, end)
        if piece is None or (piece["close"] and len(open_groups) == 1):
            raise _not_understood(text)
        end = piece.end()
        if piece["open"]:
            open_groups.append([[]])
        elif piece["close"]:
            group = open_groups.pop()
            open_groups[-1][-1].append(group)
            if text[end : end + 1] in ("*", "+", "?", "{"):
                raise _not_understood(text)
        elif piece["bar"]:
            open_groups[-1].append([])
        elif piece["one"]:
            open_groups[-1][-1].append(_one(piece["one"], piece["repeat"][:1], text))
        else:
            open_groups[-1][-1].append(piece[0])
    if len(open_groups) > 1:
        raise _not_understood(text)
    return open_groups[0]


def _one(spelled: str, repeat: str, text: str) -> _One:
    """A class of ``text``, or a character of its own, which is a class of one."""
    outside = spelled.startswith("[^")
    body = spelled[2 if outside else 1 : -1] if spelled.startswith("[") else spelled[-1]
    ranges = [
        (found["low"] or found["only"], found["high"] or found["only"]) for found in _RANGE.finditer(body)
    ]
    if not ranges or any(low > high for low, high in ranges):
        raise _not_understood(text)
    return _One(spelled, ranges, outside, repeat)


def _not_understood(text: str) -> UserError:
    return UserError(
        f"Its settings hold the pattern {text!r}, of which not all is understood; write the names of the modules there."
    )


def _any(alternatives: Sequence[Sequence[_Step]], at: int, path: _Place) -> int:
    """The places that any of the alternatives leads to."""
    reached = 0
    for steps in alternatives:
        places = at
        for step in steps:
            if not places:
                break
            places = _moved(step, places, path)
        reached |= places
    return reached


def _moved(step: _Step, at: int, path: _Place) -> int:
    if isinstance(step, list):
        return _any(step, at, path)
    if step == "^":
        return at & 1
    if step == "$":
        return at & 1 << path.length
    assert isinstance(step, _One)
    held = path.held(step)
    if step.repeat == "*":
        return _run(at, held)
    once = (at & held) << 1
    return _run(once, held) if step.repeat == "+" else at | once if step.repeat == "?" else once


def _run(at: int, held: int) -> int:
    """All places within reach over characters that are held: the sum's carry goes through each run of ones at once
    (MatchStar of Cameron et al., Bitwise data parallelism in regular expression matching, 2014)."""
    return (((at & held) + held) ^ held) | at
