"""The whole page: header and tabs, and how it is launched."""

from __future__ import annotations

import threading
from functools import partial

import gradio as gr
from PIL import Image

from iteris_sd import bases, limits, serving, weights
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.kept import Kept
from iteris_sd.ui import api, compose, jobs, theme
from iteris_sd.ui.visits import Visits

TITLE = "IterIS for Stable Diffusion"
_CLEAN_EVERY, _KEEP = 600, 6 * 3600  # seconds: files handed out for download
_warm = threading.Event()


def build(visits: Visits) -> gr.Blocks:
    """The page, not yet launched."""
    base = bases.find(weights.usual(visits.library))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_CLEAN_EVERY, _KEEP)) as page:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Put several LoRA concepts into one picture, and compare ways of merging them.</p>",
            elem_id="header",
            apply_default_css=False,
        )
        compose.tab(visits, base, page)
        api.add(visits, base)
        page.load(
            partial(_warm_up, base.name),
            queue=False,
            api_name="warm_up",
            api_visibility="private",
            show_progress="hidden",
        )
        page.unload(visits.leave)
    return page


def _warm_up(base: str) -> None:
    """Load the models while the first visitor looks at the page."""
    if not _warm.is_set():
        _warm.set()
        threading.Thread(target=_load, args=(base,), name="warm-up", daemon=True).start()


def _load(base: str) -> None:
    try:
        jobs.load(base)
    except UserError as error:
        print(error, flush=True)


def launch(host: str | None = None, port: int | None = None, share: bool = False) -> None:
    """Serve the page until interrupted; what is not given comes from Gradio's environment variables.

    Concepts that are added stay for good where the page is one person's own; on a public page they go with the visit.
    """
    Image.MAX_IMAGE_PIXELS = limits.MAX_PICTURE_PIXELS
    if share:
        serving.go_public()
    visits = Visits(Library.shipped(), None if serving.public() else Kept.usual())
    build(visits).queue(default_concurrency_limit=8, max_size=limits.MAX_WAITING).launch(
        server_name=host,
        server_port=port,
        share=share or None,
        theme=theme.theme(),
        css_paths=theme.STYLE,
        allowed_paths=[str(visits.root)],
        max_file_size=limits.MAX_FILE_BYTES,
        footer_links=["api", "settings"],
    )
