"""PEFT's patterns of module names: the part of regular expressions that settings use, in time linear in a name.

Settings come from strangers, and Python's own engine can be made to search for hours. Here a state is a set of places
in the name, one bit of an integer each, and every step moves all of them at once: bit i is set where the pattern, as
far as it is read, can end before character i. Understood are literals, ``.``, ``\\d``, ``\\w``, classes, ``*``, ``+``
and ``?`` behind one of these (lazy ones too, which name the same), ``^``, ``$``, and groups with ``|``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from iteris_sd import limits
from iteris_sd.errors import UserError

_PIECE = re.compile(
    r"(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<bar>\|)|(?P<start>\^)|(?P<end>\$)"
    r"|(?P<one>\[\^?\]?[^\[\]\\]*\]|\\[dw]|\\[^\w\s]|\.|[\w/:-])(?P<repeat>[*+?]\??|)(?![*+?{])"
)


@dataclass(frozen=True)
class _One:
    """One character of a class, and how often: once, ``*``, ``+`` or ``?``."""

    holds: re.Pattern[str]
    repeat: str


_Step = _One | str | list[list["_Step"]]  # a character, "^" or "$", or a group's alternatives


@dataclass(frozen=True, eq=False)
class Pattern:
    """A pattern as PEFT means it: it names every module whose path ends with it, behind a dot or at the start."""

    alternatives: Sequence[Sequence[_Step]]

    def names(self, path: str) -> bool:
        """Whether it names the module at ``path``."""
        starts = 1 | sum(1 << (i + 1) for i, character in enumerate(path) if character == ".")
        return bool(_any(self.alternatives, starts, path) >> len(path))


@lru_cache(maxsize=limits.MAX_ALPHA_PATTERNS)
def read(text: str) -> Pattern:
    """The pattern that ``text`` spells. Raises UserError when it is longer than is read, or not all understood."""
    if len(text) > limits.MAX_PATTERN_CHARS:
        raise UserError(
            f"Its settings hold a pattern of {len(text):,} characters; at most {limits.MAX_PATTERN_CHARS} are read."
        )
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
            open_groups[-1][-1].append(_One(_class(piece["one"], text), piece["repeat"][:1]))
        else:
            open_groups[-1][-1].append(piece[0])
    if len(open_groups) > 1:
        raise _not_understood(text)
    return Pattern(open_groups[0])


def _class(one: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(one)
    except re.error as error:
        raise _not_understood(text) from error


def _not_understood(text: str) -> UserError:
    return UserError(
        f"Its settings hold the pattern {text!r}, of which not all is understood; write the names of the modules there."
    )


def _any(alternatives: Sequence[Sequence[_Step]], at: int, path: str) -> int:
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


def _moved(step: _Step, at: int, path: str) -> int:
    if isinstance(step, list):
        return _any(step, at, path)
    if step == "^":
        return at & 1
    if step == "$":
        return at & 1 << len(path)
    assert isinstance(step, _One)
    held = _held(step.holds, path)
    if step.repeat == "*":
        return _run(at, held)
    once = (at & held) << 1
    return _run(once, held) if step.repeat == "+" else at | once if step.repeat == "?" else once


def _run(at: int, held: int) -> int:
    """All places within reach over characters that are held: the sum's carry goes through each run of ones at once
    (MatchStar of Cameron et al., Bitwise data parallelism in regular expression matching, 2014)."""
    return (((at & held) + held) ^ held) | at


@lru_cache(maxsize=1024)  # the classes that the patterns of one file hold, for a few names
def _held(holds: re.Pattern[str], path: str) -> int:
    """The characters of ``path`` that a class holds, one bit each."""
    return sum(1 << i for i, character in enumerate(path) if holds.match(character))
