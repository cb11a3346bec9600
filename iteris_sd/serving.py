"""Whether strangers use this process, on a Hugging Face Space or through a public link, and whether its GPU is lent."""

from __future__ import annotations

import importlib.util
import os

_SHARED = "ITERIS_SD_PUBLIC"


def public() -> bool:
    """Whether bounds, the safety checker, and the Hub without the owner's token are in place."""
    return "SPACE_ID" in os.environ or _SHARED in os.environ


def go_public() -> None:
    """From now on strangers use it."""
    os.environ[_SHARED] = "1"


def lent() -> bool:
    """Whether there is a GPU for the length of a call only (ZeroGPU), by Hugging Face's package `spaces`."""
    wanted = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")  # as that package reads it
    return wanted and importlib.util.find_spec("spaces") is not None
