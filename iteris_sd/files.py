"""What file systems differ in: names that some refuse, and moves that pass only at another try."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from iteris_sd.errors import UserError

T = TypeVar("T")
# On Windows a virus scanner, an indexer or a thread that reads may hold a file open for a moment; nothing moves then.
_TRIES, _PAUSE = (10 if os.name == "nt" else 1), 0.1
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{k}" for port in ("com", "lpt") for k in range(1, 10))}


def patiently(move: Callable[[], T]) -> T:
    """What `move` returns; it renames files or folders, and is tried again for a second where the system is Windows.

    Raises what it raises.
    """
    for _ in range(_TRIES - 1):
        try:
            return move()
        except PermissionError:
            time.sleep(_PAUSE)
    return move()


def possible(stem: str) -> str:
    """The name of a file without its suffix, or of a folder, changed where Windows takes it for a device."""
    return f"{stem}-" if stem.lower() in _DEVICES else stem


def visible(paths: Iterable[Path]) -> Iterator[Path]:
    """Those that are not hidden, such as what macOS writes beside each file on foreign disks (`._name`)."""
    return (path for path in paths if not path.name.startswith("."))


def nearest(path: Path) -> Path:
    """`path`, or the nearest folder around it that exists. Raises UserError when there is none, nor such a drive."""
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), None)
    if there is None:
        raise UserError(f"There is no {path.absolute().anchor}; choose a drive or folder that is there.")
    return there
