"""Presets: concepts that go together with prompts for them, and settings to draw them by, from `presets/*.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.recipe import Sampler, fill, places

FOLDER = Path(__file__).resolve().parents[1] / "presets"
SETTINGS = "settings.yaml"
ANY = "*"  # stands for any concept

_Words = Annotated[str, Field(min_length=1, max_length=limits.MAX_PROMPT_CHARS)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


T = TypeVar("T", bound=_Value)


class Preset(_Value):
    """Concepts by name (or `*` for any) and prompts that speak of all of them as `{0}`, `{1}` … in that order."""

    name: str
    title: _Words
    source: Literal["paper", "project"]
    concepts: Annotated[tuple[_Words, ...], Field(min_length=1, max_length=limits.MAX_CONCEPTS)]
    prompts: Annotated[tuple[_Words, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _prompts_fit(self) -> Preset:
        expected = set(range(len(self.concepts)))
        for prompt in self.prompts:
            if set(places(prompt)) != expected:
                raise UserError(
                    f"the prompt {prompt!r} must speak of {{0}} to {{{max(expected)}}}, each of them"
                )
        if len(set(self.prompts)) < len(self.prompts):
            raise UserError("a prompt is given twice")
        return self

    @property
    def general(self) -> bool:
        """Whether it suits any concepts."""
        return ANY in self.concepts

    def prompts_for(self, picked: Sequence[str]) -> tuple[str, ...]:
        """Its prompts with the places in the order of `picked`; none when it is about other concepts."""
        if self.general:
            return self.prompts if len(picked) == len(self.concepts) else ()
        if sorted(picked) != sorted(self.concepts):
            return ()
        order = [f"{{{list(picked).index(name)}}}" for name in self.concepts]
        return tuple(fill(prompt, order) for prompt in self.prompts)


class Settings(_Value):
    """How to draw; `samples` are calibration samples."""

    name: str
    title: _Words
    description: _Words
    sampler: Sampler
    steps: Annotated[int, Field(ge=1, le=limits.MAX_STEPS)]
    guidance: Annotated[float, Field(ge=1, le=limits.MAX_GUIDANCE)]
    samples: Annotated[int, Field(ge=1, le=limits.MAX_SAMPLES)]


@cache
def presets(folder: Path = FOLDER) -> dict[str, Preset]:
    """All presets of a folder by name, those about particular concepts first. Raises UserError on a broken file."""
    found = [_checked(Preset, path, path.stem, _read(path)) for path in _files(folder)]
    return {preset.name: preset for preset in sorted(found, key=lambda p: (p.general, p.source, p.name))}


@cache
def settings(folder: Path = FOLDER) -> dict[str, Settings]:
    """All settings of a folder by name. Raises UserError on a broken file."""
    path = folder / SETTINGS
    return {name: _checked(Settings, path, name, values) for name, values in _read(path).items()}


def prompts_for(picked: Sequence[str], folder: Path = FOLDER) -> tuple[str, ...]:
    """Example prompts for the picked concepts: those made for just these, otherwise those for any so many."""
    for general in (False, True):
        found = [p.prompts_for(picked) for p in presets(folder).values() if p.general == general]
        fitting = tuple(prompt for prompts in found for prompt in prompts)
        if fitting:
            return fitting
    return ()


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.yaml")) if path.name != SETTINGS]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The preset file {path.name} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"The preset file {path.name} must hold names and values, not {type(content).__name__}."
        )
    return content


def _checked(kind: type[T], path: Path, name: str, values: Any) -> T:
    try:
        return kind.model_validate({"name": name, **values})
    except (ValidationError, TypeError) as error:
        reason = (
            error.errors()[0]["msg"]
            if isinstance(error, ValidationError)
            else "names and values are expected"
        )
        raise UserError(f"The preset {name} in {path.name} is not right: {reason}.") from error
