"""The sheet of all pictures says how they were made."""

from __future__ import annotations

import pytest

from iteris_sd.events import Composition
from iteris_sd.grid import _note, grid
from iteris_sd.recipe import Recipe


def composed(strength: float) -> Composition:
    """A composition of which nothing was drawn."""
    told = {"concepts": [{"name": "dog"}], "prompt": "a {0}", "seeds": [3], "strength": strength}
    return Composition(Recipe.of(told), (), {}, (), "S")


@pytest.mark.parametrize(("strength", "told"), [(1, False), (0.5, True)])
def test_a_strength_is_said_where_it_is_not_as_usual(strength: float, told: bool) -> None:
    assert (f", strength {strength:g}." in _note(composed(strength))) is told


def test_two_strengths_can_be_told_apart() -> None:
    assert grid(composed(0.5)).tobytes() != grid(composed(1)).tobytes()
