"""What people bring at once: a LoRA with its settings and its learned tokens, as several files or in a zip.

A file says by what it holds whether it is a LoRA or a token. What a folder would say of files that came one by one, as
from a browser, is made up for by putting them into one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from iteris_sd import limits, zips
from iteris_sd.concepts import USUAL_STEMS, Concept
from iteris_sd.errors import UserError
from iteris_sd.kept import Kept, drafting

_TENSORS, _ZIP, _CONFIG = ".safetensors", ".zip", "adapter_config.json"


@dataclass(frozen=True)
class Brought:
    """`source`: a LoRA file, or a folder that `formats.read` reads; None where there are only tokens. `tokens`: their
    files."""

    source: Path | None
    tokens: tuple[Path, ...] = ()


def keep(kept: Kept, files: Sequence[Path], *, tokens: Sequence[Path] = (), **words: Any) -> Concept:
    """Keep a concept from what was brought: a LoRA with what belongs to it, or a zip that a concept was exported to.

    `tokens`: files of learned tokens more; `words` are those of `Kept.add`, which an exported concept has itself.
    Raises UserError when there is no LoRA, several, one that cannot be read, or one that fits no base model.
    """
    from iteris_sd import adding

    exported = [file for file in files if is_exported(file)]
    if exported and len(files) > 1:
        raise UserError(f"{exported[0].name} is a whole concept; add it alone, and its tokens afterwards.")
    if exported:
        concept = adding.unpack(kept, exported[0])
        try:
            return kept.add_tokens(concept.name, tokens) if tokens else concept
        except UserError:
            kept.remove(concept.name)
            raise
    with sorted_out(files, kept.folder) as found:
        if found.source is None:
            raise UserError(
                f"{_listed(found.tokens)} holds learned tokens and no LoRA; add it together with its LoRA, or to a "
                "concept that you have kept."
            )
        return adding.keep(kept, found.source, tokens=(*found.tokens, *tokens), **words)


def are_tokens(files: Sequence[Path]) -> bool:
    """Whether all of these files hold learned tokens and nothing else."""
    return all(file.suffix == _TENSORS and _is_token(file) for file in files)


def is_exported(file: Path) -> bool:
    """Whether this is a zip that a concept was exported to."""
    if file.suffix.lower() != _ZIP:
        return False
    try:
        return "concept.json" in zips.names(file)
    except UserError as error:
        raise _unpackable(file, error) from error


@contextmanager
def sorted_out(files: Sequence[Path], around: Path) -> Iterator[Brought]:
    """Within the block, the LoRA among the files, or in the zips among them, and its tokens.

    What has to be unpacked or put together is, in a hidden folder inside `around`, which goes at the end. Raises
    UserError when there are several LoRAs, or a file that is of no use.
    """
    if len(files) > limits.MAX_BROUGHT:
        raise UserError(f"These are {len(files)} files; a concept has at most {limits.MAX_BROUGHT}.")
    if len(files) == 1 and files[0].suffix.lower() != _ZIP:
        only = files[0]  # where it is, as its settings may lie beside it
        yield Brought(None, (only,)) if only.is_file() and _is_token(only) else Brought(only)
        return
    if sum(file.suffix.lower() == _ZIP for file in files) > 1:
        raise UserError("These are several zips; bring one at a time.")
    with drafting(around) as draft:
        there: list[Path] = []
        for file in files:
            if file.suffix.lower() == _ZIP:
                there += _unpacked(file, draft / "unpacked" / file.stem)
            elif file.suffix == _TENSORS or file.name == _CONFIG:
                there.append(file)
            else:
                raise UserError(
                    f"{file.name} is of no use here; choose {_TENSORS} files, the {_CONFIG} of one, or a zip of them."
                )
        yield _sorted(_together(there, draft))


def _unpacked(file: Path, folder: Path) -> list[Path]:
    """The files of a zip that make up a LoRA; a model card, pictures and the like stay packed."""

    def wanted(names: Sequence[str]) -> list[str]:
        found = [PurePosixPath(name) for name in names]
        useful = [p for p in found if p.suffix == _TENSORS or p.name == _CONFIG]
        return [str(p) for p in useful if not any(step.startswith(".") for step in p.parts)]

    try:
        zips.unpack(file, folder, wanted)
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
    configs = [file for file in loose if file.name == _CONFIG]
    loras = [file for file in loose if file.suffix == _TENSORS and not _is_token(file)]
    if not configs:
        return list(files)
    if len(configs) > 1 or len(loras) != 1:
        raise UserError(
            f"There are {len(configs)} {_CONFIG} and {len(loras)} LoRAs, and one of each belongs together; bring an "
            "adapter of several folders as a zip."
        )
    stems = (file.stem for file in loose if file.suffix == _TENSORS and file.stem not in USUAL_STEMS)
    folder = draft / "together" / next(stems, "my LoRA")
    folder.mkdir(parents=True)
    moved = [folder / "adapter_model.safetensors", folder / _CONFIG]
    for file, place in zip((*loras, *configs), moved, strict=True):
        shutil.copyfile(file, place)
    return [file for file in files if file not in (*loras, *configs)] + moved


def _sorted(files: Sequence[Path]) -> Brought:
    """One LoRA and its tokens. Raises UserError when there are several."""
    from iteris_sd import formats
    from iteris_sd.formats import peft_folder

    tensors = [file for file in files if file.suffix == _TENSORS]
    tokens = tuple(file for file in tensors if _is_token(file))
    adapters = [file.parent for file in files if file.name == _CONFIG]
    sources = {place.parent if place.name in peft_folder.COMPONENTS else place for place in adapters}
    sources |= {file for file in tensors if file not in tokens and file.parent not in adapters}
    if len(sources) > 1:
        for source in sorted(sources):
            formats.read(source)  # one may be no LoRA, and says why
        raise UserError(
            f"These are several LoRAs, {_listed(sorted(sources))}; bring one at a time, each with its own tokens."
        )
    return Brought(next(iter(sources), None), tokens)


def _is_token(file: Path) -> bool:
    """Whether a file holds learned tokens and nothing else."""
    from iteris_sd import formats

    try:
        formats.read_embeddings(file)
    except UserError:
        return False
    return True


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)
