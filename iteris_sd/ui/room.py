"""How much the visitors of a public page may bring: what is there is counted, and what is on its way kept free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gradio.utils import get_upload_folder

from iteris_sd import hub, limits, serving
from iteris_sd.errors import UserError

_ELSEWHERE = "or run the page on a machine of your own"


@dataclass(frozen=True)
class _Coming:
    """What a visitor is about to bring. `visitor`: whose, by the folder of the visit."""

    visitor: Path
    size: int
    concepts: int


_coming: list[_Coming] = []
_lock = threading.Lock()


@contextmanager
def reserved(visitor: Path, size: int, concepts: int = 0) -> Iterator[None]:
    """Keep room for so many bytes and concepts more within the block, so that nobody else is promised the same.

    `visitor`: the folder of a visit, with all that it has brought, beside those of all others. Raises UserError when a
    public page has no such room; a page that is one's own always has.
    """
    one = _Coming(visitor, size, concepts)
    with _lock:
        if serving.public():
            _check(one)
        _coming.append(one)
    try:
        yield
    finally:
        with _lock:
            _coming.remove(one)


def is_expecting(visitor: Path) -> bool:
    """Whether room is kept for a visitor just now."""
    return any(one.visitor == visitor for one in list(_coming))


def _check(more: _Coming) -> None:
    own = [one for one in (*_coming, more) if one.visitor == more.visitor]
    kept = len(list(more.visitor.glob("concepts/[!.]*/concept.json"))) + sum(one.concepts for one in own)
    if more.concepts and kept > (most := limits.MAX_PUBLIC_CONCEPTS):
        raise UserError(f"A visitor of this public page can keep {most} concepts; remove one, {_ELSEWHERE}.")
    places = [more.visitor / "concepts", more.visitor / "exports"]
    size, most = bytes_of(places) + sum(one.size for one in own), limits.MAX_PUBLIC_BYTES
    if size > most:
        raise UserError(
            f"With this your concepts would have {hub.readable(size)}, and a visitor of this public page can keep "
            f"{hub.readable(most)}; remove one, {_ELSEWHERE}."
        )
    everyone = bytes_of([more.visitor.parent, Path(get_upload_folder())])
    if everyone + sum(one.size for one in (*_coming, more)) > limits.MAX_PUBLIC_BYTES_IN_ALL:
        raise UserError(
            f"This public page is full of what its visitors brought; try again later, {_ELSEWHERE}."
        )


def bytes_of(places: Iterable[Path]) -> int:
    """How many bytes files have, and all files in folders; one that goes meanwhile has none."""
    total = 0
    for file in files_in(places):
        with suppress(OSError):
            total += file.lstat().st_size
    return total


def files_in(places: Iterable[Path]) -> Iterator[Path]:
    """Files, and all files in folders, which may be vanishing."""
    for place in places:
        if place.is_dir():
            yield from (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
        elif place.exists():
            yield place
