"""The tab that looks inside a merge: figures, how every layer was merged, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from iteris_sd import diagnostics
from iteris_sd.errors import UserError
from iteris_sd.recipe import title
from iteris_sd.ui import form as forms
from iteris_sd.ui import results
from iteris_sd.ui.compose import WATCHING
from iteris_sd.ui.form import PRIVATE, SILENT, Form, Update
from iteris_sd.ui.jobs import State, Study
from iteris_sd.ui.visits import Visits

_REFRESH = 0.3  # seconds between updates of the page
_FIGURES: Mapping[str, str] = {
    "discrepancy": "How far each layer's inputs in the merged model are from those in the concept's own, for three "
    "methods.",
    "residual": "How much of what the concepts' own LoRAs do is missed, block by block.",
    "balance": "How the miss is shared by the concepts: a method is fair where no concept has nearly all of it.",
    "change": "How much each iteration of Algorithm 1 still changes the merged weights.",
}
_SERVED = (
    "Missed: how much of what the concepts' own LoRAs do at their layers the merged one does not do. Inputs differ: "
    "how far the merged model moves what its layers are given. Less is better. Share: how the miss is spread over the "
    "concepts; alike is fair."
)
_CALIBRATED = (
    "Layers by how they were merged: solved from calibration samples; made from the LoRAs alone; averaged, since the "
    "method leaves such layers out; or kept, since one LoRA only touches them. Layers that are fed by the same tensor "
    "are one site."
)
_EMPTY = """
<div class="empty"><p>What happened inside the merge that Compose asks for: which layers the LoRAs share, how well
each method serves every concept, and where the time went. Samples and merges that are already known are not made
again.</p></div>
"""


@dataclass(frozen=True)
class Tab:
    """The widgets."""

    look: gr.Button
    stop: gr.Button
    told: gr.HTML
    figures: Mapping[str, gr.Image]
    tables: gr.HTML

    @property
    def all(self) -> list[Any]:
        """All of them, as outputs."""
        return [self.look, self.stop, self.told, self.tables, *self.figures.values()]


def layout() -> Tab:
    """Lay the tab out."""
    with gr.Column(elem_id="why"):
        *others, last = map(title, diagnostics.COMPARED)
        always = f"{', '.join(others)} and {last} are always compared, as in the paper."
        forms.title(
            "Why a merge came out as it did", f"For the concepts, weights and methods under Compose; {always}"
        )
        with gr.Row(elem_id="why-doing"):
            look = gr.Button("Look inside this merge", variant="primary", min_width=260, scale=0)
            stop = gr.Button("Stop", visible=False, scale=0, min_width=90, elem_id="why-stop")
        told = forms.markup(_EMPTY, elem_id="why-told")
        with gr.Row(elem_id="why-figures"):
            figures = {
                name: gr.Image(
                    label=caption,
                    show_label=False,
                    visible=False,
                    interactive=False,
                    buttons=[],
                    min_width=320,
                    elem_id=f"why-{name}",
                    alt_text=caption,
                )
                for name, caption in _FIGURES.items()
            }
        tables = forms.markup("", elem_id="why-tables")
    return Tab(look, stop, told, figures, tables)


def wire(visits: Visits, form: Form, tab: Tab) -> None:
    """Make it work."""

    def begin(request: gr.Request) -> Update:
        visits.of(request).given_up.discard("why")
        hidden = {image: gr.Image(visible=False) for image in tab.figures.values()}
        busy = {tab.look: gr.Button(interactive=False), tab.stop: gr.Button(visible=True)}
        return {**busy, **hidden, tab.told: results.STARTING, tab.tables: ""}

    def work(values: Update, request: gr.Request) -> Iterator[Update]:
        visit = visits.of(request)
        try:
            study = visit.look_inside(forms.recipe(values, form, visit.library))
        except UserError as error:
            yield {tab.told: results.problem(str(error)), **_idle(tab)}
            return
        try:
            while not study.wait(_REFRESH):
                yield {tab.told: _progress(study.state)}
        finally:
            study.stop()
        yield _ended(study, tab)

    def failed(request: gr.Request) -> Update:
        if "why" in visits.of(request).given_up:  # what is cancelled counts as failed
            return end(request)
        return {tab.told: results.problem(results.BROKEN), **_idle(tab)}

    def end(request: gr.Request) -> Update:
        visit = visits.of(request)
        visit.given_up.add("why")
        study = visit.study
        if study is None:
            return {tab.told: _EMPTY, **_idle(tab)}
        study.stop()
        study.wait()
        return _ended(study, tab)

    started = tab.look.click(begin, outputs=tab.all, queue=False, api_name="begin_why", **PRIVATE)
    working = started.then(work, set(form.asked), tab.all, api_name="why", **WATCHING, **PRIVATE)
    working.failure(failed, outputs=tab.all, api_name="failed_why", **SILENT)
    tab.stop.click(end, outputs=tab.all, cancels=[working], queue=False, api_name="stop_why", **PRIVATE)


def _progress(state: State) -> str:
    if state.phase == "waiting":
        return results.waiting(state)
    return results.bar(state, "", state.done, state.total)


def _idle(tab: Tab) -> Update:
    return {tab.look: gr.Button(interactive=True), tab.stop: gr.Button(visible=False)}


def _ended(study: Study, tab: Tab) -> Update:
    """The figures and tables, or why there are none."""
    state = study.state
    if state.phase == "failed":
        return {tab.told: results.problem(state.message), **_idle(tab)}
    if study.found is None:
        return {tab.told: '<p class="ended" role="status">Stopped.</p>', **_idle(tab)}
    found = study.found.described()
    shown = {
        image: gr.Image(
            str(study.figures[name]) if name in study.figures else None, visible=name in study.figures
        )
        for name, image in tab.figures.items()
    }
    told = f'<p class="ended" role="status">{escape(found["summary"])}</p>'
    return {tab.told: told, tab.tables: tables(found), **shown, **_idle(tab)}


# ---------------------------------------------------------------- tables


def tables(found: Mapping[str, Any]) -> str:
    """What `Explanation.described` says, as tables."""
    concepts = found["concepts"]
    served = [
        [
            title(one["method"]),
            _share(one["residual"]),
            _share(one["discrepancy"]),
            *(_percent(one["shares"].get(name)) for name in concepts),
        ]
        for one in found["served"]
    ]
    touched = [
        [one["concept"], one["block"], one["layers"], ", ".join(map(str, one["ranks"])), f"{one['norm']:.3g}"]
        for one in found["touched"]
    ]
    calibrated = [
        [
            title(one["method"]),
            *(one[how] for how in ("solved", "combined", "averaged", "kept")),
            f"{one['rows']:,}",
            one["sites"],
            "; ".join(f"{why}: {count}" for why, count in one["left_out"].items()) or "–",
        ]
        for one in found["calibrated"]
    ]
    seconds = [[stage, f"{spent:.2f} s"] for stage, spent in found["seconds"].items()]
    heads = ["Method", "Missed", "Inputs differ", *(f"Share of {name}" for name in concepts)]
    return "".join(
        (
            _table("How well each method serves the concepts", heads, served),
            results.said(_SERVED),
            _table(
                "How each method came by its layers",
                [
                    "Method",
                    "From samples",
                    "From LoRAs",
                    "Averaged",
                    "One LoRA's",
                    "Inputs seen",
                    "Sites",
                    "Left out",
                ],
                calibrated,
            ),
            results.said(_CALIBRATED),
            _table("What each LoRA touches", ["Concept", "Block", "Layers", "Rank", "‖ΔW‖"], touched),
            _table("Where the time went", ["Stage", "Time"], seconds),
        )
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}">'
        f'<table class="summary"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
