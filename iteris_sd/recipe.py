"""What a person asked for: one validated value, JSON in and out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from iteris_sd import bases, limits, prompting
from iteris_sd.errors import UserError
from iteris_sd.merging import registry

BASE_COLUMN = "base"  # a reference column: no LoRA at all
ALONE_COLUMN = "alone"  # reference columns: each concept's own LoRA, and nobody else's
REFERENCES = (BASE_COLUMN, ALONE_COLUMN)
Sampler = Literal["ddim", "dpm++", "ddpm", "euler a", "unipc", "lcm"]
Scoring = Literal["", "storybook", "vit-l-14", "none"]
_PLACE = re.compile(r"\{(\d+)\}")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


BlockWeight = Annotated[float, Field(ge=0, le=limits.MAX_WEIGHT)]


class Blocks(_Value):
    """How strongly a concept is applied in each part of the model, times its weight; with 0 its LoRA has no layers
    there."""

    text_encoder: BlockWeight = 1.0
    down: BlockWeight = 1.0
    mid: BlockWeight = 1.0
    up: BlockWeight = 1.0

    @model_validator(mode="after")
    def _something(self) -> Blocks:
        if not any(dict(self).values()):
            raise UserError("All block weights of a concept are 0; raise one, or leave the concept out.")
        return self


class ConceptUse(_Value):
    """A picked concept: its name in the library (or a path, from a terminal) and how strongly it is applied."""

    name: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, le=limits.MAX_WEIGHT)] = 1.0
    blocks: Blocks = Blocks()


class MethodUse(_Value):
    """Columns of the grid: a merging method with its parameters, `base`, or `alone`, one column for each concept."""

    name: str
    parameters: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known(self) -> MethodUse:
        if self.name in REFERENCES:
            if self.parameters:
                raise UserError(f"The reference column {self.name} has no parameters.")
        elif self.name not in registry.METHODS:
            known = ", ".join([*REFERENCES, *registry.METHODS])
            raise UserError(f"There is no method {self.name!r}; choose from {known}.")
        else:
            registry.find(self.name).validate(self.parameters)
        return self

    def check_concepts(self, count: int) -> None:
        """Raise UserError when a parameter that has one number per concept has another number of them."""
        dials = () if self.name in REFERENCES else registry.find(self.name).parameters
        for name in (dial.name for dial in dials if dial.scope == "concept"):
            given = self.parameters.get(name)
            if given is not None and len(given) != count:
                raise UserError(f"{name} needs one number per concept, {count}, not {len(given)}.")


class Calibration(_Value):
    """Where data-driven methods get layer inputs from.

    `samples` prompts per concept, each with one latent from the concept's own trajectory of `steps` steps.
    `unconditional`: as many samples more with the empty prompt, at the latents of the first ones, since guidance runs
    the merged adapter on it too. `tokens_per_sample`: of a picture's places, only so many are looked at in each layer;
    no less than a prompt has positions.
    """

    samples: Annotated[int, Field(ge=1, le=limits.MAX_SAMPLES)] = 50
    steps: Annotated[int, Field(ge=1, le=limits.MAX_TRAJECTORY_STEPS)] = 10
    seed: Annotated[int, Field(ge=0, le=limits.MAX_SEED)] = 0
    unconditional: Annotated[int, Field(ge=0, le=limits.MAX_SAMPLES)] = 0
    tokens_per_sample: Annotated[int, Field(ge=limits.MIN_TOKENS_PER_SAMPLE)] | None = None

    @model_validator(mode="after")
    def _enough_latents(self) -> Calibration:
        if self.unconditional > self.samples:
            raise UserError(
                f"{self.unconditional} samples without a prompt need as many with one, found {self.samples}; raise "
                "samples, or lower unconditional."
            )
        return self


class Recipe(_Value):
    """One composition: which concepts, which picture, by which methods, from which seeds, how drawn.

    In `prompt`, `{0}`, `{1}` … stand for the trigger phrases of `concepts` in order; triggers may be written out, too.
    `(word:1.2)` weighs words there and in `negative`. `size` in pixels and `scorer`: the base model's own unless given.
    `clip_skip`: which of the text encoder's layers is read, 1 the last one, as A1111 counts. `strength`: how strongly
    merged adapters are applied when pictures are drawn. `retention`: of so many of the seeds, also draw each concept
    alone, by its own LoRA and by each merged adapter, to see what the merge kept of it (the paper's Fig. 5a).
    """

    version: Literal[1] = 1
    base: str = "storybook"
    concepts: tuple[ConceptUse, ...]
    prompt: str
    negative: Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARS)] = ""
    methods: tuple[MethodUse, ...] = (
        MethodUse(name="base"),
        MethodUse(name="linear"),
        MethodUse(name="iteris"),
    )
    seeds: tuple[Annotated[int, Field(ge=0, le=limits.MAX_SEED)], ...] = (0, 1, 2, 3)
    sampler: Sampler = "ddim"
    steps: Annotated[int, Field(ge=1, le=limits.MAX_STEPS)] = 20
    guidance: Annotated[float, Field(ge=1.0, le=limits.MAX_GUIDANCE)] = 4.0
    size: Annotated[int, Field(ge=limits.MIN_SIZE, le=limits.MAX_SIZE, multiple_of=64)] | None = None
    clip_skip: Annotated[int, Field(ge=1, le=limits.MAX_CLIP_SKIP)] = 1
    scorer: Scoring = ""
    strength: Annotated[float, Field(ge=0, le=limits.MAX_STRENGTH)] = 1.0
    retention: Annotated[int, Field(ge=0, le=limits.MAX_SEEDS)] = 0
    calibration: Calibration = Calibration()

    @field_validator("base")
    @classmethod
    def _base_exists(cls, base: str) -> str:
        return bases.find(base).name

    @field_validator("concepts")
    @classmethod
    def _concepts_bounded(cls, concepts: tuple[ConceptUse, ...]) -> tuple[ConceptUse, ...]:
        _bounded(len(concepts), limits.MAX_CONCEPTS, "concept")
        _distinct([c.name for c in concepts], "concept")
        return concepts

    @field_validator("methods")
    @classmethod
    def _methods_bounded(cls, methods: tuple[MethodUse, ...]) -> tuple[MethodUse, ...]:
        _bounded(len(methods), limits.MAX_METHODS, "method")
        _distinct([m.name for m in methods], "method")
        return methods

    @field_validator("seeds")
    @classmethod
    def _seeds_bounded(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        _bounded(len(seeds), limits.MAX_SEEDS, "seed")
        _distinct(seeds, "seed")
        return seeds

    @field_validator("prompt")
    @classmethod
    def _prompt_says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise UserError("The prompt is empty; say what the picture should show.")
        if len(prompt) > limits.MAX_PROMPT_CHARS:
            raise UserError(
                f"The prompt has {len(prompt)} characters; at most {limits.MAX_PROMPT_CHARS} are allowed."
            )
        _check_written("prompt", prompt)
        prompting.parse(prompt)
        return prompt.strip()

    @field_validator("negative")
    @classmethod
    def _negative_can_be_read(cls, negative: str) -> str:
        _check_written("negative prompt", negative)
        prompting.parse(negative)
        return negative

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.count > limits.MAX_PICTURES:
            also = ", and what each concept alone looks like," if self.retention else ""
            raise UserError(
                f"{len(self.seeds)} seeds by {len(self.columns)} columns{also} make {self.count} pictures; "
                f"at most {limits.MAX_PICTURES} are allowed."
            )
        if self.sampler == "lcm" and self.steps > limits.MAX_LCM_STEPS:
            raise UserError(
                f"The sampler lcm takes at most {limits.MAX_LCM_STEPS} steps, not {self.steps}; 4 to 8 suit it."
            )
        for place in places(self.prompt):
            if place >= len(self.concepts):
                count = len(self.concepts)
                raise UserError(
                    f"The prompt speaks of {{{place}}}, but only {count} concepts are picked: "
                    f"{{0}} to {{{count - 1}}}."
                )
        for use in self.methods:
            use.check_concepts(len(self.concepts))
        return self

    @property
    def merging(self) -> tuple[MethodUse, ...]:
        """The methods that merge: all but the references."""
        return tuple(use for use in self.methods if use.name not in REFERENCES)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the grid: names of methods, `base`, and `alone:<concept>` for each concept."""
        return tuple(
            column
            for use in self.methods
            for column in ([alone(c.name) for c in self.concepts] if use.name == ALONE_COLUMN else [use.name])
        )

    @property
    def retained(self) -> tuple[int, ...]:
        """The seeds that each concept alone is drawn of."""
        return self.seeds[: self.retention]

    @property
    def count(self) -> int:
        """How many pictures it asks for."""
        kept = len(self.retained) * len(self.concepts) * (1 + len(self.merging))
        return len(self.seeds) * len(self.columns) + kept

    @staticmethod
    def of(data: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values. Raises UserError with one sentence on the first thing that is wrong."""
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            raise UserError(_sentence(error)) from error

    @staticmethod
    def read(path: Path) -> Recipe:
        """A recipe from a JSON file. Raises UserError when it is missing, too large, no JSON, or no recipe."""
        return Recipe.of(Recipe.data(path))

    @staticmethod
    def data(path: Path) -> dict[str, Any]:
        """The plain values in a recipe's JSON file. Raises UserError when it is missing, too large or no JSON."""
        try:
            if path.stat().st_size > limits.MAX_RECIPE_BYTES:
                raise UserError(
                    f"{path} is too large to be a recipe ({limits.MAX_RECIPE_BYTES} bytes at most)."
                )
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no recipe: it is not valid JSON.") from error
        if not isinstance(data, dict):
            raise UserError(f"{path} is no recipe: a JSON object is expected, found {type(data).__name__}.")
        return data

    def json_text(self) -> str:
        """The recipe as readable JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def alone(concept: str) -> str:
    """The column of one concept's own LoRA."""
    return f"{ALONE_COLUMN}:{concept}"


def title(column: str) -> str:
    """What a column, or a method of a recipe, is called for people."""
    if column == BASE_COLUMN:
        return "Base model"
    if column == ALONE_COLUMN:
        return "Each concept alone"
    reference, _, concept = column.partition(":")
    return f"{concept} alone" if reference == ALONE_COLUMN else registry.find(column).title


def places(prompt: str) -> list[int]:
    """The numbers of the places `{0}`, `{1}` … that a prompt speaks of, in its order."""
    return [int(place) for place in _PLACE.findall(prompt)]


def fill(prompt: str, names: Sequence[str]) -> str:
    """Put `names` in the places `{0}`, `{1}` … of a prompt."""
    return _PLACE.sub(lambda place: names[int(place[1])], prompt)


def _check_written(what: str, text: str) -> None:
    """Raise UserError when a text holds half of a character, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The {what} holds half of a character at {error.start + 1}; write it anew."
        ) from error


def _bounded(count: int, most: int, noun: str) -> None:
    if not 1 <= count <= most:
        raise UserError(f"Choose between 1 and {most} {noun}s, not {count}.")


def _distinct(values: Sequence[object], noun: str) -> None:
    twice = next((v for k, v in enumerate(values) if v in values[:k]), None)
    if twice is not None:
        raise UserError(f"The {noun} {twice} is given twice; give each {noun} once.")


def _sentence(error: ValidationError) -> str:
    """The first complaint of pydantic, in our words where it was ours."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    where = " ".join(str(part) for part in first["loc"]) or "the recipe"
    found = f", not {first['input']!r}" if isinstance(first["input"], str | int | float) else ""
    return f"In the recipe, {where}: {first['msg'][0].lower()}{first['msg'][1:]}{found}."
