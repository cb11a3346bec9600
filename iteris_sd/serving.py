"""Whether strangers use this process: on a Hugging Face Space, or through a public link to the page."""

from __future__ import annotations

import os

_SHARED = "ITERIS_SD_PUBLIC"


def public() -> bool:
    """Whether bounds, the safety checker, and the Hub without the owner's token are in place."""
    return "SPACE_ID" in os.environ or _SHARED in os.environ


def go_public() -> None:
    """From now on strangers use it."""
    os.environ[_SHARED] = "1"
