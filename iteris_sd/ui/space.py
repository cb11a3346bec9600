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
from iteris_sd.recipe import BASE_COLUMN, Recipe

if TYPE_CHECKING:
    from iteris_sd.composer import Event

# Seconds on such a GPU, taken generously: what runs out is lost.
_LOADING, _PICTURE_STEP, _SAMPLE, _MERGE = 15.0, 0.06, 0.15, 10.0


def lent() -> bool:
    """Whether the GPU is lent for each call."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and importlib.util.find_spec("spaces") is not None


def check(recipe: Recipe) -> None:
    """Raise UserError when a composition is larger than a public page does."""
    if not serving.public():
        return
    pictures = len(recipe.seeds) * len(recipe.methods)
    for what, found, most in (
        ("pictures", pictures, limits.MAX_PUBLIC_PICTURES),
        ("steps", recipe.steps, limits.MAX_PUBLIC_STEPS),
    ):
        if found > most:
            raise UserError(
                f"This public page draws at most {most} {what} at once, not {found}; ask for fewer, or run it on a "
                "machine of your own."
            )


def duration(recipe: Recipe, library: Library) -> int:
    """Seconds of a GPU that a composition is expected to take, up to the most that may be asked for."""
    del library  # the work takes it
    side = (recipe.size or bases.find(recipe.base).size) / 512
    pictures = len(recipe.seeds) * len(recipe.methods)
    drawing = pictures * (recipe.steps * _PICTURE_STEP * max(side, side**2) + 1)
    merging = sum(method.name != BASE_COLUMN for method in recipe.methods) * _MERGE
    sampling = len(recipe.concepts) * recipe.calibration.samples * _SAMPLE
    return min(math.ceil(_LOADING + drawing + merging + sampling), limits.MAX_GPU_SECONDS)


def events(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    """The events of a composition, on the lent GPU where there is one. No tensor in them is on a GPU."""
    work = _on_lent_gpu() if lent() else _compose
    return work(recipe, library)


def _compose(recipe: Recipe, library: Library) -> Generator[Event, None, Any]:
    from iteris_sd import composer

    return (yield from composer.compose(recipe, library))


@cache
def _on_lent_gpu() -> Any:
    import spaces

    return spaces.GPU(duration=duration)(_compose)


def prepare() -> None:
    """Where a GPU is lent, put the model on it before anybody asks, as it must be: the one place that loads early."""
    if lent():
        from iteris_sd import backbone

        for _ in backbone.fetch("sd15"):
            pass
        backbone.load("sd15")
        _on_lent_gpu()
