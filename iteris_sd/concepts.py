"""Concepts: a LoRA, its learned tokens, its trigger, class noun and reference pictures; and the library of them.

A concept is a folder::

    concept.json                     name, title, trigger, class_noun, base, description, licence, weight, source …
    lora.safetensors                 or lora/, as PEFT has saved it
    embeddings/<token>.safetensors   one learned token each; the token is written in the file
    references/*                     up to ten pictures: png, jpg, jpeg or webp

Nothing here loads tensors until `load` is called, so that a page can list concepts at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iteris_sd import bases, limits
from iteris_sd.errors import UserError
from iteris_sd.files import visible

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from iteris_sd.lora import LoRA

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
USUAL_STEMS = ("lora", "pytorch_lora_weights", "model", "adapter_model")  # file names that say nothing
_UNSAFE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]"
)  # controls, and halves of characters


@dataclass(frozen=True)
class Concept:
    """One thing a LoRA was trained on. `trigger` stands for it in prompts, `class_noun` says what it is.

    `weight`: how strongly it is applied unless told. `source`, `revision`: where it came from, a file's name or an id
    on the Hub and its commit.
    """

    name: str
    title: str
    trigger: str
    class_noun: str
    lora: Path
    embeddings: tuple[Path, ...] = ()
    references: tuple[Path, ...] = ()
    base: str = "storybook"
    description: str = ""
    licence: str = ""
    weight: float = 1.0
    source: str = ""
    revision: str = ""

    def described(self) -> dict[str, Any]:
        """What the terminal and the page show of it, as plain values."""
        shown = (
            "name",
            "title",
            "trigger",
            "class_noun",
            "base",
            "description",
            "licence",
            "weight",
            "source",
        )
        return {key: getattr(self, key) for key in shown} | {"references": len(self.references)}

    def load(self) -> Loaded:
        """Read its LoRA and tokens from disk. Raises UserError when a file is missing or broken."""
        from iteris_sd import formats

        content = formats.read(self.lora)
        tokens = dict(content.tokens)
        for path in self.embeddings:
            tokens |= formats.read_embeddings(path)
        return Loaded(self, content.lora, tokens, content.sha256)

    def pictures(self) -> list[Image.Image]:
        """Its reference pictures. Raises UserError when one cannot be opened."""
        return [open_picture(path) for path in self.references]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A concept with its tensors: `lora`, and `tokens` {token: (vectors, width)}; `sha256` is its LoRA file's."""

    concept: Concept
    lora: LoRA
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    sha256: str = ""

    @property
    def distils(self) -> bool:
        """Whether it is an LCM-LoRA, which the sampler lcm needs, by what it or its file is called."""
        called = (self.concept.name, self.concept.title, self.concept.source, *self.concept.lora.parts[-2:])
        return any(re.search(r"(?<![a-z])lcm(?![a-z])", text.lower()) for text in called)


@dataclass(frozen=True)
class Library:
    """The concepts at hand, by name, in the order shown."""

    concepts: Mapping[str, Concept]

    @staticmethod
    def shipped() -> Library:
        """The concepts that come with the project."""
        return Library.read(bases.ASSETS / "concepts")

    @staticmethod
    def read(folder: Path) -> Library:
        """All concept folders in `folder`."""
        found = [read_concept(path.parent) for path in sorted(folder.glob("*/concept.json"))]
        return Library({concept.name: concept for concept in found})

    def of_base(self, base: str) -> list[Concept]:
        """The concepts made for one base model."""
        return [concept for concept in self.concepts.values() if concept.base == base]

    def joined(self, other: Library) -> Library:
        """The concepts of both, these first; of two that are called the same, this library's."""
        more = {name: concept for name, concept in other.concepts.items() if name not in self.concepts}
        return Library({**self.concepts, **more})

    def find(self, name: str) -> Concept:
        """The concept called `name`. Raises UserError when there is none."""
        if name not in self.concepts:
            raise UserError(
                f"There is no concept {name!r}; choose from {', '.join(self.concepts) or 'none'}."
            )
        return self.concepts[name]


def read_concept(folder: Path) -> Concept:
    """A concept from its folder. Raises UserError when `concept.json` is missing, incomplete or out of bounds."""
    path = folder / "concept.json"
    try:
        if path.stat().st_size > limits.MAX_CONCEPT_BYTES:
            raise UserError(
                f"{path} is no description of a concept: it has more than {limits.MAX_CONCEPT_BYTES:,} bytes."
            )
        return _told(folder, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{folder} is no concept: {path.name} cannot be read ({error.strerror}).") from error
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no description of a concept: it is not a JSON object.") from error
    except KeyError as error:
        raise UserError(f"{path} is no description of a concept: it does not tell its {error}.") from error


def _told(folder: Path, data: Mapping[str, Any]) -> Concept:
    """A concept from its folder and what its description says. Raises KeyError for what it does not."""
    file, peft = folder / "lora.safetensors", folder / "lora"
    shown = visible((folder / "references").glob("*"))
    pictures = sorted(p for p in shown if p.suffix.lower() in PICTURES)
    return Concept(
        name=_word("name", data["name"]),
        title=_word("title", data["title"]),
        trigger=_word("trigger", data["trigger"]),
        class_noun=_word("class noun", data["class_noun"]),
        lora=peft if peft.is_dir() and not file.exists() else file,
        embeddings=tuple(sorted(visible((folder / "embeddings").glob("*.safetensors")))),
        references=tuple(pictures[: limits.MAX_REFERENCES]),
        base=_word("base model", data.get("base", "storybook")),
        description=_remark("description", data.get("description", "")),
        licence=_remark("licence", data.get("licence", "")),
        weight=_weight(data.get("weight", 1.0)),
        source=_remark("source", data.get("source", "")),
        revision=_remark("revision", data.get("revision", "")),
    )


def tidy(text: str) -> str:
    """A text in one line, without control characters."""
    return " ".join(_UNSAFE.sub("", text).split())


def in_words(name: str) -> str:
    """A file's name as people would say it."""
    return tidy(name.replace("_", " ").replace("-", " "))


def _word(what: str, word: object) -> str:
    """A name for people, tidy. Raises UserError when it is no text, empty or too long."""
    if not isinstance(word, str) or not (found := tidy(word)):
        raise UserError(f"The {what} of a concept must be a word or a few, not {word!r}.")
    if len(found) > limits.MAX_NAME_CHARS:
        raise UserError(
            f"The {what} has {len(found)} characters; at most {limits.MAX_NAME_CHARS} are allowed."
        )
    return found


def _remark(what: str, text: object) -> str:
    """What may be said of a concept, tidy. Raises UserError when it is no text or too long."""
    if not isinstance(text, str):
        raise UserError(f"The {what} of a concept must be a text, not {text!r}.")
    if len(text) > limits.MAX_REMARK_CHARS:
        raise UserError(
            f"The {what} has {len(text)} characters; at most {limits.MAX_REMARK_CHARS} are allowed."
        )
    return tidy(text)


def _weight(weight: object) -> float:
    """How strongly a concept is applied. Raises UserError when that is no number or out of bounds."""
    number = weight if isinstance(weight, int | float) and not isinstance(weight, bool) else 0
    if not 0 < number <= limits.MAX_WEIGHT:
        raise UserError(
            f"The weight of a concept must be a number above 0 and at most {limits.MAX_WEIGHT:g}, not {weight!r}."
        )
    return float(number)


def check_together(picked: Sequence[Loaded], base: str) -> None:
    """Raise UserError when concepts cannot be used together: another base, or a name, trigger or token twice."""
    for k, one in enumerate(picked):
        if any(one.concept.name == other.concept.name for other in picked[:k]):
            raise UserError(
                f"Two concepts are called {one.concept.name!r}; pick one of them, or rename its file or folder."
            )
        if one.concept.base != base:
            raise UserError(
                f"The concept {one.concept.name} was made for {one.concept.base}, not for {base}; "
                "pick another base model or concept."
            )
    triggers: dict[str, str] = {}
    tokens: dict[str, str] = {}
    for one in picked:
        name = one.concept.name
        first = triggers.setdefault(one.concept.trigger.lower(), name)
        if first != name:
            raise UserError(
                f"{first} and {name} have the same trigger, {one.concept.trigger!r}; a prompt cannot tell them apart. "
                "Pick one of them, or give one another trigger."
            )
        for token in one.tokens:
            if tokens.setdefault(token, name) != name:
                raise UserError(
                    f"{tokens[token]} and {name} both bring the token {token!r}; pick one of them."
                )


def open_picture(path: Path) -> Image.Image:
    """A picture, upright and in RGB. Raises UserError when it is too large, or none that can be opened."""
    from PIL import Image, ImageOps

    try:
        # Formats are named, because Pillow hands others, whatever the file is called, to programs such as Ghostscript.
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height > limits.MAX_PICTURE_PIXELS:
                raise UserError(
                    f"{path.name} has more than {limits.MAX_PICTURE_PIXELS} pixels; make it smaller."
                )
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UserError:
        raise
    except Exception as error:  # a decoder that meets a broken file fails in ways of its own
        raise UserError(f"{path.name} is no picture that can be opened.") from error
