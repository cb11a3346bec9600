"""From a command's words to a recipe and the concepts that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from iteris_sd import bases, checkpoints, events
from iteris_sd.cli.running import watched
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.kept import Kept
from iteris_sd.merging import registry
from iteris_sd.recipe import Recipe

N = TypeVar("N", int, float)


def told(path: Path, base: str | None) -> Recipe:
    """A recipe from a file, with the base model that was given instead of its own; either may be at a path."""
    data = Recipe.data(path)
    if isinstance(meant := base or data.get("base"), str):
        try:
            data["base"] = checkpoints.opened(meant).name
        except UserError as error:
            if base:
                raise
            raise UserError(
                f"{error} If the recipe was made with a model at a path, say --base and that path."
            ) from error
    return Recipe.of(data)


def library(recipe: Recipe) -> Library:
    """The concepts at hand, and those that the recipe names by a path or an id on the Hub, which are fetched."""
    from iteris_sd import adding

    work = adding.opening(at_hand(), [use.name for use in recipe.concepts])
    return watched(events.downloading(work, "a LoRA"))


def at_hand() -> Library:
    """A person's own concepts and those that ship."""
    return Kept.usual().library().joined(Library.shipped())


def suiting(recipe: Recipe, library: Library) -> str | None:
    """The base model that all concepts of a recipe were made for; None where they differ."""
    found = {library.find(use.name).base for use in recipe.concepts}
    return found.pop() if len(found) == 1 else None


def recipe(
    told: Recipe | None,
    names: Sequence[str] | None,
    methods: Sequence[str] | None,
    base: str | None,
    weights: str | None,
    samples: int | None,
    parameters: Sequence[str] | None,
    drawing: Mapping[str, Any],
) -> Recipe:
    """The recipe that was `told`, or the base model's defaults, with what was given put in its place."""
    base = None if base is None else checkpoints.opened(base).name
    data = told.model_dump() if told else _defaults(base)
    data |= {name: value for name, value in {"base": base, **drawing}.items() if value is not None}
    if names:
        data["concepts"] = [{"name": name} for name in names]
    if weights is not None:
        given = numbers("--weights", weights, float)
        if len(given) != len(data["concepts"]):
            raise UserError(
                f"--weights needs one number per concept, {len(data['concepts'])}, not {len(given)}."
            )
        data["concepts"] = [c | {"weight": w} for c, w in zip(data["concepts"], given, strict=True)]
    if methods is not None:
        known = {use["name"]: use for use in data["methods"]}
        data["methods"] = [known.get(name, {"name": name}) for name in methods]
    if samples is not None:
        data["calibration"] = {**data.get("calibration", {}), "samples": samples}
    for dial in parameters or []:
        data["methods"] = _turned(data["methods"], dial)
    return Recipe.of(data)


def weighed(recipe: Recipe, library: Library, told: str | None) -> Recipe:
    """The recipe with every concept as strong as it was kept, unless weights were `told`."""
    if told is not None:
        return recipe
    uses = [{"name": use.name, "weight": library.find(use.name).weight} for use in recipe.concepts]
    return Recipe.of({**recipe.model_dump(), "concepts": uses})


def seeing(recipe: Recipe, seen: Mapping[str, int | None]) -> Recipe:
    """The recipe with those of its calibration's values that were given."""
    given = {name: value for name, value in seen.items() if value is not None}
    data = recipe.model_dump()
    return Recipe.of({**data, "calibration": {**data["calibration"], **given}})


def _defaults(base: str | None) -> dict[str, Any]:
    """A recipe's values where nothing was said."""
    plain = {name: field.default for name, field in Recipe.model_fields.items() if not field.is_required()}
    chosen = bases.find(base or plain["base"])
    own = chosen.drawing | {"methods": [use.model_dump() for use in plain["methods"]]}
    return plain | own | {"calibration": plain["calibration"].model_dump(), "concepts": [], "prompt": ""}


def _turned(methods: Sequence[Mapping[str, Any]], dial: str) -> list[dict[str, Any]]:
    """The methods of a recipe with one parameter set, as in `iteris.alpha=1e-5`."""
    place, equals, text = dial.partition("=")
    method, dot, name = place.strip().partition(".")
    if not (equals and dot):
        raise UserError(f"--param takes METHOD.NAME=VALUE, such as iteris.alpha=1e-5, not {dial!r}.")
    if method not in (use["name"] for use in methods):
        raise UserError(
            f"--param {dial} sets a parameter of {method}, which is not among the methods asked for."
        )
    value = registry.find(method).parameter(name).parse(text)
    return [
        {"name": use["name"], "parameters": {**use.get("parameters", {}), name: value}}
        if use["name"] == method
        else dict(use)
        for use in methods
    ]


def words(text: str) -> list[str]:
    """Words with commas between them."""
    return [word.strip() for word in text.split(",")]


def numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Numbers with commas between them. Raises UserError naming the option."""
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        noun = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} takes {noun} with commas between them, not {text!r}.") from None
