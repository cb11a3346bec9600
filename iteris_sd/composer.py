"""The one road: Recipe → concepts → moments → merge → LoRA → pictures → scores, as a stream of events.

`compose` is a generator. It yields an event at least once per denoising step, so closing it stops the work within
one; the model is then as it was before.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from iteris_sd.concepts import Library, Loaded, check_together
from iteris_sd.layers import check_fit
from iteris_sd.lora import LoRA
from iteris_sd.recipe import BASE_COLUMN, MethodUse, Recipe, fill
from iteris_sd.sharing import Shares

if TYPE_CHECKING:
    from torch import Tensor

    from iteris_sd.backbone import Backbone
    from iteris_sd.calibration import Merged
    from iteris_sd.samples import Inputs
    from iteris_sd.scoring import Score, Scorer

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What is being done, in words, and how far it is: `done` of `total`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class MergeDone:
    """A method's merged LoRA is ready."""

    method: str
    merged: Merged
    seconds: float


@dataclass(frozen=True, eq=False)
class Picture:
    """One finished picture, its scores, and the prompt it was drawn from."""

    method: str
    seed: int
    image: Image.Image
    prompt: str
    score: Score


@dataclass(frozen=True, eq=False)
class Composition:
    """Everything a recipe led to; the last event. `seconds` by stage."""

    recipe: Recipe
    concepts: tuple[Loaded, ...]
    merged: Mapping[str, Merged]
    pictures: tuple[Picture, ...]
    scorer: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The learned tokens of all concepts."""
        return all_tokens(self.concepts)

    def picture(self, method: str, seed: int) -> Picture | None:
        """The picture of one method and seed, if it was drawn."""
        return next((p for p in self.pictures if (p.method, p.seed) == (method, seed)), None)


Event = Progress | MergeDone | Picture | Composition


def pick(recipe: Recipe, library: Library) -> list[Loaded]:
    """Load the concepts of a recipe and check that they go together. Raises UserError."""
    picked = [library.find(use.name).load() for use in recipe.concepts]
    check_together(picked, recipe.base)
    return picked


def all_tokens(picked: Sequence[Loaded]) -> dict[str, Tensor]:
    """The learned tokens of all concepts, loaded at once whatever the prompt says."""
    return {token: vectors for one in picked for token, vectors in one.tokens.items()}


def prompt_with_triggers(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt that the merged model gets."""
    return fill(recipe.prompt, [one.concept.trigger for one in picked])


def prompt_in_plain_words(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt for the base model and for the scorer, which know no learned tokens: triggers become class nouns."""
    plain = {token.lower(): one.concept.class_noun for one in picked for token in one.tokens}
    plain |= {one.concept.trigger.lower(): one.concept.class_noun for one in picked}
    longest_first = sorted(plain, key=len, reverse=True)
    known = "|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in longest_first)
    prompt = prompt_with_triggers(recipe, picked)
    return re.sub(known, lambda words: plain[words[0].lower()], prompt, flags=re.IGNORECASE)


def merge(
    backbone: Backbone,
    recipe: Recipe,
    picked: Sequence[Loaded],
    method: MethodUse,
    inputs: Sequence[Inputs] | None,
) -> Generator[Progress, None, Merged]:
    """Merge the picked LoRAs by one method; yield progress, return the result. Tokens must be known already."""
    from iteris_sd import calibration, samples
    from iteris_sd.merging import registry

    loras = weighted(recipe, picked)
    fed, wanted = None, calibration.contested(loras, method.name, method.parameters)
    if wanted and registry.find(method.name).needs == "words":
        fed = samples.of_words(backbone, picked, wanted)
    elif inputs is not None:
        fed = samples.for_merging(backbone, inputs, wanted, recipe.calibration.tokens_per_sample)
    work = calibration.merge(backbone.layers, loras, fed, method.name, method.parameters)
    with closing(work):
        while True:
            try:
                step = next(work)
            except StopIteration as stop:
                return stop.value
            yield Progress(f"Merging by {title(method.name)}: {step.stage}", step.step, step.steps)


def weighted(recipe: Recipe, picked: Sequence[Loaded]) -> list[LoRA]:
    """The concepts' LoRAs, scaled by their weights: what is sampled and merged."""
    return [one.lora.scaled(use.weight) for one, use in zip(picked, recipe.concepts, strict=True)]


def _measured(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], merged: Merged, inputs: Sequence[Inputs]
) -> Merged:
    """The merge with what one pass tells of it."""
    from iteris_sd import calibration, diagnostics, samples

    loras = weighted(recipe, picked)
    fed = samples.for_merging(backbone, inputs, Shares(loras).contested, recipe.calibration.tokens_per_sample)
    return diagnostics.with_measures(merged, calibration.measure(backbone.layers, loras, merged.lora, fed))


def collect(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], wanted: Collection[str]
) -> Generator[Progress, None, list[Inputs]]:
    """Calibration samples of every concept for the layers `wanted`; yield progress, return them.

    Tokens must be known already.
    """
    from iteris_sd import samples

    inputs, total = [], recipe.calibration.samples
    text_only = samples.text_only(wanted)
    for one, lora in zip(picked, weighted(recipe, picked), strict=True):
        stage = f"Sampling inputs of {one.concept.title}"
        yield Progress(stage, 0, total)
        work = samples.gather(backbone, one, lora, recipe, text_only=text_only)
        inputs.append((yield from _relayed(work, stage, total)))
    return inputs


def _solved_for(recipe: Recipe, picked: Sequence[Loaded], measured: bool) -> frozenset[str]:
    """All layers that inputs are needed of: by any of the recipe's methods, or all that can be `measured`."""
    from iteris_sd import calibration
    from iteris_sd.merging import registry

    loras = weighted(recipe, picked)
    if measured:
        return Shares(loras).contested
    drawn = [m for m in recipe.methods if m.name != BASE_COLUMN]
    methods = [m for m in drawn if registry.find(m.name).needs != "words"]  # those have samples of their own
    return frozenset().union(*(calibration.contested(loras, m.name, m.parameters) for m in methods))


def title(method: str) -> str:
    """A method's name for people."""
    from iteris_sd.merging import registry

    return "Base model" if method == BASE_COLUMN else registry.find(method).title


def merge_all(
    recipe: Recipe, library: Library, *, measured: bool = False
) -> Generator[Event, None, tuple[list[Loaded], dict[str, Merged]]]:
    """Load concepts, collect samples and merge by every method of the recipe; no pictures.

    `measured`: of every merge, whatever its method, also measure how well it serves the concepts, by one pass more.
    """
    picked, backbone = yield from _begun(recipe, library)
    with backbone.prepared(all_tokens(picked)):
        return picked, (yield from _merged_by_all(backbone, recipe, picked, measured))


def _begun(recipe: Recipe, library: Library) -> Generator[Progress, None, tuple[list[Loaded], Backbone]]:
    """Load concepts and base model, and check that they go together."""
    from iteris_sd import backbone as backbones

    yield Progress("Loading the base model", 0, 1)
    picked = pick(recipe, library)
    backbone = backbones.load(recipe.base)
    for one in picked:
        check_fit(one.lora, backbone.layers, f"The LoRA of {one.concept.name}")
    return picked, backbone


def _merged_by_all(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], measured: bool = False
) -> Generator[Event, None, dict[str, Merged]]:
    wanted = _solved_for(recipe, picked, measured)
    inputs = (yield from collect(backbone, recipe, picked, wanted)) if wanted else None
    results: dict[str, Merged] = {}
    for method in recipe.methods:
        if method.name == BASE_COLUMN:
            continue
        since = time.perf_counter()
        merged = yield from merge(backbone, recipe, picked, method, inputs)
        if measured and inputs is not None:
            yield Progress(f"Measuring {title(method.name)}", 0, 1)
            merged = _measured(backbone, recipe, picked, merged, inputs)
        results[method.name] = merged
        yield MergeDone(method.name, results[method.name], time.perf_counter() - since)
    return results


def compose(recipe: Recipe, library: Library) -> Generator[Event, None, Composition]:
    """Do everything a recipe asks for; the last event is the Composition, which is also returned.

    Raises UserError before any work is lost.
    """
    from iteris_sd import bases, scoring

    started = time.perf_counter()
    picked, backbone = yield from _begun(recipe, library)
    yield Progress("Loading the scorer", 0, 1)
    scorer = scoring.load(bases.find(recipe.base).scorer)
    references = {
        one.concept.name: scorer.reference(shown) for one in picked if (shown := one.concept.pictures())
    }
    pictures: list[Picture] = []
    with backbone.prepared(all_tokens(picked)):
        merging = time.perf_counter()
        merged = yield from _merged_by_all(backbone, recipe, picked)
        drawing = time.perf_counter()
        for seed in recipe.seeds:
            for method in recipe.methods:
                lora = merged[method.name].lora if method.name in merged else None
                picture = yield from _draw(
                    backbone, recipe, picked, method.name, seed, lora, scorer, references
                )
                pictures.append(picture)
                yield picture
    ended = time.perf_counter()
    seconds = {"loading": merging - started, "merging": drawing - merging, "drawing": ended - drawing}
    made = Composition(recipe, tuple(picked), merged, tuple(pictures), scorer.name, seconds)
    yield made
    return made


def _draw(
    backbone: Backbone,
    recipe: Recipe,
    picked: Sequence[Loaded],
    method: str,
    seed: int,
    lora: LoRA | None,
    scorer: Scorer,
    references: Mapping[str, Tensor],
) -> Generator[Progress, None, Picture]:
    from iteris_sd import rendering

    plain = prompt_in_plain_words(recipe, picked)
    prompt = plain if method == BASE_COLUMN else prompt_with_triggers(recipe, picked)
    settings = rendering.Settings(recipe.sampler, recipe.steps, recipe.guidance)
    stage = f"Drawing {title(method)}, seed {seed}"
    with backbone.prepared({}, lora):
        work = rendering.render(backbone, prompt, recipe.negative, seed, settings)
        image = yield from _relayed(work, stage, recipe.steps)
    (score,) = scorer.score([image], plain, references)
    return Picture(method, seed, image, prompt, score)


def _relayed(work: Generator[int, None, T], stage: str, total: int) -> Generator[Progress, None, T]:
    """Pass on the steps of an inner generator as progress of a stage, and return its result."""
    with closing(work):
        while True:
            try:
                done = next(work)
            except StopIteration as stop:
                result: T = stop.value
                return result
            yield Progress(stage, done, total)
