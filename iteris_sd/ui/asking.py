"""From what stands in the widgets, or in an API call, to a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.merging.registry import METHODS, Parameter
from iteris_sd.recipe import ALONE_COLUMN, BASE_COLUMN, REFERENCES, Recipe, title

N = TypeVar("N", int, float)

METHOD_CHOICES: dict[str, tuple[str, str]] = {
    BASE_COLUMN: (title(BASE_COLUMN), "No LoRA at all: what the model draws of its own, for reference."),
    ALONE_COLUMN: (
        title(ALONE_COLUMN),
        "Each concept's own LoRA and nobody else's, a column for each: what a merge should keep.",
    ),
    **{method.name: (method.title, method.description) for method in METHODS.values()},
}
METHOD_GROUPS: dict[str, tuple[str, ...]] = {
    "Reference": REFERENCES,
    "Look at what the layers see": tuple(reversed([m.name for m in METHODS.values() if m.needs != "none"])),
    "From the weights alone": tuple(m.name for m in METHODS.values() if m.needs == "none"),
}
DEFAULT_METHODS = (BASE_COLUMN, "linear", "iteris")


def recipe(
    *,
    base: str,
    concepts: Sequence[str | Mapping[str, Any]],
    prompt: str,
    negative: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    sampler: str,
    samples: int,
    size: int | None = None,
    clip_skip: int = 1,
    unconditional: int = 0,
    strength: float = 1.0,
    retention: int = 0,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recipe:
    """A checked recipe; `concepts` are names, or what `ConceptUse` has, and `parameters` {method: {name: value}}.

    Raises UserError.
    """
    if not concepts:
        raise UserError("No concept is picked; pick at least one.")
    if not methods:
        raise UserError("No method is ticked; tick at least one.")
    check_count("concepts", concepts, limits.MAX_CONCEPTS)
    check_count("methods", methods, limits.MAX_METHODS)
    check_count("seeds", seeds, limits.MAX_SEEDS)
    chosen = parameters or {}
    return Recipe.of(
        {
            "base": base,
            "concepts": [{"name": one} if isinstance(one, str) else dict(one) for one in concepts],
            "prompt": prompt,
            "negative": negative,
            "methods": [{"name": name, "parameters": dict(chosen.get(name, {}))} for name in methods],
            "seeds": list(seeds),
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "size": size,
            "clip_skip": clip_skip,
            "strength": strength,
            "retention": retention,
            "calibration": {"samples": samples, "unconditional": unconditional},
        }
    )


def check_count(what: str, given: Sequence[Any], most: int) -> None:
    """Raise UserError when there are more than a recipe has, before thousands of them are looked at one by one."""
    if len(given) > most:
        raise UserError(f"Choose between 1 and {most} {what}, not {len(given)}.")


def numbers(what: str, text: str, kind: type[N]) -> list[N]:
    """Numbers separated by commas or spaces. Raises UserError naming the piece that is no number."""
    pieces = [piece for piece in re.split(r"[,;\s]+", text[: limits.MAX_PROMPT_CHARS]) if piece]
    found: list[N] = []
    for piece in pieces:
        try:
            found.append(kind(piece))
        except ValueError as error:
            wanted = "whole numbers" if kind is int else "numbers"
            raise UserError(f"{what} must be {wanted} separated by commas; {piece[:40]!r} is not.") from error
    return found


def seeds(given: str | int | Sequence[Any]) -> list[Any]:
    """Seeds from "0, 1, 2", a number or a list; a list is checked by the recipe. Raises UserError."""
    if isinstance(given, str):
        return list(numbers("Seeds", given, int))
    if isinstance(given, list | tuple):
        return list(given)
    return [given]


def size(given: str | int | None) -> Any:
    """A picture's side from a text field; None where it is empty. Raises UserError for what is no number."""
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        return given
    found = numbers("The size", given, int)
    if len(found) > 1:
        raise UserError(f"The size is one number, the side of the picture; {given[:40]!r} are several.")
    return found[0] if found else None


def parameter(dial: Parameter, given: Any) -> Any:
    """What stands in a parameter's widget, as the recipe wants it; an empty widget means the default."""
    if given is None or given == "":
        return dial.default
    if dial.type == "floats" and isinstance(given, str):
        return numbers(dial.name, given, float)
    return dial.parse(given) if isinstance(given, str) else given
