"""Builds the page and launches it; the entry point of the Hugging Face Space."""

import os

from iteris_sd import serving

if serving.lent():
    # What was loaded would be cleared from the Hub's cache, and then be missing there.
    os.environ.setdefault("ZEROGPU_MMAP_AUTOPRUNE_PATTERN", "nothing")
    import spaces  # noqa: F401  # before anything looks for a GPU: it puts a pretended one in its place

from iteris_sd.ui import launch, prepare

prepare()

if __name__ == "__main__":
    launch()
