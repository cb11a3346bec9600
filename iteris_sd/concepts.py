"""Concepts: a LoRA, its learned tokens, its trigger, class noun and reference pictures; and the library of them.

A concept is a folder::

    concept.json                     name, title, trigger, class_noun, base, description, licence
    lora.safetensors
    embeddings/<token>.safetensors   one learned token each; the token is written in the file
    references/*.png                 up to ten pictures

Nothing here loads tensors until `load` is called, so that a page can list concepts at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iteris_sd import bases, limits
from iteris_sd.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from iteris_sd.lora import LoRA

_USUAL_STEMS = ("lora", "pytorch_lora_weights", "model")  # file names that say nothing of their content


@dataclass(frozen=True)
class Concept:
    """One thing a LoRA was trained on. `trigger` stands for it in prompts, `class_noun` says what it is."""

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

    def described(self) -> dict[str, Any]:
        """What the terminal and the page show of it, as plain values."""
        shown = ("name", "title", "trigger", "class_noun", "base", "description", "licence")
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
        return [_open_picture(path) for path in self.references]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A concept with its tensors: `lora`, and `tokens` {token: (vectors, width)}; `sha256` is its LoRA file's."""

    concept: Concept
    lora: LoRA
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    sha256: str = ""


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

    def with_concept(self, concept: Concept) -> Library:
        """The library and one concept more. Raises UserError when the name is taken."""
        if concept.name in self.concepts:
            raise UserError(f"There is already a concept called {concept.name!r}; choose another name.")
        return Library({**self.concepts, concept.name: concept})

    def find(self, name: str) -> Concept:
        """The concept called `name`. Raises UserError when there is none."""
        if name not in self.concepts:
            raise UserError(
                f"There is no concept {name!r}; choose from {', '.join(self.concepts) or 'none'}."
            )
        return self.concepts[name]

    def opening(self, names: Iterable[str]) -> Library:
        """The library and those of `names` that are paths of concept folders or LoRA files.

        For a terminal, whose user may open any file; a page must not. Raises UserError when a name is unknown or a
        path leads nowhere.
        """
        unknown = [name for name in names if name not in self.concepts]
        found = {name: _opened(Path(name)) if _is_path(name) else self.find(name) for name in unknown}
        return Library({**self.concepts, **found})


def _is_path(name: str) -> bool:
    """Whether a name is meant as a path: it has a suffix or a folder in it, or it is there."""
    path = Path(name)
    return bool(path.suffix) or len(path.parts) > 1 or path.exists()


def _opened(path: Path) -> Concept:
    return read_concept(path) if path.is_dir() else from_file(path)


def read_concept(folder: Path) -> Concept:
    """A concept from its folder. Raises UserError when `concept.json` is missing or incomplete."""
    path = folder / "concept.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Concept(
            name=_word("name", data["name"]),
            title=_word("title", data["title"]),
            trigger=_word("trigger", data["trigger"]),
            class_noun=_word("class noun", data["class_noun"]),
            lora=folder / "lora.safetensors",
            embeddings=tuple(sorted((folder / "embeddings").glob("*.safetensors"))),
            references=tuple(sorted((folder / "references").glob("*.png"))[: limits.MAX_REFERENCES]),
            base=data.get("base", "storybook"),
            description=data.get("description", ""),
            licence=data.get("licence", ""),
        )
    except OSError as error:
        raise UserError(f"{folder} is no concept: {path.name} cannot be read ({error.strerror}).") from error
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no description of a concept: it is not a JSON object.") from error
    except KeyError as error:
        raise UserError(f"{path} is no description of a concept: it does not tell its {error}.") from error


def from_file(
    path: Path, *, name: str = "", trigger: str = "", class_noun: str = "", base: str = "storybook"
) -> Concept:
    """A concept from a bare LoRA file; what is not said is guessed from the file's name.

    Raises UserError when the file is missing, or a word is too long.
    """
    if not path.is_file():
        raise UserError(f"There is no concept and no file {str(path)!r}; `concepts` lists the names.")
    stem = path.absolute().parent.name if path.stem in _USUAL_STEMS else path.stem
    name = _word("name", name or stem)
    noun = _word("class noun", class_noun or stem.replace("_", " ").replace("-", " "))
    return Concept(name, name, _word("trigger", trigger or noun), noun, path, base=base)


def _word(what: str, word: object) -> str:
    """A name for people, stripped. Raises UserError when it is no text, empty or too long."""
    if not isinstance(word, str) or not word.strip():
        raise UserError(f"The {what} of a concept must be a word or a few, not {word!r}.")
    if len(word.strip()) > limits.MAX_NAME_CHARS:
        raise UserError(
            f"The {what} has {len(word.strip())} characters; at most {limits.MAX_NAME_CHARS} are allowed."
        )
    return word.strip()


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


def _open_picture(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > limits.MAX_PICTURE_PIXELS:
                raise UserError(
                    f"{path.name} has more than {limits.MAX_PICTURE_PIXELS} pixels; make it smaller."
                )
            return picture.convert("RGB")
    except OSError as error:
        raise UserError(f"{path.name} is no picture that can be opened.") from error
