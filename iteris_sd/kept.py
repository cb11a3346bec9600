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
from pathlib import Path
from typing import Any

import platformdirs

from iteris_sd import bases, concepts, limits, zips
from iteris_sd.concepts import Concept, Library, read_concept
from iteris_sd.errors import UserError

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
        learned tokens that belong to it, too. Raises UserError when anything cannot be read or is out of bounds; then
        nothing is kept.
        """
        told, files = _read(source, origin, tokens)
        said: dict[str, Any] = {
            "title": title,
            "trigger": trigger,
            "class_noun": class_noun,
            "weight": weight,
        }
        said |= {"name": name.strip() or title, "base": base, "source": origin, "revision": revision}
        told = replace(told, **{word: v for word, v in said.items() if v is not None and str(v).strip()})
        told = replace(told, base=bases.find(told.base).family)
        with drafting(self.folder) as draft:
            made = draft / "made"
            made.mkdir()
            _write_words(made, told)
            concept = read_concept(made)  # words are checked before gigabytes are copied
            for place, file in files.items():
                (made / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, made / place)
            _write_references(made / "references", references or told.references)
            return self._settled(made, concept)

    def edit(self, name: str, /, **changes: Any) -> Concept:
        """Change title, trigger, class_noun, weight or description.

        Raises UserError when there is no such concept, or a word is out of bounds; then nothing changes.
        """
        if unknown := sorted(set(changes) - set(_EDITABLE)):
            raise UserError(f"{unknown[0]} cannot be changed; {', '.join(_EDITABLE)} can.")
        concept = replace(self.library().find(name), **changes)
        with drafting(self.folder) as draft:
            _write_words(draft, concept)
            read_concept(draft)
            (draft / "concept.json").replace(self.folder / name / "concept.json")
        return self._one(name)

    def set_references(self, name: str, paths: Sequence[Path]) -> Concept:
        """Put these pictures in place of a concept's. Raises UserError when one cannot be opened; none changes then."""
        self.library().find(name)
        place = self.folder / name / "references"
        with drafting(self.folder) as draft:
            new, old = draft / "new", draft / "old"
            _write_references(new, paths)
            _exchange(place, new, old)
        return self._one(name)

    def add_tokens(self, name: str, paths: Sequence[Path]) -> Concept:
        """Add files of learned tokens to a concept; one that is called as another takes its place.

        Raises UserError when one cannot be read, or there would be too many; none is added then.
        """
        concept, place = self.library().find(name), self.folder / name / "embeddings"
        files = {path.name: path for path in (*concept.embeddings, *paths)}
        _check_tokens(name, list(files.values()))
        with drafting(self.folder) as draft:
            new, old = draft / "new", draft / "old"
            new.mkdir()
            for called, path in files.items():
                shutil.copyfile(path, new / called)
            _exchange(place, new, old)
        return self._one(name)

    def remove(self, name: str) -> None:
        """Remove a concept, or a broken folder. Raises UserError when there is none, or it cannot be removed."""
        if name not in self.broken:
            self.library().find(name)
        with drafting(self.folder) as draft:
            (self.folder / name).rename(draft / "removed")

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

    def import_zip(self, path: Path) -> Concept:
        """Keep the concept in a zip as `export_zip` writes it, its files at the top or in one folder.

        Raises UserError when it is no such zip, holds anything else, or what `add` checks is wrong; then nothing is
        kept.
        """
        with drafting(self.folder) as draft:
            unpacked = draft / "unpacked"
            try:
                zips.unpack(path, unpacked, _of_a_concept)
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
                made.rename(place)
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


def _read(source: Path, origin: str, tokens: Sequence[Path]) -> tuple[Concept, dict[str, Path]]:
    """A concept and the files of its tensors, by what they are called in its folder; all are read to check them."""
    from iteris_sd import formats, guessing

    if (source / "concept.json").is_file():
        concept = read_concept(source)
        content = formats.read(concept.lora)
    else:
        content = formats.read(source)
        concept = guessing.concept(source, content, origin)
    learned = {f"embeddings/{path.name}": path for path in (*concept.embeddings, *tokens)}
    _check_tokens(concept.name, list(learned.values()))
    return concept, _lora_files(concept.lora, content.dialect) | learned


def _check_tokens(name: str, paths: Sequence[Path]) -> None:
    """Raise UserError when these are too many files of learned tokens, or one is none."""
    from iteris_sd import formats

    if len(paths) > limits.MAX_EMBEDDINGS:
        raise UserError(
            f"{name} has {len(paths)} files of learned tokens; at most {limits.MAX_EMBEDDINGS} are kept."
        )
    for path in paths:
        formats.read_embeddings(path)


def _exchange(place: Path, new: Path, old: Path) -> None:
    """Put the folder `new` in the place of another, which goes to `old`; it comes back where that fails."""
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
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


def _slug(name: str) -> str:
    """A name fit for a folder, with room for a number behind it."""
    words = re.sub(r"\W+", "-", unicodedata.normalize("NFKC", name).lower())
    return words[: limits.MAX_NAME_CHARS - 4].strip("-_") or "concept"
