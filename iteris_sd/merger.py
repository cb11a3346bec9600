"""From picked concepts to merged LoRAs: calibration samples, every method of a recipe, and what is remembered of both.

The same files merged again by the same numbers are not merged again; see `remembering` for what counts as the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from typing import TYPE_CHECKING, TypeVar

from iteris_sd import bases, limits
from iteris_sd.columns import weighted
from iteris_sd.concepts import Library, Loaded, check_together
from iteris_sd.errors import MemoryShort, UserError
from iteris_sd.events import Event, MergeDone, Progress, downloading
from iteris_sd.generators import relayed
from iteris_sd.layers import check_fit
from iteris_sd.recipe import MethodUse, Recipe, title
from iteris_sd.remembering import Shelf, bytes_of, key_of_merge, key_of_samples
from iteris_sd.sharing import Shares

if TYPE_CHECKING:
    from torch import Tensor

    from iteris_sd.backbone import Backbone
    from iteris_sd.calibration import LayerReport, Merged
    from iteris_sd.lora import LoRA
    from iteris_sd.samples import Inputs

T = TypeVar("T")
_MERGES: Shelf[Merged] = Shelf(limits.MAX_REMEMBERED_BYTES)
_SAMPLES: Shelf[Inputs] = Shelf(limits.MAX_REMEMBERED_BYTES // 4)
_SMALLER = (1, 2, 4, 8, 16, 32, 64)  # how much smaller batches get where memory is short; the largest has 64


def forget() -> None:
    """Let go of all that is remembered."""
    _MERGES.clear()
    _SAMPLES.clear()


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


def begun(recipe: Recipe, library: Library) -> Generator[Progress, None, tuple[list[Loaded], Backbone]]:
    """Load concepts and base model, and check that they go together. Raises UserError."""
    from iteris_sd import backbone as backbones

    yield Progress("Loading the base model", 0, 1)
    picked = pick(recipe, library)
    base = bases.find(recipe.base)
    yield from downloading(backbones.fetch(recipe.base), base.title)
    backbone = backbones.load(recipe.base)
    for one, lora in zip(picked, weighted(recipe, picked), strict=True):
        check_fit(one.lora, backbone.layers, f"The LoRA of {one.concept.name}")
        if not lora:
            raise UserError(
                f"The block weights of {one.concept.name} leave nothing of its LoRA; raise one where it has layers, or "
                "leave the concept out."
            )
    return picked, backbone


def merge_all(
    recipe: Recipe, library: Library, *, measured: bool = False
) -> Generator[Event, None, tuple[list[Loaded], dict[str, Merged]]]:
    """Load concepts, collect samples and merge by every method of the recipe; no pictures.

    `measured`: of every merge, whatever its method, also measure how well it serves the concepts, by one pass more.
    """
    picked, backbone = yield from begun(recipe, library)
    with backbone.prepared(all_tokens(picked), clip_skip=recipe.clip_skip):
        return picked, (yield from merged_by_all(backbone, recipe, picked, measured))


def merged_by_all(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], measured: bool = False
) -> Generator[Event, None, dict[str, Merged]]:
    """Merge by every method of the recipe, as far as it is not remembered. Tokens must be known already."""
    keys = {use.name: key_of_merge(backbone, recipe, picked, use, measured) for use in recipe.merging}
    known = {name: found for name, key in keys.items() if (found := _MERGES.get(key)) is not None}
    wanted = _solved_for([use for use in recipe.merging if use.name not in known], recipe, picked, measured)
    inputs = (yield from collect(backbone, recipe, picked, wanted)) if wanted else None
    results: dict[str, Merged] = {}
    for method in recipe.merging:
        since = time.perf_counter()
        merged = known.get(method.name)
        if merged is None:
            merged = yield from _merged(backbone, recipe, picked, method, inputs)
            if measured and inputs is not None:
                merged = yield from _measured(backbone, recipe, picked, merged, inputs)
                _remember(keys[method.name], merged)
        results[method.name] = merged
        seconds = time.perf_counter() - since
        yield MergeDone(method.name, merged, tuple(picked), seconds, method.name in known, keys[method.name])
    return results


def _merged(
    backbone: Backbone,
    recipe: Recipe,
    picked: Sequence[Loaded],
    method: MethodUse,
    inputs: Sequence[Inputs] | None,
) -> Generator[Progress, None, Merged]:
    """A merge that nobody has measured yet, unless it is remembered."""
    key = key_of_merge(backbone, recipe, picked, method, measured=False)
    found = _MERGES.get(key)
    if found is None:
        yield Progress(f"Merging by {title(method.name)}", 0, 1)
        found = yield from merge(backbone, recipe, picked, method, inputs)
        _remember(key, found)
    return found


def keep(done: MergeDone) -> None:
    """Remember a merge that a process of our own made, for the next one that is forked from this."""
    _remember(done.key, done.merged)


def _remember(key: str, merged: Merged) -> None:
    factors = [factor for one in merged.lora.values() for factor in (one.down, one.up)]
    _MERGES.put(key, merged, bytes_of(factors))


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
        elif wanted and inputs is not None:
            seen = recipe.calibration.tokens_per_sample
            fed = samples.for_merging(backbone, inputs, wanted, seen, parts)
        work = calibration.merge(backbone.layers, loras, fed, method.name, method.parameters)
        doing = f"Merging by {title(method.name)}"
        return relayed(work, lambda step: Progress(f"{doing}: {step.stage}", step.step, step.steps))

    return (yield from _within_memory(backbone, attempt, f"merging by {title(method.name)}"))


def collect(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], wanted: Collection[str]
) -> Generator[Progress, None, list[Inputs]]:
    """Calibration samples of every concept for the layers `wanted`; yield progress, return them.

    Tokens must be known already.
    """
    from iteris_sd import samples

    text_only = samples.text_only(wanted)
    loras, found = weighted(recipe, picked), []
    for place, (one, lora) in enumerate(zip(picked, loras, strict=True)):
        key = key_of_samples(backbone, recipe, picked, place, text_only)
        inputs = _SAMPLES.get(key)
        if inputs is None:
            sampled = yield from _sampled(backbone, recipe, one, lora, text_only)
            inputs = sampled.to("cpu")  # a GPU's memory is for what is at work
            tensors = (inputs.ids, inputs.latents, inputs.times)
            _SAMPLES.put(key, inputs, bytes_of([tensor for tensor in tensors if tensor is not None]))
        found.append(inputs.to(backbone.device))
    return found


def _sampled(
    backbone: Backbone, recipe: Recipe, one: Loaded, lora: LoRA, text_only: bool
) -> Generator[Progress, None, Inputs]:
    from iteris_sd import samples

    stage, total = f"Sampling inputs of {one.concept.title}", recipe.calibration.samples
    yield Progress(stage, 0, total)

    def attempt(parts: int) -> Generator[Progress, None, Inputs]:
        work = samples.gather(backbone, one, lora, recipe, text_only=text_only, parts=parts)
        return relayed(work, lambda done: Progress(stage, done, total))

    return (yield from _within_memory(backbone, attempt, f"sampling inputs of {one.concept.title}"))


def _within_memory(
    backbone: Backbone, attempt: Callable[[int], Generator[Progress, None, T]], doing: str
) -> Generator[Progress, None, T]:
    """Work in batches so many times smaller than usual, as memory needs it: 1, 2, 4 … times."""
    from iteris_sd import memory

    for parts in _SMALLER:
        try:
            with memory.kept_together(backbone.pipeline):
                return (yield from attempt(parts))
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
        forget()
        memory.tidy()
    raise MemoryShort(
        f"Memory ran out while {doing}. Look at fewer tokens per sample, take fewer samples, or merge fewer concepts."
    )


def _measured(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], merged: Merged, inputs: Sequence[Inputs]
) -> Generator[Progress, None, Merged]:
    """The merge with what a pass more tells of it, or several."""
    from iteris_sd import calibration, diagnostics, samples

    loras, seen = weighted(recipe, picked), recipe.calibration.tokens_per_sample
    doing = f"Measuring {title(merged.method)}"
    yield Progress(doing, 0, 1)

    def attempt(parts: int) -> Generator[Progress, None, tuple[LayerReport, ...]]:
        fed = samples.for_merging(backbone, inputs, Shares(loras).contested, seen, parts)
        work = calibration.measuring(backbone.layers, loras, merged.lora, fed)
        return relayed(work, lambda step: Progress(f"{doing}: {step.stage}", step.step, step.steps))

    reports = yield from _within_memory(backbone, attempt, f"measuring {title(merged.method)}")
    return diagnostics.with_measures(merged, reports)


def _solved_for(
    methods: Sequence[MethodUse], recipe: Recipe, picked: Sequence[Loaded], measured: bool
) -> frozenset[str]:
    """All layers that inputs are needed of: by any of the methods, and all that can be `measured`."""
    from iteris_sd import calibration
    from iteris_sd.merging import registry

    loras = weighted(recipe, picked)
    shared = Shares(loras).contested if measured and methods else frozenset()
    fed = [m for m in methods if registry.find(m.name).needs != "words"]  # those have samples of their own
    return shared.union(*(calibration.contested(loras, m.name, m.parameters) for m in fed))
