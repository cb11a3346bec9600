"""The page on a Hugging Face Space: what is public there, and work on a GPU that is lent for seconds (ZeroGPU)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Generator
from contextlib import closing
from functools import cache
from typing import TYPE_CHECKING, Any

from iteris_sd import bases, limits, serving
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import MergeDone, received, sent
from iteris_sd.merging import registry
from iteris_sd.recipe import Recipe
from iteris_sd.ui import heavy

if TYPE_CHECKING:
    from iteris_sd.events import Event
    from iteris_sd.explaining import Explanation

_ITERATIONS = (
    5  # of Algorithm 1 as printed, to see what each changes: most of the time that a look inside takes
)
# Seconds on such a GPU, estimated generously and not yet measured on one: what runs out is lost.
_LOADING, _STEP, _PICTURE, _PASS, _SOLVED, _COMBINED, _MEASURED = 15.0, 0.06, 1.0, 0.0125, 8.0, 2.0, 3.0
_LOADED = ("storybook", "sd15")  # base models that are there where a GPU is lent
_missing: dict[str, str] = {}  # those of them that could not be had, and why


def device() -> str:
    """What pictures are drawn on, in words; torch must be loaded."""
    if serving.lent():
        return "a GPU that is lent for each composition"
    cuda = sys.modules["torch"].cuda
    return str(cuda.get_device_name()) if cuda.is_available() else "this machine's processor"


def _has_gpu() -> bool:
    if serving.lent():
        return True
    heavy.bring_in()
    return bool(sys.modules["torch"].cuda.is_available())


# ---------------------------------------------------------------- bounds


def check(recipe: Recipe) -> None:
    """Raise UserError when a composition is larger than a public page does, or needs what is not there."""
    if not serving.public():
        return
    _check_base(recipe.base)
    for what, found, most in (
        ("pictures", recipe.count, limits.MAX_PUBLIC_PICTURES),
        ("steps", recipe.steps, limits.MAX_PUBLIC_STEPS),
    ):
        if found > most:
            raise UserError(
                f"This public page draws at most {most} {what} at once, not {found}; ask for fewer, or run it on a "
                "machine of your own."
            )
    _check_work(recipe)
    if serving.lent():
        _granted(_composing(recipe), _FEWER)


def _check_base(name: str) -> None:
    base = bases.find(name)
    if base.family != "storybook" and not _has_gpu():
        raise UserError(
            "This public page has no GPU, and draws with Storybook only; choose it as the base model, or run the page "
            "on a machine of your own."
        )
    if not serving.lent():
        return
    if base.name not in _LOADED:
        there = " and ".join(bases.find(one).title for one in _LOADED)
        raise UserError(
            f"This public page is lent a GPU for seconds, too few to load {base.title}; choose {there}, which are "
            "loaded, or run the page on a machine of your own."
        )
    if base.name in _missing:
        raise UserError(f"{_told_of(base.name)} Choose another base model, or come back later.")


def _check_work(recipe: Recipe) -> None:
    side = recipe.size or bases.find(recipe.base).size
    work, passes = recipe.count * recipe.steps * _area(recipe), _passes(recipe, _names(recipe))
    if work > limits.MAX_PUBLIC_WORK:
        raise UserError(
            f"{recipe.count} pictures of {side} px in {recipe.steps} steps are as much work as {math.ceil(work)} steps "
            f"at 512 px, and this public page does at most {limits.MAX_PUBLIC_WORK} at once; ask for fewer pictures or "
            "steps, or smaller ones, or run it on a machine of your own."
        )
    if passes > limits.MAX_PUBLIC_PASSES:
        raise UserError(
            f"The calibration samples would go through the model {math.ceil(passes)} times, counted at 512 px, and on "
            f"this public page they do at most {limits.MAX_PUBLIC_PASSES} times; ask for fewer samples per concept "
            f"(now {recipe.calibration.samples}), trajectory steps ({recipe.calibration.steps}), concepts or methods, "
            "or for smaller pictures."
        )


def _area(recipe: Recipe) -> float:
    """How much larger a picture is than one of 512 px."""
    return ((recipe.size or bases.find(recipe.base).size) / 512) ** 2


def _names(recipe: Recipe) -> set[str]:
    return {use.name for use in recipe.merging}


def _passes(recipe: Recipe, names: Collection[str], again: int = 0) -> float:
    """How often its samples go through the model, counted at 512 px: along their trajectories, once for each method of
    these names that looks at samples, and so many times more."""
    rounds = sum(registry.find(name).needs in ("own", "merged") for name in names) + again
    chosen = recipe.calibration
    samples = len(recipe.concepts) * (chosen.samples + chosen.unconditional)
    return samples * (chosen.steps + rounds) * _area(recipe) if rounds else 0.0


# ---------------------------------------------------------------- seconds of a lent GPU

_FEWER = "pictures, steps, methods or calibration samples, or for smaller pictures"


def duration(recipe: Recipe, library: Library) -> int:
    """Seconds of a lent GPU that a composition is expected to take. Raises UserError when it is lent for less."""
    del library  # the work takes it
    return _granted(_composing(recipe), _FEWER)


def duration_merging(recipe: Recipe, library: Library) -> int:
    """Seconds that a merge without pictures is expected to take, likewise."""
    del library
    return _granted(_LOADING + _merging(recipe, _names(recipe)), "concepts, methods or calibration samples")


def duration_inside(recipe: Recipe, library: Library) -> int:
    """Seconds that a look inside a merge is expected to take, likewise: three methods are merged whatever is asked
    for, all are measured, and one is iterated."""
    from iteris_sd.diagnostics import COMPARED

    del library
    names = {*_names(recipe), *COMPARED}
    again = _ITERATIONS + len(names)
    measuring = (
        _ITERATIONS * _SOLVED / 2 + len(names) * _MEASURED
    )  # an iteration is a solve without its sweep
    needed = _LOADING + _merging(recipe, names, again) + measuring
    return _granted(needed, "concepts, methods or calibration samples")


def _granted(seconds: float, fewer: str) -> int:
    """The seconds in whole ones. Raises UserError when they are more than a GPU is lent for."""
    if seconds > limits.MAX_GPU_SECONDS:
        raise UserError(
            f"This would take about {math.ceil(seconds)} s of the GPU that is lent to this page, for at most "
            f"{limits.MAX_GPU_SECONDS} s at a time; ask for fewer {fewer}."
        )
    return math.ceil(seconds)


def _composing(recipe: Recipe) -> float:
    # A small picture takes less time than a large one, but not in proportion: launching its work takes as long.
    slow = max(_area(recipe), math.sqrt(_area(recipe)))
    drawing = recipe.count * (recipe.steps * _STEP * slow + _PICTURE)
    return _LOADING + _merging(recipe, _names(recipe)) + drawing


def _merging(recipe: Recipe, names: Collection[str], again: int = 0) -> float:
    """Seconds for merging by methods of these names, where samples go through the model so many times more."""
    solving = sum(_COMBINED if registry.find(name).needs == "none" else _SOLVED for name in names)
    return solving + _passes(recipe, names, again) * _PASS


# ---------------------------------------------------------------- work


def events(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    """The events of a composition, on the lent GPU where there is one. No tensor in them is on a GPU.

    Raises UserError, also where no GPU is lent for so long, or it was taken away.
    """
    return _done(_compose, recipe, library)


def merged(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    """The events of a merge without pictures, likewise."""
    return _done(_merge, recipe, library)


def explained(recipe: Recipe, library: Library) -> Generator[Event | Explanation, None, Any]:
    """The events of a look inside a merge, the explanation last, likewise."""
    return _done(_explain, recipe, library)


def _done(work: Any, recipe: Recipe, library: Library) -> Generator[Any, None, Any]:
    return _on_lent_gpu(work, recipe, library) if serving.lent() else work(recipe, library)


def _compose(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    from iteris_sd import composer

    return (yield from composer.compose(recipe, library, previews=True))


def _merge(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    from iteris_sd import merger

    return (yield from merger.merge_all(recipe, library))


def _explain(recipe: Recipe, library: Library) -> Generator[Event | Explanation, None, None]:
    from iteris_sd import explaining

    found = yield from explaining.explain(recipe, library, _ITERATIONS)
    yield found  # a worker's result comes as an event, or not at all


def _on_lent_gpu(work: Any, recipe: Recipe, library: Library) -> Generator[Any, None, None]:
    import gradio as gr

    from iteris_sd import merger

    try:
        with closing(received(_borrowing(work)(recipe, library))) as events:
            for event in events:
                if isinstance(event, MergeDone):
                    merger.keep(event)
                yield event
    except gr.Error as error:  # `spaces` has no GPU, or no more of it: it says so in its own words
        raise UserError(f"{error.title}: {error.message}") from error


_DURATIONS: dict[Any, Callable[[Recipe, Library], int]] = {
    _compose: duration,
    _merge: duration_merging,
    _explain: duration_inside,
}


@cache
def _borrowing(work: Any) -> Any:
    """The work in a process that has the GPU, which is forked from this one; it gives back what `sent` does."""
    import spaces

    def lending(recipe: Recipe, library: Library) -> Generator[bytes, None, None]:
        yield from sent(work(recipe, library))

    return spaces.GPU(duration=_DURATIONS[work])(lending)


# ---------------------------------------------------------------- models


def prepare() -> None:
    """Where a GPU is lent, load the models before anybody asks; call it in the main thread, before the page is served.

    Only there are they put on the pretended GPU, from which a worker takes them to the real one. A model that cannot
    be had is `lacking`, and the page goes on without it.
    """
    if not serving.lent():
        return
    from iteris_sd import backbone, scoring

    heavy.bring_in()
    _missing.clear()
    for name in _LOADED:
        try:
            for _ in backbone.fetch(name):
                pass
            backbone.load(name)
        except UserError as error:
            _missing[name] = str(error)
            print(lacking(), flush=True)
    if "sd15" not in _missing:  # one scorer is kept; Storybook's is small, and loaded again in no time
        try:
            scoring.load(bases.find("sd15").scorer)
        except UserError as error:
            print(error, flush=True)  # each composition says so of its scores
    for work in _DURATIONS:
        _borrowing(work)


def lacking() -> str:
    """What could not be loaded when this page began, and why, in sentences; nothing where all is there."""
    return " ".join(map(_told_of, _missing))


def _told_of(name: str) -> str:
    return f"{bases.find(name).title} could not be loaded when this page began. {_missing[name]}"
