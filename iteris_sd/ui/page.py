"""The whole page: header and tabs, and how it is launched."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import colab_check, is_hosted_notebook
from PIL import Image
from starlette.middleware import Middleware

from iteris_sd import bases, limits, serving, weights
from iteris_sd.bases import Base
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.history import History
from iteris_sd.kept import Kept
from iteris_sd.ui import api, compose, door, jobs, own, past, results, shelf, space, theme, why
from iteris_sd.ui import form as forms
from iteris_sd.ui import picker as pickers
from iteris_sd.ui.form import SILENT, Update
from iteris_sd.ui.visits import Visits

TITLE = "IterIS for Stable Diffusion"
_CLEAN_EVERY, _KEEP = 600, 6 * 3600  # seconds: files that were uploaded, or handed out for download
_SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
_ICON = Path(__file__).with_name("favicon.png")
_warm = threading.Lock()


def build(visits: Visits, first: str | None = None) -> gr.Blocks:
    """The page, not yet launched; `first`: the base model it begins with, the usual one unless given."""
    base = bases.find(first or weights.usual(visits.library))
    keep = limits.MAX_PUBLIC_UPLOAD_SECONDS if serving.public() else _KEEP
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_CLEAN_EVERY, keep)) as page:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Put several LoRA concepts into one picture, and compare ways of merging them.</p>",
            elem_id="header",
            apply_default_css=False,
        )
        lacking = space.lacking()
        notice = forms.markup(results.said(lacking) if lacking else "", elem_id="notice")
        forms.markup(results.said(_left()), elem_id="left")  # page.js shows it where it is so
        with gr.Tabs(selected="compose", overflow_behavior="wrap") as tabs:
            with gr.Tab("Compose", id="compose"):
                composing = compose.layout(visits, base, notice)
            with gr.Tab("Why", id="why", render_children=True):
                inside = why.layout()
            with gr.Tab("History", id="history", render_children=True) as history:
                before = past.layout()
            with gr.Tab("Concepts", id="concepts", render_children=True):
                concepts = shelf.layout(visits.library)
        compose.wire(visits, composing)
        why.wire(visits, composing.form, inside)
        past.wire(visits, composing, before, tabs, history, past.drop_anywhere())
        shelf.wire(visits, concepts)

        def follow(event: Any, name: str) -> None:
            compose.follow(visits, composing.form, event, name)
            shelf.follow(visits, concepts, event, f"{name}_inside")

        own.wire(visits, composing.form, concepts.own, concepts.which, follow)
        composing.add.click(lambda: gr.Tabs(selected="concepts"), outputs=tabs, api_name="add_own", **SILENT)
        _on_load(page, visits, base, composing, concepts)
        api.add(visits, base)
        page.unload(visits.leave)
    return page


def _left() -> str:
    """What is told of a composition that was at work when its page was loaded anew."""
    finished = "" if serving.public() else " Pictures that were finished by then are under History."
    return f"Loading the page anew stopped the composition that was at work.{finished}"


def _on_load(
    page: gr.Blocks, visits: Visits, base: Base, composing: compose.Tab, concepts: shelf.Tab
) -> None:
    """What a visit sees that was not known when the page was laid out: its concepts, a link's recipe, the device."""
    form = composing.form
    words = form.words

    def show_library(request: gr.Request) -> Update:
        visit = visits.of(request)
        shown: Update = {
            words.picked: gr.HTML(choices=pickers.choices(visit.library.of_base(base.family))),
            words.sets: gr.Dataset(samples=forms.set_samples(visit.library, base)),
            concepts.own.which: own.shelf(visit),
            concepts.which: gr.Dropdown(own.names(visit.library)),
        }
        query = request.query_params.get("recipe")
        return shown | (compose.from_link(query, composing, visits, request) if query else {})

    def warm_up() -> None:
        """Load the models while the first visitor looks at the page."""
        try:
            with _warm:
                jobs.load(base.name)
        except UserError as error:
            print(error, flush=True)

    def show_device(chosen: str) -> str:
        return forms.told_of_base(bases.find(chosen))

    outputs: dict[Any, None] = dict.fromkeys(
        [*composing.restored, words.sets, concepts.own.which, concepts.which]
    )
    page.load(show_library, outputs=list(outputs), api_name="show_library", **SILENT)
    warm = page.load(warm_up, api_name="warm_up", **SILENT)
    warm.then(show_device, form.base, form.base_told, api_name="show_device", **SILENT)


def _shared_anyway() -> bool:
    """Whether Gradio would open a public link by itself: then strangers come, and must be treated so."""
    wanted = os.environ.get("GRADIO_SHARE", "").lower() == "true"
    return wanted or colab_check() or is_hosted_notebook()


def launch(
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    mcp: bool = False,
    base: str | None = None,
) -> None:
    """Serve the page until interrupted; what is not given comes from Gradio's environment variables.

    Concepts that are added, and what is composed, stay for good where the page is one person's own; on a public page
    they go with the visit. `mcp`: compose and merge are also tools of a Model Context Protocol server. `base`: the
    base model that the page begins with. Raises UserError when strangers may not draw with it.
    """
    Image.MAX_IMAGE_PIXELS = limits.MAX_PICTURE_PIXELS
    share = share or _shared_anyway()
    if share:
        serving.go_public()
    weights.safety_wanted()  # where the environment says what is not understood, it is told now
    if base is not None and serving.public():
        weights.check_safe(bases.find(base))
    kept, history = (None, None) if serving.public() else (Kept.usual(), History.usual())
    visits = Visits(Library.shipped(), kept, history)
    allowed = [visits.shown] if history is None else [visits.shown, history.folder]
    door.take_no_addresses()
    page = build(visits, base)
    # Anywhere but on a Space Gradio would also run what waits in the queue at once, for those who ask past it.
    page.queue(api_open=False, default_concurrency_limit=8, max_size=limits.MAX_WAITING)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme.theme(),
        css_paths=theme.STYLE,
        js=_SCRIPT,
        favicon_path=_ICON,
        allowed_paths=[str(path) for path in allowed],
        max_file_size=limits.MAX_PUBLIC_FILE_BYTES if serving.public() else limits.MAX_FILE_BYTES,
        footer_links=["api", "settings"],
        run_history=False,  # the page has its own; Gradio's would stay in a browser that others use, too
        state_session_capacity=limits.MAX_SESSIONS,
        app_kwargs={"middleware": [Middleware(door.Door, visitors=visits.root)]},
        mcp_server=mcp or None,
        ssr_mode=False,  # a Space asks for it; the page's own script was never tried under it
    )
