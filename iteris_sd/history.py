"""Compositions that were made, newest first: each a folder with its pictures, its recipe and its scores.

A folder is made under a hidden name beside the others and moved to its place, and it is moved away before it is
removed, so that nobody sees half of one. Several processes may share a history.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from iteris_sd import bases, concepts, limits, restoring
from iteris_sd.errors import UserError
from iteris_sd.files import patiently
from iteris_sd.kept import UNFINISHED, drafting, user_data
from iteris_sd.recipe import Recipe, fill

Phase = Literal["done", "stopped"]
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
_WORDS, _RECIPE, _SCORES = "entry.json", "recipe.json", "scores.json"
_GRID, _THUMBNAIL = "grid.png", "thumbnail.webp"
_OURS = {_WORDS, _RECIPE, _SCORES, _THUMBNAIL}  # written from values, whatever files are given


class _Words(BaseModel):
    """What entry.json says. Newer versions may say more."""

    model_config = ConfigDict(extra="ignore")

    id: str
    made: AwareDatetime
    title: str
    phase: Phase
    pictures: tuple[str, ...]  # names of files, in the order of making


@dataclass(frozen=True)
class Entry:
    """A composition that was made, whole or stopped, in its own folder. `title`: one line of what it was.

    `pictures` are in the order in which they were kept; `thumbnail`, a WebP of at most 320 px, and `grid` may be
    missing.
    """

    id: str
    made: datetime
    title: str
    phase: Phase
    folder: Path
    pictures: tuple[Path, ...]
    thumbnail: Path | None
    grid: Path | None

    def recipe(self) -> Recipe:
        """What was asked for.

        Raises UserError when the file is broken, gone, or of a newer version, or when its base model is not known now.
        """
        try:
            return restoring.from_file(self.folder / _RECIPE)
        except UserError as error:
            if (base := _unknown_base(self.folder / _RECIPE)) is None:
                raise
            raise UserError(
                f"This was made with the base model {base!r}, which is not known now; start with --base and the path "
                "of that model, and open this again."
            ) from error

    def scores(self) -> dict[str, Any] | None:
        """What `export.scores` told; None where nothing did. Raises UserError when the file is broken."""
        path = self.folder / _SCORES
        if not path.exists():
            return None
        try:
            return _object(path, limits.MAX_SCORES_BYTES)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"The scores of {self.id} cannot be read: {_reason(error)}.") from error


@dataclass(frozen=True)
class History:
    """The compositions kept in `folder`, which need not exist yet: at most `most`, and `most_bytes` of files.

    The newest one is kept even where it alone has more bytes.
    """

    folder: Path
    most: int = limits.MAX_HISTORY
    most_bytes: int = limits.MAX_HISTORY_BYTES

    @staticmethod
    def usual() -> History:
        """That of this user, beside the concepts that `Kept.usual` keeps."""
        return History(user_data() / "history")

    def keep(
        self, recipe: Recipe, scores: Mapping[str, Any] | None, files: Sequence[Path], phase: str
    ) -> Entry:
        """Keep a composition with its files, and let the oldest go where there are too many. `phase`: done, stopped.

        `files`: pictures in the order of the grid, grid.png, and whatever else belongs to it. They are linked where the
        disk can do that, so they must not be written into afterwards; else copied. Raises UserError when one is
        missing, two have the same name, or nothing can be written; then nothing is kept.
        """
        _check(files, phase)
        with drafting(self.folder) as draft:
            self._sweep()
            place = draft / "made"
            place.mkdir()
            pictures = _fill(place, recipe, scores, files)
            entry = self._settled(place, _title(recipe, len(pictures)), phase, pictures)
        self._evict()
        return entry

    def entries(self) -> list[Entry]:
        """All that can be read, newest first; the others are `broken`."""
        return [one for one in self._found().values() if isinstance(one, Entry)]

    @property
    def broken(self) -> Mapping[str, str]:
        """The folders that are no compositions, by id, and why."""
        return {id: str(one) for id, one in self._found().items() if isinstance(one, UserError)}

    def find(self, id: str) -> Entry:
        """The composition of this id. Raises UserError when there is none, or it is broken."""
        return _read(self._place(id))

    def delete(self, id: str) -> None:
        """Remove a composition, or a broken folder. Raises UserError when there is none, or it cannot be removed."""
        place = self._place(id)
        try:
            self._remove(place)
        except FileNotFoundError:
            raise _missing(id) from None
        except OSError as error:
            raise UserError(
                f"The composition {id} cannot be removed ({error.strerror or error}); remove {place} yourself."
            ) from error

    def _found(self) -> dict[str, Entry | UserError]:
        found: dict[str, Entry | UserError] = {}
        for place in self._places():
            try:
                found[place.name] = _read(place)
            except UserError as error:
                if place.exists():  # else it was removed meanwhile
                    found[place.name] = error
        return found

    def _places(self) -> list[Path]:
        """The folders of all entries, newest first."""
        try:
            found = [place for place in self.folder.iterdir() if _ID.fullmatch(place.name)]
            return sorted((place for place in found if place.is_dir()), reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"The history in {self.folder} cannot be read ({_reason(error)}).") from error

    def _place(self, id: str) -> Path:
        place = self.folder / id if _ID.fullmatch(id) else None
        if place is None or not place.is_dir():
            raise _missing(id)
        return place

    def _settled(self, draft: Path, title: str, phase: str, pictures: Sequence[str]) -> Entry:
        """Move a finished folder to its place, under an id that no other entry has."""
        while True:
            made = datetime.now(UTC)
            # To the microsecond, so that ids sort as they were made; one digit more for those of the same one.
            id = f"{made:%Y%m%d-%H%M%S}-{16 * made.microsecond + secrets.randbelow(16):06x}"
            place = self.folder / id
            said = {"id": id, "made": made, "title": title, "phase": phase, "pictures": pictures}
            words = _Words.model_validate(said)
            _write_json(draft / _WORDS, words.model_dump(mode="json"))
            names = os.listdir(draft)
            try:
                patiently(partial(draft.rename, place))
            except OSError:
                if not place.exists():
                    raise
                continue  # another process was quicker
            return _entry(place, words, names)

    def _remove(self, place: Path) -> None:
        """Hide an entry's folder in one step, which a full disk allows, too; then remove it."""
        hidden = self.folder / f"{UNFINISHED}{place.name}"
        patiently(lambda: place.rename(hidden))
        with suppress(FileNotFoundError):  # another process sweeps there
            shutil.rmtree(hidden)

    def _evict(self) -> None:
        room = self.most_bytes
        for number, place in enumerate(self._places()):
            room -= _size(place)
            if number and (number >= self.most or room < 0):
                with suppress(OSError):  # another process removes it, or the next composition tries again
                    self._remove(place)

    def _sweep(self) -> None:
        """Remove what a crash left."""
        for place in self.folder.glob(f"{UNFINISHED}*"):
            with suppress(OSError):
                if time.time() - place.stat().st_mtime > limits.MAX_UNFINISHED_SECONDS:
                    shutil.rmtree(place)


def _check(files: Sequence[Path], phase: str) -> None:
    if phase not in get_args(Phase):
        raise UserError(f"A composition is {' or '.join(get_args(Phase))} when it is kept, not {phase!r}.")
    names = [file.name for file in files]
    if twice := next((name for k, name in enumerate(names) if name in names[:k]), None):
        raise UserError(f"Two files are called {twice}; give each file of a composition a name of its own.")
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(f"The composition cannot be kept: there is no file {missing}.")


def _fill(
    place: Path, recipe: Recipe, scores: Mapping[str, Any] | None, files: Sequence[Path]
) -> tuple[str, ...]:
    """Put all but entry.json into an empty folder; returns the names of the pictures."""
    for file in files:
        if file.name not in _OURS:
            _put(file, place / file.name)
    grids = [file for file in files if file.name == _GRID]
    pictures = [file for file in files if file.suffix == ".png" and file.name != _GRID]
    small = _small([*grids, *pictures])
    if small is not None:
        (place / _THUMBNAIL).write_bytes(small)
    (place / _RECIPE).write_text(recipe.json_text(), encoding="utf-8")
    if scores is not None:
        _write_json(place / _SCORES, scores)
    return tuple(file.name for file in pictures)


def _put(file: Path, place: Path) -> None:
    try:
        os.link(file.resolve(), place)  # resolved, lest a link be linked
    except OSError:
        shutil.copyfile(file, place)


def _small(candidates: Sequence[Path]) -> bytes | None:
    """The first picture that can be opened, as a small WebP."""
    from PIL import Image

    for path in candidates:
        with suppress(UserError):
            picture = concepts.open_picture(path)
            picture.thumbnail((limits.MAX_THUMBNAIL_SIDE,) * 2, Image.Resampling.LANCZOS)
            content = io.BytesIO()
            picture.save(content, format="WEBP", quality=80)
            return content.getvalue()
    return None


def _title(recipe: Recipe, pictures: int) -> str:
    """One line: prompt, concepts, methods, number of pictures."""
    names = [PurePath(use.name).name.removesuffix(".safetensors") for use in recipe.concepts]
    parts = (
        *(_cut(fill(recipe.prompt, names)), _cut(" + ".join(names))),
        ", ".join(use.name for use in recipe.methods),
        f"{pictures} picture{'' if pictures == 1 else 's'}",
    )
    return " · ".join(parts)


def _cut(text: str) -> str:
    line, most = " ".join(text.split()), limits.MAX_TITLE_CHARS
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _read(place: Path) -> Entry:
    """The entry in a folder. Raises UserError when it is none."""
    try:
        words = _Words.model_validate(_object(place / _WORDS, limits.MAX_ENTRY_BYTES))
        return _entry(place, words, os.listdir(place))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The composition {place.name} is broken: {_reason(error)}.") from error


def _entry(folder: Path, words: _Words, names: Collection[str]) -> Entry:
    """The entry of a folder with files of these `names`; a picture is none that lies elsewhere."""
    return Entry(
        id=folder.name,
        made=words.made,
        title=words.title,
        phase=words.phase,
        folder=folder,
        pictures=tuple(folder / name for name in words.pictures if name in names),
        thumbnail=folder / _THUMBNAIL if _THUMBNAIL in names else None,
        grid=folder / _GRID if _GRID in names else None,
    )


def _unknown_base(path: Path) -> str | None:
    """The name of a recipe's base model, where it is one that nobody has made known, such as one at a path."""
    try:
        base = _object(path, limits.MAX_RECIPE_BYTES).get("base")
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(base, str):
        return None
    try:
        bases.find(base)
    except UserError:
        return bases.called(base)[: limits.MAX_TITLE_CHARS]
    return None


def _object(path: Path, most: int) -> dict[str, Any]:
    """A JSON object in a file. Raises OSError, RecursionError or ValueError."""
    if path.stat().st_size > most:
        raise UserError(f"{path.name} has more than {most:,} bytes")
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise UserError(f"{path.name} holds no JSON object, but {type(data).__name__}")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _size(place: Path) -> int:
    """Bytes of all files in a folder, which may be vanishing."""
    size = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_size
    return size


def _missing(id: str) -> UserError:
    return UserError(f"There is no composition {id[:40]!r} in the history; it may have been removed.")


def _reason(error: Exception) -> str:
    """Why something could not be read, in a few words."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"in {_WORDS}, {' '.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return "it is not valid JSON"
