"""Concepts that a person keeps on this machine: added, changed, taken away as a zip and brought back.

Each is a folder as `concepts` reads it, and is called as that folder is. It is made in a hidden folder beside the
others and then moved to its place, so that nothing half-made is ever seen.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from iteris_sd import bases, concepts, limits, zips
from iteris_sd.concepts import Concept, Library, read_concept
from iteris_sd.errors import UserError
from iteris_sd.files import patiently, possible

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED = ".unfinished-"  # what the name of a folder begins with as long as it is being made
_WORDS = (
    *("name", "title", "trigger", "class_noun", "base", "description", "licence"),
    *("weight", "source", "revision"),
)
_EDITABLE = ("title", "trigger", "class_noun", "weight", "description")
_KNOWN = re.compile(
    r"concept\.json|lora\.safetensors"
    r"|lora/(?:(?:unet|text_encoder)/)?(?:adapter_config\.json|adapter_model\.safetensors)"
    r"|embeddings/[^./][^/]*\.safetensors|references/[^./][^/]*\.(?i:png|jpe?g|webp)"
)  # the files of a concept's folder


@dataclass(frozen=True)
class Kept:
    """The concepts kept in `folder`, which need not exist yet."""

    folder: Path

    @staticmethod
    def usual() -> Kept:
        """Those of this user: in the folder for an application's data, or in that of ITERIS_SD_DATA."""
        return Kept(user_data() / "concepts")

    def library(self) -> Library:
        """All that can be read; the others are `broken`."""
        return Library({name: one for name, one in self._found().items() if isinstance(one, Concept)})

    @property
    def broken(self) -> Mapping[str, str]:
        """The folders that are no concepts, and why."""
        return {name: str(one) for name, one in self._found().items() if isinstance(one, UserError)}

    def add(
        self,
        source: Path,
        *,
        name: str = "",
        title: str = "",
        trigger: str = "",
        class_noun: str = "",
        weight: float | None = None,
        base: str = "",
        origin: str = "",
        revision: str = "",
        references: Sequence[Path] = (),
        tokens: Sequence[Path] = (),
    ) -> Concept:
        """Keep a copy of a LoRA file, of a folder that PEFT has saved an adapter into, or of a concept's folder.

        What is not said is as the concept's folder says, else guessed; the base, Stable Diffusion v1.5. The name is
        made fit for a folder, and numbered where another concept has it, shipped ones included. `tokens`: files of
        learned tokens that belong to it, too; of two of the same token the last counts. Raises UserError when anything
        cannot be read, does not fit the base, or is out of bounds; then nothing is kept.
        """
        told, files, bundled = _read(source, origin)
        learned = _learned(told.name, (*told.embeddings, *tokens))
        said: dict[str, Any] = {
            "title": title,
            "trigger": trigger,
            "class_noun": class_noun,
            "weight": weight,
        }
        said |= {"name": name.strip() or title, "base": base, "source": origin, "revision": revision}
        told = replace(told, **{word: v for word, v in said.items() if v is not None and str(v).strip()})
        told = replace(told, base=bases.find(told.base).family)
        _check_widths({**bundled, **learned}, told.base)
        with drafting(self.folder) as draft:
            made = draft / "made"
            made.mkdir()
            _write_words(made, told)
            concept = read_concept(made)  # words are checked before gigabytes are copied
            for place, file in files.items():
                (made / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, made / place)
            _write_tokens(made / "embeddings", learned)
            _write_references(made / "references", references or told.references)
            return self._settled(made, concept)

    def edit(
        self,
        name: str,
        /,
        *,
        references: Sequence[Path] | None = None,
        tokens: Sequence[Path] = (),
        **changes: Any,
    ) -> Concept:
        """Change title, trigger, class_noun, weight or description of a concept.

        `references`: pictures to put in place of its own, None to leave these; `tokens`: files of learned tokens to
        add, each in the place of one of the same token. Raises UserError when there is no such concept, a word is out
        of bounds, a file cannot be read, or a token does not fit its base; then nothing changes.
        """
        if unknown := sorted(set(changes) - set(_EDITABLE)):
            raise UserError(f"{unknown[0]} cannot be changed; {', '.join(_EDITABLE)} can.")
        concept = replace(self._own(name), **changes)
        with drafting(self.folder) as draft:
            _write_words(draft, concept)
            read_concept(draft)
            if tokens:
                learned = _learned(name, (*concept.embeddings, *tokens))
                _check_widths(learned, concept.base)
                _write_tokens(draft / "embeddings", learned)
            if references is not None:
                _write_references(draft / "references", references)
            for part in ("embeddings", "references"):
                if (draft / part).exists():
                    _exchange(self.folder / name / part, draft / part, draft / f"old {part}")
            place = self.folder / name / "concept.json"
            patiently(lambda: (draft / "concept.json").replace(place))
        return self._one(name)

    def remove(self, name: str) -> None:
        """Remove a concept, or a broken folder. Raises UserError when there is none, or it cannot be removed."""
        if name not in self.broken:
            self._own(name)
        with drafting(self.folder) as draft:
            patiently(lambda: (self.folder / name).rename(draft / "removed"))

    def export_zip(self, name: str, path: Path) -> None:
        """Write a concept's folder as one zip. Raises UserError when there is none, or `path` cannot be written."""
        self.library().find(name)
        folder = self.folder / name
        files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
        with drafting(path.parent) as draft:
            with zipfile.ZipFile(draft / "made.zip", "w", strict_timestamps=False) as archive:
                for inside, file in files.items():
                    if _KNOWN.fullmatch(inside):
                        archive.write(file, f"{name}/{inside}")
            (draft / "made.zip").replace(path)

    def import_zip(self, path: Path, most: int | None = None) -> Concept:
        """Keep the concept in a zip as `export_zip` writes it, its files at the top or in one folder.

        `most`: how many bytes it may unpack to; those of one large file unless given. Raises UserError when it is no
        such zip, holds anything else, or what `add` checks is wrong; then nothing is kept.
        """
        with drafting(self.folder) as draft:
            unpacked = draft / "unpacked"
            try:
                zips.unpack(path, unpacked, _of_a_concept, most)
                return self.add(unpacked)
            except UserError as error:
                told = str(error).replace(str(unpacked), "its folder")
                raise UserError(f"{path.name} cannot be imported: {told[:1].lower()}{told[1:]}") from error

    def _found(self) -> dict[str, Concept | UserError]:
        """Every folder, hidden ones left out."""
        found: dict[str, Concept | UserError] = {}
        for name in sorted(place.name for place in self.folder.glob("[!.]*") if place.is_dir()):
            try:
                found[name] = self._one(name)
            except UserError as error:
                found[name] = error
        return found

    def _own(self, name: str) -> Concept:
        """A concept that is kept here. Raises UserError when there is none of that name, and for a shipped one."""
        library = self.library()
        if name not in library.concepts and name in Library.shipped().concepts:
            raise UserError(
                f"{name} comes with this project, and stays as it is; add a LoRA of your own to change it."
            )
        return library.find(name)

    def _one(self, name: str) -> Concept:
        return replace(read_concept(self.folder / name), name=name)

    def _settled(self, made: Path, concept: Concept) -> Concept:
        """Move a finished folder to its place, under a name that no other concept has."""
        taken, slug = Library.shipped().concepts, _slug(concept.name)
        for name in itertools.chain([slug], (f"{slug}-{k}" for k in itertools.count(2))):
            place = self.folder / name
            if name in taken or place.exists():
                continue
            _write_words(made, replace(concept, name=name))
            try:
                patiently(partial(made.rename, place))
            except OSError:
                if not place.exists():
                    raise
                continue  # another process was quicker
            return self._one(name)
        raise AssertionError("numbers do not end")


def user_data() -> Path:
    """Where what this user keeps lies: the folder for an application's data, or that of ITERIS_SD_DATA."""
    told = os.environ.get("ITERIS_SD_DATA")
    return Path(told).expanduser() if told else platformdirs.user_data_path("iteris-sd", appauthor=False)


@contextmanager
def drafting(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder` to work in; it goes with all that is still in it when the block ends.

    Raises UserError when the disk is full, or nothing may be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as draft:
            yield Path(draft)
    except OSError as error:
        raise UserError(
            f"Nothing can be written into {folder} ({error.strerror or error}); make room, or choose another folder."
        ) from error


def _read(source: Path, origin: str) -> tuple[Concept, dict[str, Path], Mapping[str, Tensor]]:
    """A concept, the files of its LoRA by what they are called in its folder, and the tokens in them; all are read to
    check them."""
    from iteris_sd import formats, guessing

    if (source / "concept.json").is_file():
        concept = read_concept(source)
        content = formats.read(concept.lora)
    else:
        content = formats.read(source)
        concept = guessing.concept(source, content, origin)
    return concept, _lora_files(concept.lora, content.dialect), content.tokens


def _learned(name: str, paths: Sequence[Path]) -> dict[str, Tensor]:
    """Token -> vectors (vectors, width) of files of learned tokens, of two of the same token the last.

    Raises UserError when one cannot be read, or there are too many for a concept.
    """
    from iteris_sd import formats

    found: dict[str, Tensor] = {}
    for path in paths:
        found |= formats.read_embeddings(path)
    if len(found) > (most := limits.MAX_EMBEDDINGS):
        raise UserError(f"{name} has {len(found)} learned tokens; at most {most} are kept: leave some out.")
    return found


def _check_widths(tokens: Mapping[str, Tensor], base: str) -> None:
    """Raise UserError when a token's vectors are not as wide as the text states of the base model."""
    if not tokens:
        return
    from iteris_sd import backbone

    width = backbone.text_width(base)
    for token, vectors in tokens.items():
        if vectors.shape[-1] != width:
            raise UserError(
                f"The token {token!r} is {vectors.shape[-1]} wide, and {bases.find(base).title} takes tokens of "
                f"{width}; it is for another model: choose one that was trained on this."
            )


def _write_tokens(folder: Path, tokens: Mapping[str, Tensor]) -> None:
    """One file each, which holds the token's name: what a file was called may be that of another token's."""
    from iteris_sd import formats

    taken: set[str] = set()
    for token, vectors in tokens.items():
        slug = _slug(token, "token")
        names = itertools.chain([slug], (f"{slug}-{k}" for k in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        formats.write_embedding(folder / f"{name}.safetensors", token, vectors)


def _exchange(place: Path, new: Path, old: Path) -> None:
    """Put the folder `new` in the place of another, which goes to `old`; it comes back where that fails."""
    if place.exists():
        patiently(lambda: place.rename(old))
    try:
        patiently(lambda: new.rename(place))
    except OSError:
        if old.exists():
            old.rename(place)
        raise


def _of_a_concept(names: Sequence[str]) -> Sequence[str]:
    """All files of a zip. Raises UserError when it is not one that a concept was exported to."""
    if "concept.json" not in names:
        raise UserError("it holds no concept.json; choose a zip that a concept was exported to.")
    for name in names:
        if not _KNOWN.fullmatch(name):
            raise UserError(f"its entry {name[:80]!r} is no part of a concept; remove it from the zip.")
    return names


def _lora_files(lora: Path, dialect: str) -> dict[str, Path]:
    """The files of a LoRA; PEFT's scale stands in a second one."""
    from iteris_sd.formats import peft_folder

    if not lora.is_dir() and dialect != peft_folder.NAME:
        return {"lora.safetensors": lora}
    if not lora.is_dir():
        return {
            f"lora/{peft_folder.WEIGHTS}": lora,
            f"lora/{peft_folder.CONFIG}": lora.parent / peft_folder.CONFIG,
        }
    files = [p / n for p in peft_folder.adapters(lora) for n in (peft_folder.WEIGHTS, peft_folder.CONFIG)]
    return {f"lora/{file.relative_to(lora).as_posix()}": file for file in files}


def _write_words(folder: Path, concept: Concept) -> None:
    words = {word: getattr(concept, word) for word in _WORDS}
    text = json.dumps(words, indent=2, ensure_ascii=False) + "\n"
    (folder / "concept.json").write_bytes(text.encode("utf-8", "replace"))


def _write_references(folder: Path, paths: Sequence[Path]) -> None:
    """Copies of pictures as PNGs of moderate size, which say nothing of where and by whom they were taken."""
    from PIL import Image

    if len(paths) > limits.MAX_REFERENCES:
        raise UserError(
            f"{len(paths)} reference pictures are too many; choose at most {limits.MAX_REFERENCES}."
        )
    folder.mkdir()
    for number, path in enumerate(paths, start=1):
        picture = concepts.open_picture(path)
        picture.thumbnail((limits.MAX_REFERENCE_SIDE,) * 2, Image.Resampling.LANCZOS)
        picture.info.clear()
        picture.save(folder / f"{number:02}.png")


def _slug(name: str, otherwise: str = "concept") -> str:
    """A name fit for a folder or file, in small letters, with room for a number behind it."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", name).lower())
    return possible(words[: limits.MAX_NAME_CHARS - 4].strip("-_") or otherwise)
