"""What people bring at once: a LoRA with its settings and its learned tokens, as several files or in a zip.

A file says by what it holds whether it is a LoRA or a token. What a folder would say of files that came one by one, as
from a browser, is made up for by putting them into one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from iteris_sd import limits, zips
from iteris_sd.concepts import USUAL_STEMS, Concept
from iteris_sd.errors import UserError
from iteris_sd.formats import peft_files
from iteris_sd.kept import Kept, drafting

_TENSORS, _ZIP = ".safetensors", ".zip"


@dataclass(frozen=True)
class Brought:
    """`source`: a LoRA file, or a folder that `formats.read` reads; None where there are only tokens. `tokens`: their
    files."""

    source: Path | None
    tokens: tuple[Path, ...] = ()


def keep(
    kept: Kept, files: Sequence[Path], *, tokens: Sequence[Path] = (), most: int | None = None, **words: Any
) -> Concept:
    """Keep a concept from what was brought: a LoRA with what belongs to it, or a zip that a concept was exported to.

    `tokens`: files of learned tokens more; `most`: how many bytes a zip may unpack to, those of one large file unless
    given; `words` are those of `Kept.add`, which an exported concept has itself. Raises UserError when there is no
    LoRA, several, one that cannot be read, or one that fits no base model.
    """
    from iteris_sd import adding

    exported = [file for file in files if is_exported(file)]
    if exported and len(files) > 1:
        raise UserError(f"{exported[0].name} is a whole concept; add it alone, and its tokens afterwards.")
    if exported:
        concept = adding.unpack(kept, exported[0], most)
        try:
            return kept.edit(concept.name, tokens=tokens) if tokens else concept
        except UserError:
            kept.remove(concept.name)
            raise
    with sorted_out(files, kept.folder, most) as found:
        if found.source is None:
            check_tokens(found.tokens)
            raise UserError(
                f"{_listed(found.tokens)} holds learned tokens and no LoRA; add it together with its LoRA, or to a "
                "concept that you have kept."
            )
        return adding.keep(kept, found.source, tokens=(*found.tokens, *tokens), **words)


def are_tokens(files: Sequence[Path]) -> bool:
    """Whether all of these files are meant as learned tokens and nothing else; `check_tokens` reads them."""
    return all(map(_is_token, files))


def check_tokens(files: Sequence[Path]) -> None:
    """Raise UserError when one of these files of learned tokens cannot be used."""
    from iteris_sd import formats

    for file in files:
        formats.read_embeddings(file)


def size(files: Sequence[Path]) -> int:
    """How many bytes files have, those in zips once they are unpacked. Raises UserError when a zip cannot be."""
    return sum(
        _unpacked_size(file) if _is_zip(file) else file.stat().st_size for file in files if file.is_file()
    )


def _unpacked_size(file: Path) -> int:
    try:
        return zips.size(file)
    except UserError as error:
        raise _unpackable(file, error) from error


def is_exported(file: Path) -> bool:
    """Whether this is a zip that a concept was exported to."""
    if not _is_zip(file):
        return False
    try:
        return "concept.json" in zips.names(file)
    except UserError as error:
        raise _unpackable(file, error) from error


@contextmanager
def sorted_out(files: Sequence[Path], around: Path, most: int | None = None) -> Iterator[Brought]:
    """Within the block, the LoRA among the files, or in the zips among them, and its tokens.

    What has to be unpacked, to `most` bytes as in `keep`, or put together is, in a hidden folder inside `around`, which
    goes at the end. Raises UserError when there are several LoRAs, or a file that is of no use.
    """
    if len(files) > limits.MAX_BROUGHT:
        raise UserError(f"These are {len(files)} files; a concept has at most {limits.MAX_BROUGHT}.")
    if len(files) == 1 and not _is_zip(files[0]):
        only = files[0]  # where it is, as its settings may lie beside it
        yield Brought(None, (only,)) if _is_token(only) else Brought(only)
        return
    if sum(map(_is_zip, files)) > 1:
        raise UserError("These are several zips; bring one at a time.")
    with drafting(around) as draft:
        there: list[Path] = []
        for file in files:
            if _is_zip(file):
                there += _unpacked(file, draft / "unpacked" / (file.stem.rstrip(" .") or "zip"), most)
            elif _has_tensors(file) or file.name == peft_files.CONFIG:
                there.append(file)
            else:
                raise UserError(
                    f"{file.name} is of no use here; choose {_TENSORS} files, the {peft_files.CONFIG} of one, or a zip "
                    "of them."
                )
        yield _sorted(_together(there, draft))


def _unpacked(file: Path, folder: Path, most: int | None) -> list[Path]:
    """The files of a zip that make up a LoRA; a model card, pictures and the like stay packed."""

    def wanted(names: Sequence[str]) -> list[str]:
        found = [PurePosixPath(name) for name in names]
        useful = [p for p in found if _has_tensors(p) or p.name == peft_files.CONFIG]
        return [str(p) for p in useful if not any(step.startswith(".") for step in p.parts)]

    try:
        zips.unpack(file, folder, wanted, most)
    except UserError as error:
        raise _unpackable(file, error) from error
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if not found:
        raise UserError(f"{file.name} holds no {_TENSORS} file; choose a zip with a LoRA.")
    return found


def _unpackable(file: Path, error: UserError) -> UserError:
    return UserError(f"{file.name} cannot be imported: {error}")


def _together(files: Sequence[Path], draft: Path) -> list[Path]:
    """The files, with PEFT's settings and the one LoRA among them in one folder, where they came one by one."""
    loose = [file for file in files if not file.is_relative_to(draft)]
    configs = [file for file in loose if file.name == peft_files.CONFIG]
    loras = [file for file in loose if _has_tensors(file) and not _is_token(file)]
    if not configs:
        return list(files)
    if len(configs) > 1 or len(loras) != 1:
        raise UserError(
            f"There are {len(configs)} {peft_files.CONFIG} and {len(loras)} LoRAs, and one of each belongs together; "
            "bring an adapter of several folders as a zip."
        )
    stems = (file.stem for file in loose if _has_tensors(file) and file.stem not in USUAL_STEMS)
    folder = draft / "together" / next(stems, "my LoRA")
    folder.mkdir(parents=True)
    moved = [folder / peft_files.WEIGHTS, folder / peft_files.CONFIG]
    for file, place in zip((*loras, *configs), moved, strict=True):
        shutil.copyfile(file, place)
    return [file for file in files if file not in (*loras, *configs)] + moved


def _sorted(files: Sequence[Path]) -> Brought:
    """One LoRA and its tokens. Raises UserError when there are several."""
    from iteris_sd import formats

    tensors = [file for file in files if _has_tensors(file)]
    tokens = tuple(file for file in tensors if _is_token(file))
    adapters = [file.parent for file in files if file.name == peft_files.CONFIG]
    sources = {place.parent if place.name in peft_files.COMPONENTS else place for place in adapters}
    weights = {place / peft_files.WEIGHTS for place in adapters}
    whole = {place.parent for place in weights & set(files)}  # what lies beside these weights is another LoRA
    owned = weights | {file for file in tensors if file.parent in adapters and file.parent not in whole}
    sources |= {file for file in tensors if file not in tokens and file not in owned}
    if len(sources) > 1:
        for source in sorted(sources):
            formats.read(source)  # one may be no LoRA, and says why
        raise UserError(
            f"These are several LoRAs, {_listed(sorted(sources))}; bring one at a time, each with its own tokens."
        )
    return Brought(next(iter(sources), None), tokens)


def _is_token(file: Path) -> bool:
    """Whether a file is meant as learned tokens and nothing else; whether they can be used is another matter."""
    from iteris_sd import formats

    return _has_tensors(file) and file.is_file() and formats.holds_tokens(file)


def _is_zip(file: Path) -> bool:
    return file.suffix.lower() == _ZIP


def _has_tensors(file: PurePath) -> bool:
    return file.suffix.lower() == _TENSORS


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)
