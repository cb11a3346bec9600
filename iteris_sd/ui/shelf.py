"""The tab of concepts: what there is, what is inside each, and one's own to add, change, take away and remove."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from iteris_sd import bases, serving
from iteris_sd.concepts import Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.ui import form as forms
from iteris_sd.ui import heavy, own, results
from iteris_sd.ui.inline import thumbnail
from iteris_sd.ui.own import Own
from iteris_sd.ui.visits import READING, Visits

_SIDE = 96  # of a reference picture in pixels
_READER = ThreadPoolExecutor(1, "reader")  # who waits for it takes no thread from the page's other events
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Tab:
    """The widgets."""

    which: gr.Dropdown
    told: gr.HTML
    own: Own


def layout(library: Library) -> Tab:
    """Lay the tab out."""
    stay = "as long as this page is open" if serving.public() else "and are there next time"
    lasting = f"Added here, they can be picked under Compose, {stay}."
    with gr.Row(elem_id="shelf"):
        with gr.Column(scale=1, min_width=320):
            forms.title("Your own concepts", lasting)
            mine = own.layout()
        with gr.Column(scale=1, min_width=320):
            forms.title("What is inside", "Any concept of the library, its reference pictures and its file.")
            which = gr.Dropdown(own.names(library), value=None, label="Concept", elem_id="look-at")
            told = forms.markup("", elem_id="inside")
    return Tab(which, told, mine)


def wire(visits: Visits, tab: Tab) -> None:
    """Make the looking work."""
    tab.which.change(_look(visits), tab.which, tab.told, api_name="look_at", **forms.SILENT)


def follow(visits: Visits, tab: Tab, event: Any, name: str) -> None:
    """After an event that may have changed the concept that is looked at, show what is inside it now."""
    event.then(_look(visits), tab.which, tab.told, api_name=name, **forms.SILENT)


def _look(visits: Visits) -> Callable[..., Coroutine[Any, Any, str]]:
    async def look(name: str | None, request: gr.Request) -> str:
        visit = visits.of(request)

        def told() -> str:
            concept = visit.library.concepts.get(name or "")
            return "" if concept is None else inside(concept)

        return await asyncio.get_running_loop().run_in_executor(_READER, told)

    return look


def inside(concept: Concept) -> str:
    """What a concept says of itself, its pictures, and what its file holds."""
    facts = {
        "Name": concept.name,
        "Trigger": concept.trigger,
        "Class noun": concept.class_noun,
        "Base model": bases.find(concept.base).title,
        "Weight to begin with": f"{concept.weight:g}",
        "Description": concept.description,
        "Licence": concept.licence,
        "From": concept.source,
    }
    try:
        facts |= _file(concept)
        problem = ""
    except UserError as error:
        problem = results.problem(str(error))
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(fact)}</dd>" for key, fact in facts.items() if fact)
    return f'<div class="pictures-row">{_pictures(concept)}</div><dl class="facts">{lines}</dl>{problem}'


def _file(concept: Concept) -> Mapping[str, str]:
    """What `inspect` finds in a concept's file."""
    found = dict(_described(concept.lora, _stamp(concept.lora)))
    learned = [found.pop("Learned tokens"), *(path.stem for path in concept.embeddings)]
    return found | {"Learned tokens": ", ".join(token for token in learned if token)}


def _stamp(lora: Path) -> Stamp:
    """What tells whether a file has changed, or one of a folder: names, bytes, and when each was written (ns)."""
    files = sorted(path for path in lora.rglob("*") if path.is_file()) if lora.is_dir() else [lora]
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


@lru_cache(maxsize=256)
def _described(lora: Path, stamp: Stamp) -> Mapping[str, str]:
    """What a file holds; read anew only when its `stamp` is another one. Raises UserError when it cannot be read."""
    heavy.bring_in()
    from iteris_sd import inspecting

    with READING:
        found = inspecting.describe(lora)
    parts = [
        f"{part}: {told.layers} layers of rank {', '.join(map(str, told.ranks))}"
        for part, told in found.parts.items()
    ]
    norms = [f"{block} {norm:.3g}" for block, norm in found.blocks.items()]
    return {
        "File": f"{lora.name}, {found.format}, for {found.family}",
        "Layers": "; ".join(parts),
        "Strength by block, ‖ΔW‖": "; ".join(norms),
        "Learned tokens": ", ".join(found.tokens),
    }


def _pictures(concept: Concept) -> str:
    shown = []
    for k, path in enumerate(concept.references, start=1):
        try:
            uri = thumbnail(path, path.stat().st_mtime_ns, _SIDE)
        except OSError:
            continue
        alt = escape(f"Reference picture {k} of {concept.title}", quote=True)
        shown.append(f'<img src="{uri}" alt="{alt}" width="{_SIDE}" height="{_SIDE}">')
    return "".join(shown)
