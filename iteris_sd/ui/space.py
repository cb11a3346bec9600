"""The page on a Hugging Face Space: what is public there, and work on a GPU that is lent for seconds (ZeroGPU)."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Generator
from functools import cache
from typing import TYPE_CHECKING, Any

from iteris_sd import bases, limits, serving
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe

if TYPE_CHECKING:
    from iteris_sd.events import Event
    from iteris_sd.explaining import Explanation

_ITERATIONS = (
    5  # of Algorithm 1 as printed, to see what each changes: most of the time that a look inside takes
)
# Seconds on such a GPU, taken generously: what runs out is lost.
_LOADING, _PICTURE_STEP, _SAMPLE, _MERGE = 15.0, 0.06, 0.15, 10.0


def lent() -> bool:
    """Whether the GPU is lent for each call."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and importlib.util.find_spec("spaces") is not None


def device() -> str:
    """What pictures are drawn on, in words; torch must be loaded."""
    import torch

    if lent():
        return "a GPU that is lent for each composition"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine's processor"


def check(recipe: Recipe) -> None:
    """Raise UserError when a composition is larger than a public page does."""
    if not serving.public():
        return
    if bases.find(recipe.base).family != "storybook" and not _has_gpu():
        raise UserError(
            "This public page has no GPU, and draws with Storybook only; choose it as the base model, or run the page "
            "on a machine of your own."
        )
    for what, found, most in (
        ("pictures", recipe.count, limits.MAX_PUBLIC_PICTURES),
        ("steps", recipe.steps, limits.MAX_PUBLIC_STEPS),
    ):
        if found > most:
            raise UserError(
                f"This public page draws at most {most} {what} at once, not {found}; ask for fewer, or run it on a "
                "machine of your own."
            )


def _has_gpu() -> bool:
    import torch

    return lent() or torch.cuda.is_available()


def duration(recipe: Recipe, library: Library) -> int:
    """Seconds of a GPU that a composition is expected to take, up to the most that may be asked for."""
    del library  # the work takes it
    side = (recipe.size or bases.find(recipe.base).size) / 512
    drawing = recipe.count * (recipe.steps * _PICTURE_STEP * max(side, side**2) + 1)
    merging = len(recipe.merging) * _MERGE
    sampling = len(recipe.concepts) * recipe.calibration.samples * _SAMPLE
    return min(math.ceil(_LOADING + drawing + merging + sampling), limits.MAX_GPU_SECONDS)


def duration_inside(recipe: Recipe, library: Library) -> int:
    """Seconds of a GPU that a look inside a merge is expected to take, likewise: three methods more than its own are
    merged, all are measured, and one is iterated."""
    del library
    methods = len(recipe.merging) + 3
    sampling = len(recipe.concepts) * recipe.calibration.samples * _SAMPLE
    return min(math.ceil(_LOADING + (2 * methods + _ITERATIONS) * _MERGE + sampling), limits.MAX_GPU_SECONDS)


def events(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    """The events of a composition, on the lent GPU where there is one. No tensor in them is on a GPU."""
    work = _on_lent_gpu(_compose) if lent() else _compose
    return work(recipe, library)


def merged(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    """The events of a merge without pictures, likewise."""
    work = _on_lent_gpu(_merge) if lent() else _merge
    return work(recipe, library)


def explained(recipe: Recipe, library: Library) -> Generator[Event | Explanation, None, Any]:
    """The events of a look inside a merge, the explanation last, likewise."""
    work = _on_lent_gpu(_explain) if lent() else _explain
    return work(recipe, library)


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


@cache
def _on_lent_gpu(work: Any) -> Any:
    import spaces

    return spaces.GPU(duration=duration_inside if work is _explain else duration)(work)


def prepare() -> None:
    """Where a GPU is lent, put the model on it before anybody asks, as it must be: the one place that loads early."""
    if lent():
        from iteris_sd import backbone

        for _ in backbone.fetch("sd15"):
            pass
        backbone.load("sd15")
        for work in (_compose, _merge, _explain):
            _on_lent_gpu(work)
