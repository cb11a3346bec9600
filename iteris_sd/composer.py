"""The one road: Recipe → concepts → moments → merge → LoRA → pictures → scores, as a stream of events.

`compose` is a generator. It yields an event at least once per denoising step, so closing it stops the work within
one; the model is then as it was before.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from iteris_sd import bases, prompting
from iteris_sd.concepts import Library, Loaded, check_together
from iteris_sd.errors import UserError
from iteris_sd.layers import check_fit
from iteris_sd.lora import LoRA
from iteris_sd.recipe import BASE_COLUMN, MethodUse, Recipe, fill
from iteris_sd.sharing import Shares

if TYPE_CHECKING:
    from torch import Tensor

    from iteris_sd.backbone import Backbone
    from iteris_sd.calibration import Merged
    from iteris_sd.rendering import Settings
    from iteris_sd.samples import Inputs
    from iteris_sd.scoring import NoScorer, Score, Scorer

S = TypeVar("S")
T = TypeVar("T")
_SMALLER = (
    1,
    2,
    4,
    8,
    16,
    32,
    64,
)  # how much smaller batches get where memory is short; the largest has 64 samples


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
    """One finished picture, its scores, and the prompt it was drawn from; `flagged`: the safety checker blanked it."""

    method: str
    seed: int
    image: Image.Image
    prompt: str
    score: Score
    flagged: bool = False


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
    check_together(picked, bases.find(recipe.base).family)
    if recipe.sampler == "lcm" and not any(one.distils for one in picked):
        raise UserError(
            "The sampler lcm needs an LCM-LoRA among the concepts, found none; add one, or choose another sampler."
        )
    return picked


def all_tokens(picked: Sequence[Loaded]) -> dict[str, Tensor]:
    """The learned tokens of all concepts, loaded at once whatever the prompt says."""
    return {token: vectors for one in picked for token, vectors in one.tokens.items()}


def prompt_with_triggers(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt that the merged model gets; brackets of a trigger are part of it, not marks of weight."""
    return fill(recipe.prompt, [prompting.escaped(one.concept.trigger) for one in picked])


def prompt_for_base(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt for the base model, which knows no learned tokens: triggers become class nouns, weights stay."""
    plain = {
        prompting.escaped(token.lower()): one.concept.class_noun for one in picked for token in one.tokens
    }
    plain |= {prompting.escaped(one.concept.trigger.lower()): one.concept.class_noun for one in picked}
    longest_first = sorted(plain, key=len, reverse=True)
    known = "|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in longest_first)
    prompt = prompt_with_triggers(recipe, picked)
    return re.sub(
        known, lambda words: prompting.escaped(plain[words[0].lower()]), prompt, flags=re.IGNORECASE
    )


def prompt_in_plain_words(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt for the scorer: class nouns in place of triggers, and no marks of weight."""
    return prompting.plain(prompt_for_base(recipe, picked))


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
    wanted = calibration.contested(loras, method.name, method.parameters)

    def attempt(parts: int) -> Generator[Progress, None, Merged]:
        fed = None
        if wanted and registry.find(method.name).needs == "words":
            fed = samples.of_words(backbone, picked, wanted, parts)
        elif inputs is not None:
            seen = recipe.calibration.tokens_per_sample
            fed = samples.for_merging(backbone, inputs, wanted, seen, parts)
        work = calibration.merge(backbone.layers, loras, fed, method.name, method.parameters)
        doing = f"Merging by {title(method.name)}"
        return _relayed(work, lambda step: Progress(f"{doing}: {step.stage}", step.step, step.steps))

    return (yield from _within_memory(attempt, f"merging by {title(method.name)}"))


def _within_memory(
    attempt: Callable[[int], Generator[Progress, None, T]], doing: str
) -> Generator[Progress, None, T]:
    """Work in batches so many times smaller than usual, as memory needs it: 1, 2, 4 … times."""
    from iteris_sd import memory

    for parts in _SMALLER:
        try:
            return (yield from attempt(parts))
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
        memory.tidy()
    raise UserError(
        f"Memory ran out while {doing}. Look at fewer tokens per sample, take fewer samples, or merge fewer concepts."
    )


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

        def attempt(parts: int, one: Loaded = one, lora: LoRA = lora, stage: str = stage) -> Any:
            work = samples.gather(backbone, one, lora, recipe, text_only=text_only, parts=parts)
            return _relayed(work, lambda done: Progress(stage, done, total))

        inputs.append((yield from _within_memory(attempt, f"sampling inputs of {one.concept.title}")))
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
    with backbone.prepared(all_tokens(picked), clip_skip=recipe.clip_skip):
        return picked, (yield from _merged_by_all(backbone, recipe, picked, measured))


def _begun(recipe: Recipe, library: Library) -> Generator[Progress, None, tuple[list[Loaded], Backbone]]:
    """Load concepts and base model, and check that they go together."""
    from iteris_sd import backbone as backbones

    yield Progress("Loading the base model", 0, 1)
    picked = pick(recipe, library)
    base = bases.find(recipe.base)
    yield from downloading(backbones.fetch(recipe.base), base.title)
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
    from iteris_sd import rendering

    started = time.perf_counter()
    picked, backbone = yield from _begun(recipe, library)
    yield Progress("Loading the scorer", 0, 1)
    scorer = _scorer(recipe)
    references = {
        one.concept.name: scorer.reference(shown) for one in picked if (shown := one.concept.pictures())
    }
    pictures: list[Picture] = []
    settings = rendering.Settings(recipe.sampler, recipe.steps, recipe.guidance, recipe.size)
    batch = rendering.together(backbone, settings)
    with backbone.prepared(all_tokens(picked), clip_skip=recipe.clip_skip):
        merging = time.perf_counter()
        merged = yield from _merged_by_all(backbone, recipe, picked)
        drawing = time.perf_counter()
        for k in range(0, len(recipe.seeds), batch):
            for method in recipe.methods:
                lora = merged[method.name].lora if method.name in merged else None
                seeds = recipe.seeds[k : k + batch]
                with backbone.prepared({}, lora):
                    drawn = yield from _draw(backbone, recipe, picked, method.name, seeds, settings)
                for one in _scored(drawn, recipe, picked, scorer, references):
                    pictures.append(one)
                    yield one
    ended = time.perf_counter()
    seconds = {"loading": merging - started, "merging": drawing - merging, "drawing": ended - drawing}
    made = Composition(recipe, tuple(picked), merged, tuple(pictures), scorer.name, seconds)
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


def _draw(
    backbone: Backbone,
    recipe: Recipe,
    picked: Sequence[Loaded],
    method: str,
    seeds: Sequence[int],
    settings: Settings,
) -> Generator[Progress, None, list[Picture]]:
    """The pictures of one method, not yet scored."""
    from iteris_sd import rendering, scoring

    of_base = method == BASE_COLUMN
    prompt = (prompt_for_base if of_base else prompt_with_triggers)(recipe, picked)
    which = "seed" if len(seeds) == 1 else "seeds"
    stage = f"Drawing {title(method)}, {which} {', '.join(map(str, seeds))}"
    work = rendering.render(backbone, prompt, recipe.negative, seeds, settings)
    drawn = yield from _relayed(work, lambda done: Progress(stage, done, recipe.steps))
    return [
        Picture(method, seed, one.image, prompt, scoring.UNSCORED, one.flagged)
        for seed, one in zip(seeds, drawn, strict=True)
    ]


def _scored(
    pictures: Sequence[Picture],
    recipe: Recipe,
    picked: Sequence[Loaded],
    scorer: Scorer | NoScorer,
    references: Mapping[str, Tensor],
) -> list[Picture]:
    """The pictures with their scores; one that was blanked gets none."""
    seen = [picture for picture in pictures if not picture.flagged]
    scores = scorer.score([p.image for p in seen], prompt_in_plain_words(recipe, picked), references)
    found = {p.seed: score for p, score in zip(seen, scores, strict=True)}
    return [replace(p, score=found[p.seed]) if p.seed in found else p for p in pictures]


def downloading(work: Generator[tuple[int, int], None, T], what: str) -> Generator[Progress, None, T]:
    """Pass on the bytes of a download as progress in kilobytes, its size in words, and return its result."""
    from iteris_sd import hub

    def told(bytes: tuple[int, int]) -> Progress:
        done, total = bytes
        stage = f"Downloading {what}, once: {hub.readable(total)}"
        return Progress(stage, done // 1000, max(1, total // 1000))

    return _relayed(work, told)


def _relayed(work: Generator[S, None, T], told: Callable[[S], Progress]) -> Generator[Progress, None, T]:
    """Pass on the steps of an inner generator, each `told` as progress, and return its result."""
    with closing(work):
        while True:
            try:
                step = next(work)
            except StopIteration as stop:
                result: T = stop.value
                return result
            yield told(step)
