"""The road as a stream: it can be stopped at every denoising step, and then leaves no trace."""

from pathlib import Path

import pytest

from iteris_sd import composer, scoring
from iteris_sd.backbone import Backbone
from iteris_sd.composer import Composition, MergeDone, Picture, Progress
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe
from tests import toybook

RECIPE = Recipe.of(
    {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "methods": [{"name": "base"}, {"name": "linear"}, {"name": "iteris"}],
        "seeds": [1],
        "steps": 2,
        "calibration": {"samples": 12, "steps": 3},
    }
)


def test_no_two_passes_of_the_unet_without_an_event(backbone: Backbone) -> None:
    passes: list[int] = []
    handle = backbone.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    events, since = [], []
    for event in composer.compose(RECIPE, Library.shipped()):
        events.append(event)
        since.append(len(passes))
        passes.clear()
    handle.remove()
    assert max(since) == 1 and sum(since) >= 3 * RECIPE.steps
    made = [type(event) for event in events if not isinstance(event, Progress)]
    assert made == [MergeDone, MergeDone, Picture, Picture, Picture, Composition]
    told = [event for event in events if isinstance(event, Progress)]
    assert all(0 <= event.done <= event.total and event.total > 0 for event in told)
    assert "Drawing IterIS, seed 1" in {event.stage for event in told}


def test_stopping_anywhere_leaves_no_trace(backbone: Backbone) -> None:
    before = toybook.trace(backbone)
    events = len(list(composer.compose(RECIPE, Library.shipped())))
    assert toybook.trace(backbone) == before
    for stop in (1, 4, events // 2, events - 2):
        work = composer.compose(RECIPE, Library.shipped())
        for _ in range(stop):
            next(work)
        work.close()
        assert toybook.trace(backbone) == before


def test_what_is_missing_is_told_before_the_work(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise UserError("There is no scorer.")

    monkeypatch.setattr(scoring, "load", absent)
    stages: set[str] = set()
    with pytest.raises(UserError, match="no scorer"):
        stages.update(e.stage for e in composer.compose(RECIPE, Library.shipped()) if isinstance(e, Progress))
    assert not any("Sampling" in stage or "Merging" in stage for stage in stages)
