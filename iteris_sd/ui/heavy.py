"""What is heavy to import, torch and all that stands on it, comes when it is needed, and in one thread at a time."""

from __future__ import annotations

import threading

IMPORTING, _there = threading.Lock(), threading.Event()


def is_there() -> bool:
    """Whether it has been imported."""
    return _there.is_set()


def bring_in() -> None:
    """Import what is heavy, in one thread at a time: two that begin it at once trip over half-made modules.

    Where it is there already, nobody waits: the lock is also held while a base model loads.
    """
    if is_there():
        return
    with IMPORTING:
        from iteris_sd import (  # noqa: F401
            adding,
            backbone,
            composer,
            explaining,
            previewing,
            rendering,
            samples,
            scoring,
        )

        _there.set()
