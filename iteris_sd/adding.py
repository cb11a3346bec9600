"""Concepts that a person brings: from a file, a folder, or the Hugging Face Hub; which base they are for is told by
their shapes, and nothing is kept that does not fit it."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from iteris_sd import bases, formats, guessing, hub, inspecting
from iteris_sd.concepts import Concept, Library, read_concept
from iteris_sd.errors import UserError
from iteris_sd.kept import Kept
from iteris_sd.layers import check_fit
from iteris_sd.lora import LoRA


def family(lora: LoRA, name: str) -> str:
    """Which of the base models' families a LoRA is for, told by its shapes. Raises UserError when it is for none."""
    from iteris_sd import backbone

    told = bases.TEXT_WIDTHS.get(inspecting.text_width(lora) or 0)
    candidates = [told] if told else list(bases.TEXT_WIDTHS.values())
    problems = []
    for candidate in candidates:
        try:
            check_fit(lora, backbone.skeleton(candidate), name)
        except UserError as error:
            problems.append(error)
        else:
            return candidate
    raise problems[0]  # that of Stable Diffusion v1.5, which people's LoRAs are for


def opened(source: Path, origin: str = "") -> Concept:
    """A concept at a path: its own folder, a LoRA file or a folder that one was saved into, whose words are guessed.

    `origin`: where a file came from, if not from there. Raises UserError when there is none, it cannot be read, or it
    fits no base model.
    """
    if (source / "concept.json").is_file():
        return read_concept(source)
    if not source.exists():
        raise UserError(f"There is no concept and no file {str(source)!r}; `concepts` lists the names.")
    source = formats.located(source)
    content = formats.read(source)
    found = guessing.concept(source, content, origin)
    return replace(found, base=family(content.lora, f"The LoRA {source.name}"))


def opening(library: Library, names: Iterable[str]) -> Generator[tuple[int, int], None, Library]:
    """The library and those of `names` that are paths or ids on the Hub; yields bytes done and bytes in all.

    For a terminal, whose user may open any file; a page must not. Raises UserError when a name is unknown or leads
    nowhere.
    """
    found = dict(library.concepts)
    for name in names:
        path = Path(name)
        if name in found:
            continue
        id = None if path.exists() else hub.parse(name)
        if id is not None:
            fetched = yield from hub.fetch_lora(id)
            concept = opened(fetched.file, str(id))
            found[name] = replace(concept, embeddings=fetched.tokens, revision=fetched.revision)
        elif path.suffix or len(path.parts) > 1 or path.exists():
            found[name] = opened(path)
        else:
            library.find(name)
    return Library(found)


def keep(kept: Kept, source: Path, **words: Any) -> Concept:
    """Keep a concept from a LoRA file, a folder that one was saved into, or a concept's; `words` are `Kept.add`'s.

    Raises UserError when it cannot be read, or fits no base model.
    """
    described = (source / "concept.json").is_file()
    source = source if described else formats.located(source)
    lora = read_concept(source).lora if described else source
    base = family(formats.read(lora).lora, f"The LoRA {source.name}")
    return kept.add(source, base=base, **words)


def unpack(kept: Kept, path: Path, most: int | None = None) -> Concept:
    """Keep the concept in a zip that one was exported to, which unpacks to at most so many bytes.

    Raises UserError as `keep` does, and when its LoRA is for another base model than it says.
    """
    concept = kept.import_zip(path, most)
    try:
        found = family(concept.load().lora, f"The LoRA of {concept.name}")
        if found != concept.base:
            raise UserError(
                f"{path.name} says that its LoRA is for {bases.find(concept.base).title}, and by its shapes it is for "
                f'{bases.find(found).title}; write "base": "{found}" into its concept.json, or bring the LoRA alone.'
            )
    except UserError:
        kept.remove(concept.name)
        raise
    return concept
