"""Zips that people bring: which files are in one, and those that are wanted, unpacked; strangers may have made it."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from iteris_sd import limits
from iteris_sd.errors import UserError

_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(ValueError, RuntimeError, OverflowError),
)  # what reading a damaged zip raises


def names(path: Path) -> list[str]:
    """The files in a zip; a folder that all of them lie in is left out. Raises UserError, "it …", as `unpack`."""
    with _opened(path) as archive:
        return list(_files(archive))


def size(path: Path) -> int:
    """How many bytes the files in a zip have once they are unpacked, as it says itself; `unpack` writes no more.

    Raises UserError, "it …", as `unpack`.
    """
    with _opened(path) as archive:
        return sum(entry.file_size for entry in _files(archive).values())


def unpack(
    path: Path,
    folder: Path,
    wanted: Callable[[Sequence[str]], Collection[str]],
    most: int | None = None,
) -> None:
    """Unpack the files that `wanted` picks from the `names` of a zip.

    `most`: how many bytes they may have together; those of one large file unless given. Raises UserError, "it …", when
    it is no zip, or holds what could do harm.
    """
    with _opened(path) as archive:
        files = _files(archive)
        most = limits.MAX_FILE_BYTES if most is None else most
        room = most = min(most, limits.MAX_ZIP_RATIO * path.stat().st_size)
        chosen = wanted(list(files))
        if len({name.lower() for name in files}) < sum(map(_is_brought, archive.infolist())):
            raise UserError("it holds a file twice; make it again.")
        for name in chosen:
            place = _inside(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(files[name]) as packed, place.open("wb") as unpacked:
                while piece := packed.read(limits.MAX_ZIP_READ_BYTES // 2):
                    room -= len(piece)
                    if room < 0:
                        raise UserError(f"it unpacks to more than {most:,} bytes; it is no honest zip.")
                    unpacked.write(piece)


class _Sparing(io.FileIO):
    """A file that gives little at once, because a zip's list of entries is read whole, as long as it says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = limits.MAX_ZIP_READ_BYTES
        found = super().read(most + 1 if size is None or size < 0 else min(size, most + 1)) or b""
        if len(found) > most:
            raise UserError(f"its list of entries has more than {most:,} bytes; it is no honest zip.")
        return found


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise UserError("it is not a file.")
    try:
        with _Sparing(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError("it is damaged, or no zip; make it again.") from error
    except OSError as error:
        raise UserError(f"it cannot be unpacked ({error.strerror or error}).") from error


def _files(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of a zip by name, without the one folder that all of them may lie in."""
    found = archive.infolist()
    if len(found) > limits.MAX_ZIP_ENTRIES:
        raise UserError(f"it holds {len(found)} entries; at most {limits.MAX_ZIP_ENTRIES} are unpacked.")
    for entry in found:
        _check(entry)
    files = {entry.filename: entry for entry in found if _is_brought(entry)}
    top = next(iter(files), "").partition("/")[0] + "/"
    if all(name.startswith(top) for name in files):
        files = {name.removeprefix(top): entry for name, entry in files.items()}
    return files


def _inside(folder: Path, name: str) -> Path:
    """Where a file of a zip goes. Raises UserError when that is not in the folder, whatever its name passed before."""
    place = folder / name
    if not place.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"its entry {name[:80]!r} leads out of its folder; it is no honest zip.")
    return place


def _is_brought(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is a file of somebody's, and none that macOS adds by itself."""
    return not entry.is_dir() and not entry.filename.startswith("__MACOSX/")


def _check(entry: zipfile.ZipInfo) -> None:
    """Raise UserError when an entry leads elsewhere, is no plain file, or is packed in a way that is not read."""
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    steps = name.removesuffix("/").split("/")
    if set(steps) & {"", ".", ".."} or set(name) & set("\\:") or not name.isprintable():
        raise UserError(f"its entry {name[:80]!r} has an unsafe name; rename it if you trust the zip.")
    if entry.filename != name:  # the second one is what is written to, on Python 3.12 and later
        raise UserError(
            f"its entry {name[:80]!r} has another name beside it, {entry.filename[:80]!r}; it is no honest zip, or was "
            "made by an old program: make it again with plain file names."
        )
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"its entry {name[:80]!r} is a link or a device, no plain file; it is no honest zip.")
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"its entry {name[:80]!r} is locked or packed by an unusual method; make it again.")
