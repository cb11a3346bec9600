"""The tab of the history: compositions to reopen, repeat, compare and delete; and recipes that come in files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from iteris_sd import bases, restoring
from iteris_sd.errors import UserError
from iteris_sd.history import Entry
from iteris_sd.ui import compose as composing
from iteris_sd.ui import form as forms
from iteris_sd.ui import outcome as outcomes
from iteris_sd.ui import results
from iteris_sd.ui.form import SILENT, Update
from iteris_sd.ui.inline import thumbnail
from iteris_sd.ui.visits import Result, Visit, Visits

_SCRIPT, _DROP = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("past.js", "drop.js")
)
# Repeating is reopening, and then the click on Compose that the list's script has asked for.
_REPEAT = """() => {
    const wanted = window.iterisRepeat && !document.querySelector('#past-told .problem, #notice .problem');
    window.iterisRepeat = false;
    if (wanted) document.getElementById('go').click();
}"""
_SIDE = 144  # of a thumbnail in pixels
_SHOWN = 60  # entries; older ones stay on disk until they are evicted


@dataclass(frozen=True)
class Tab:
    """The widgets. `list`: its value are the entries; it tells of an entry and what is wanted with it."""

    list: gr.HTML
    file: gr.File
    told: gr.HTML
    pair: gr.HTML


def drop_anywhere() -> gr.HTML:
    """Nothing to see: tells of files that were dropped anywhere on the page."""
    return gr.HTML(value="", html_template="", js_on_load=_DROP, elem_id="dropped")


def layout() -> Tab:
    """Lay the tab out."""
    forms.title(
        "History",
        "Everything composed here. Tick two to compare them; Repeat fills the form and composes again.",
    )
    file = gr.File(
        label="Restore a recipe: drop a picture that was made here (PNG), or a recipe.json",
        file_types=[".png", ".json"],
        height=150,
        elem_classes="drop",
        elem_id="restore",
    )
    told = forms.markup("", elem_id="past-told")
    entries = gr.HTML(
        value=[],
        html_template='<div class="past"></div>',
        js_on_load=_SCRIPT,
        apply_default_css=False,
        elem_id="past",
    )
    return Tab(entries, file, told, forms.markup("", elem_id="past-pair"))


def wire(
    visits: Visits, compose: composing.Tab, tab: Tab, tabs: gr.Tabs, opened: gr.Tab, dropped: gr.HTML
) -> None:
    """Make it work; `tabs` and `opened`: all tabs, and the one of the history; `dropped`: of `drop_anywhere`."""
    outcome = compose.outcome

    def act(event: gr.EventData, request: gr.Request) -> Update:
        visit, wanted, ids = visits.of(request), str(event.wanted), _ids(event.ids)
        try:
            if wanted == "delete":
                visit.history.delete(ids[0])
                return {tab.list: gr.HTML(value=listed(visit)), tab.told: _said("Deleted."), tab.pair: ""}
            if wanted == "compare":
                return {tab.pair: side_by_side([visit.history.find(id) for id in ids[:2]])}
            made = _reopened(visit, ids[0])
            return {
                **composing.restored(made.recipe, compose, visits, request),
                **outcomes.reopened(made, outcome),
                tabs: gr.Tabs(selected="compose"),
                tab.told: "",
            }
        except UserError as error:
            return {tab.told: results.problem(str(error)), tab.list: gr.HTML(value=listed(visit))}

    def restore(path: str | None, request: gr.Request) -> Update:
        if not path:
            return {tab.told: ""}
        try:
            recipe = restoring.from_file(Path(path))
        except UserError as error:
            return {compose.notice: results.problem(str(error)), tab.file: None}
        return {
            **composing.restored(recipe, compose, visits, request),
            tab.file: None,
            tab.told: _said("Restored: the recipe stands under Compose."),
            tabs: gr.Tabs(selected="compose"),
        }

    def take_dropped(event: gr.EventData, request: gr.Request) -> Update:
        try:
            return restore(_uploaded(str(event.path)), request)
        except UserError as error:
            return {compose.notice: results.problem(str(error))}

    def show(request: gr.Request) -> Update:
        return {tab.list: gr.HTML(value=listed(visits.of(request)))}

    filled = compose.restored
    own = [tab.list, tab.told, tab.pair]
    acted = tab.list.select(
        act, outputs=[*own, *filled, *outcome.all, tabs], api_name="act_on_past", **SILENT
    )
    acted.then(None, js=_REPEAT)
    tab.file.upload(
        restore, tab.file, [tab.file, tab.told, *filled, tabs], api_name="restore_recipe", **SILENT
    )
    dropped.upload(take_dropped, None, [tab.file, tab.told, *filled, tabs], api_name="take_dropped", **SILENT)
    opened.select(show, outputs=[tab.list], api_name="show_past", **SILENT)


def _reopened(visit: Visit, id: str) -> Result:
    """A composition of the history as the result. Raises UserError when there is none, or another is being made."""
    if visit.job is not None and not visit.job.ended:
        raise UserError("A composition is at work; wait for it, or stop it under Compose, then open this.")
    return visit.reopen(visit.history.find(id))


def listed(visit: Visit) -> list[dict[str, Any]]:
    """The entries as the page shows them, newest first."""
    return [_told(entry) for entry in visit.history.entries()[:_SHOWN]]


def _told(entry: Entry) -> dict[str, Any]:
    picture, count = "", results.pictures(len(entry.pictures))
    if entry.thumbnail is not None:
        with suppress(OSError):
            picture = thumbnail(entry.thumbnail, entry.thumbnail.stat().st_mtime_ns, _SIDE)
    return {
        "id": entry.id,
        "title": entry.title.removesuffix(f" · {count}"),
        "told": count + _strength(entry),
        "made": entry.made.isoformat(),
        "phase": entry.phase,
        "picture": picture,
    }


def _strength(entry: Entry) -> str:
    """How strongly the merged LoRAs were applied, where it was not as usual; nothing where nobody knows."""
    with suppress(UserError):
        if (strength := entry.recipe().strength) != 1:
            return f", strength {strength:g}"
    return ""


def side_by_side(entries: Sequence[Entry]) -> str:
    """Two compositions with their grids and scores. Raises UserError when one cannot be read."""
    return f'<div class="side-by-side">{"".join(map(_compared, entries))}</div>'


def _compared(entry: Entry) -> str:
    recipe = entry.recipe()
    facts = (
        f"{bases.find(recipe.base).title}, {recipe.sampler}, {recipe.steps} steps, guidance {recipe.guidance:g}, "
        f"strength {recipe.strength:g}"
    )
    grid = ""
    if entry.grid is not None:
        url, alt = results.address(entry.grid), escape(f"Grid of {entry.title}", quote=True)
        grid = f'<a href="{url}" target="_blank" rel="noopener"><img src="{url}" alt="{alt}"></a>'
    return (
        f"<section><h3>{escape(entry.title)}</h3><p class='note'>{escape(facts)}</p>{grid}"
        f"{results.summary(recipe, entry.scores())}</section>"
    )


def _ids(sent: Any) -> list[str]:
    """The ids that a browser sent, which may be anything; the history checks them."""
    ids = [str(one) for one in sent] if isinstance(sent, list) else []
    if not ids:
        raise UserError("No composition is chosen.")
    return ids


def _uploaded(path: str) -> str:
    """The path of an uploaded file, which a browser told. Raises UserError when it is of no upload."""
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise UserError("What was dropped is no file that was uploaded here; drop it again.")
    return path


def _said(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>'
