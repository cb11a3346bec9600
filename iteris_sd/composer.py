"""The one road: Recipe → concepts → moments → merge → LoRA → pictures → scores, as a stream of events.

`compose` is a generator. It yields an event at least once per denoising step, so closing it stops the work within
one; the model is then as it was before.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from iteris_sd import bases
from iteris_sd.columns import (
    Column,
    in_plain_words,
    of_grid,
    of_retention,
    prompt_in_plain_words,
    weighted,
)
from iteris_sd.concepts import Library, Loaded
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, Event, Picture, Preview, Progress
from iteris_sd.generators import relayed
from iteris_sd.merger import all_tokens, begun, merged_by_all
from iteris_sd.recipe import Recipe, title

if TYPE_CHECKING:
    from iteris_sd.backbone import Backbone
    from iteris_sd.calibration import Merged
    from iteris_sd.previewing import Previewer
    from iteris_sd.rendering import Settings
    from iteris_sd.scoring import NoScorer, Scorer


@dataclass(frozen=True, eq=False)
class _Scene:
    """One prompt by several columns: the composition, whose `name` is empty, or one concept alone.

    `text`: what the scorer reads; `references`: what `scorer.reference` made of the pictures of each concept in it.
    """

    name: str
    columns: Sequence[Column]
    seeds: Sequence[int]
    text: str
    references: Mapping[str, Any]


def compose(
    recipe: Recipe, library: Library, *, previews: bool = False
) -> Generator[Event, None, Composition]:
    """Do everything a recipe asks for; the last event is the Composition, which is also returned.

    `previews`: show now and then what a picture looks like while it is drawn. Raises UserError before any work is lost.
    """
    from iteris_sd import previewing

    started = time.perf_counter()
    picked, backbone = yield from begun(recipe, library)
    yield Progress("Loading the scorer", 0, 1)
    scorer = _scorer(recipe)
    references = {
        one.concept.name: scorer.reference(shown) for one in picked if (shown := one.concept.pictures())
    }
    pictures: list[Picture] = []
    with backbone.prepared(all_tokens(picked), clip_skip=recipe.clip_skip):
        merging = time.perf_counter()
        merged = yield from merged_by_all(backbone, recipe, picked)
        drawing = time.perf_counter()
        previewer = previewing.Previewer(backbone) if previews else None
        for scene in _scenes(recipe, picked, merged, references):
            pictures += yield from _drawn(backbone, recipe, scene, scorer, previewer)
    ended = time.perf_counter()
    seconds = {"loading": merging - started, "merging": drawing - merging, "drawing": ended - drawing}
    composed, retained = ([p for p in pictures if bool(p.scene) == of_one] for of_one in (False, True))
    made = Composition(recipe, tuple(picked), merged, tuple(composed), scorer.name, seconds, tuple(retained))
    yield made
    return made


def _scorer(recipe: Recipe) -> Scorer | NoScorer:
    """The scorer that a recipe asks for.

    Where the base model's own is to be downloaded and cannot be, pictures go unscored, and say so.
    """
    from iteris_sd import scoring

    if recipe.scorer == "none":
        return scoring.NoScorer("nobody: no scorer was asked for")
    if recipe.scorer:
        return scoring.load(recipe.scorer)
    own = bases.find(recipe.base).scorer
    try:
        return scoring.load(own)
    except UserError as error:
        if scoring.SCORERS[own].pretrained is None:
            raise
        return scoring.NoScorer(f"nobody: {error}")


def _scenes(
    recipe: Recipe, picked: Sequence[Loaded], merged: Mapping[str, Merged], references: Mapping[str, Any]
) -> list[_Scene]:
    """The composition, and each concept alone where that was asked for."""
    whole = prompt_in_plain_words(recipe, picked)
    adapters = {name: one.lora.scaled(recipe.strength) for name, one in merged.items()}
    scenes = [_Scene("", of_grid(recipe, picked, adapters), recipe.seeds, whole, references)]
    if not recipe.retained:
        return scenes
    for use, one, lora in zip(recipe.concepts, picked, weighted(recipe, picked), strict=True):
        columns = of_retention(recipe, use.name, one, lora, adapters)
        own = {name: shown for name, shown in references.items() if name == one.concept.name}
        scenes.append(_Scene(use.name, columns, recipe.retained, in_plain_words(columns[0], one), own))
    return scenes


def _drawn(
    backbone: Backbone,
    recipe: Recipe,
    scene: _Scene,
    scorer: Scorer | NoScorer,
    previewer: Previewer | None,
) -> Generator[Progress | Picture, None, list[Picture]]:
    """The pictures of a scene with their scores: seeds in batches, and columns too where few seeds leave room."""
    from iteris_sd import rendering

    settings = rendering.Settings(recipe.sampler, recipe.steps, recipe.guidance, recipe.size)
    most, made = rendering.together(backbone, settings), []
    for some, seeds in rendering.batches(len(scene.columns), scene.seeds, most):
        columns = scene.columns[some]
        pictures = yield from _draw(backbone, recipe, scene, columns, seeds, settings, previewer)
        for picture in _scored(pictures, scene, scorer):
            made.append(picture)
            yield picture
    return made


def _draw(
    backbone: Backbone,
    recipe: Recipe,
    scene: _Scene,
    columns: Sequence[Column],
    seeds: Sequence[int],
    settings: Settings,
    previewer: Previewer | None,
) -> Generator[Progress, None, list[Picture]]:
    """The pictures of some columns and seeds, not yet scored."""
    from iteris_sd import rendering, scoring

    of, which = f" of {scene.name}" if scene.name else "", "seed" if len(seeds) == 1 else "seeds"
    titles = ", ".join(title(column.name) for column in columns)
    stage = f"Drawing {titles}{of}, {which} {', '.join(map(str, seeds))}"
    places = [(column, seed) for column in columns for seed in seeds]

    def told(step: rendering.Step) -> Progress:
        seen, there = previewer.look(step.clean) if previewer else (), places[step.first :]
        shown = {(column.name, seed): one for (column, seed), one in zip(there, seen, strict=False)}
        preview = Preview(scene.name, shown) if shown else None
        return Progress(stage, step.done, recipe.steps, preview, len(step.clean))

    looks = [rendering.Look(column.prompt, column.lora) for column in columns]
    work = rendering.render_columns(backbone, looks, recipe.negative, seeds, settings)
    drawn = [one for several in (yield from relayed(work, told)) for one in several]
    if previewer:
        previewer.learn(drawn)
    return [
        Picture(column.name, seed, one.image, column.prompt, scoring.UNSCORED, one.flagged, scene.name)
        for (column, seed), one in zip(places, drawn, strict=True)
    ]


def _scored(pictures: Sequence[Picture], scene: _Scene, scorer: Scorer | NoScorer) -> list[Picture]:
    """The pictures with their scores; one that was blanked gets none."""
    seen = [picture for picture in pictures if not picture.flagged]
    scores = scorer.score([p.image for p in seen], scene.text, scene.references)
    found = dict(zip(map(id, seen), scores, strict=True))
    return [replace(p, score=found[id(p)]) if id(p) in found else p for p in pictures]
