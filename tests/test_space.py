"""A public page: its bounds, seconds of a lent GPU, and events that can leave the process they were made in."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from iteris_sd import limits, serving, weights
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Composition
from iteris_sd.recipe import Recipe
from iteris_sd.ui import space


def recipe(**changes: Any) -> Recipe:
    told = {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "seeds": [0],
        "steps": 2,
        "calibration": {"samples": 2, "steps": 2},
    }
    return Recipe.of(told | changes)


def lent(wrap: Callable[..., Any]) -> ModuleType:
    """A stand-in for the library of lent GPUs: what a worker yields is pickled on its way."""
    module = ModuleType("spaces")
    module.__spec__ = type("Spec", (), {"name": "spaces"})()
    module.GPU = wrap  # type: ignore[attr-defined]
    return module


@pytest.fixture
def zero_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A lent GPU; the seconds that were asked for."""
    seconds: list[int] = []

    def wrap(duration: Callable[..., int]) -> Callable[..., Any]:
        def around(work: Callable[..., Generator]) -> Callable[..., Generator]:
            def called(*given: Any) -> Generator:
                seconds.append(duration(*given))
                for event in work(*pickle.loads(pickle.dumps(given))):
                    yield pickle.loads(pickle.dumps(event))

            return called

        return around

    monkeypatch.setitem(sys.modules, "spaces", lent(wrap))
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    space._on_lent_gpu.cache_clear()
    yield seconds
    space._on_lent_gpu.cache_clear()


def test_events_come_out_of_the_worker_whole(toy: Path, zero_gpu: list[int]) -> None:
    assert space.lent()
    events = list(space.events(recipe(), Library.shipped()))
    made = events[-1]
    assert isinstance(made, Composition) and len(made.pictures) == 3
    assert all(adapter.up.device.type == "cpu" for adapter in made.merged["iteris"].lora.values())
    assert zero_gpu == [space.duration(recipe(), Library.shipped())]


def test_without_a_lent_gpu_nothing_is_wrapped(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert not space.lent()
    space.prepare()  # loads nothing
    assert isinstance(list(space.events(recipe(), Library.shipped()))[-1], Composition)


def test_more_work_asks_for_more_seconds_up_to_a_bound(toy: Path) -> None:
    library = Library.shipped()
    few, many = recipe(steps=10), recipe(steps=10, seeds=[0, 1, 2, 3])
    assert 0 < space.duration(few, library) < space.duration(many, library)
    most = recipe(steps=100, seeds=list(range(16)), size=1024)
    assert space.duration(most, library) == limits.MAX_GPU_SECONDS


def test_a_public_page_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    large = recipe(seeds=list(range(16)))
    space.check(large)
    assert not weights.safety_wanted()
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    with pytest.raises(UserError, match="draws at most 32 pictures at once, not 48; ask for fewer"):
        space.check(large)
    with pytest.raises(UserError, match="at most 50 steps at once, not 60"):
        space.check(recipe(steps=60))
    assert weights.safety_wanted()
    monkeypatch.setenv("ITERIS_SD_SAFETY", "off")
    assert not weights.safety_wanted()


def test_a_public_link_is_as_public_as_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setenv("ITERIS_SD_PUBLIC", "")
    monkeypatch.delenv("ITERIS_SD_PUBLIC")  # what is set from here on goes with the test
    assert not serving.public()
    serving.go_public()
    assert serving.public() and weights.safety_wanted()
    with pytest.raises(UserError, match="This public page"):
        space.check(recipe(steps=60))
