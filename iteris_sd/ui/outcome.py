"""The side of the page that shows what came of it: pictures, scores, comparisons, and what can be taken away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from iteris_sd import export, limits, restoring
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe, title
from iteris_sd.ui import form as forms
from iteris_sd.ui import results
from iteris_sd.ui.form import Update
from iteris_sd.ui.jobs import Job
from iteris_sd.ui.visits import Result, Visits

_FILES = {
    "pictures": "Pictures (zip)",
    "grid": "Grid (PNG)",
    "recipe": "Recipe (JSON)",
    "table": "Scores (CSV)",
    "scores": "Scores (JSON)",
}
_LAYOUTS = {
    "diffusers": "diffusers, ComfyUI",
    "kohya": "kohya: A1111, Forge, ComfyUI",
    "peft": "PEFT folder",
}


@dataclass(frozen=True)
class Compared:
    """Two pictures of one seed under a slider."""

    box: gr.Accordion
    left: gr.Dropdown
    right: gr.Dropdown
    seed: gr.Dropdown
    slider: gr.ImageSlider


@dataclass(frozen=True)
class Again:
    """The same merges drawn in another way."""

    box: gr.Accordion
    strength: gr.Slider
    retention: gr.Slider
    draw: gr.Button


@dataclass(frozen=True)
class Taken:
    """What can be downloaded."""

    box: gr.Accordion
    files: Mapping[str, gr.DownloadButton]
    method: gr.Dropdown
    layout: gr.Dropdown
    lora: gr.DownloadButton
    told: gr.HTML


@dataclass(frozen=True)
class Outcome:
    """The widgets that show what came of it."""

    compose: gr.Button
    stop: gr.Button
    progress: gr.HTML
    grid: gr.HTML
    summary: gr.HTML
    retained: gr.HTML
    link: gr.HTML
    compared: Compared
    again: Again
    taken: Taken

    @property
    def all(self) -> list[Any]:
        """All of them, as outputs."""
        shown = [self.compose, self.stop, self.progress, self.grid, self.summary, self.retained, self.link]
        compared, again, taken = self.compared, self.again, self.taken
        return [
            *shown,
            *(compared.box, compared.left, compared.right, compared.seed, compared.slider),
            *(again.box, again.strength, again.retention),
            *(taken.box, *taken.files.values(), taken.method, taken.layout, taken.lora, taken.told),
        ]


def layout(compose: gr.Button) -> Outcome:
    """Lay the widgets out."""
    with gr.Row(elem_id="doing"):
        progress = forms.markup(results.EMPTY, elem_id="progress")
        stop = gr.Button("Stop", visible=False, scale=0, min_width=90, elem_id="stop")
    grid = results.grid("grid")
    summary = forms.markup("", elem_id="summary")
    link = forms.markup("", elem_id="link")
    compared = _compared()
    again = _again()
    retained = results.grid("retained")
    return Outcome(compose, stop, progress, grid, summary, retained, link, compared, again, _taken())


def _compared() -> Compared:
    with gr.Accordion("Compare two pictures", open=False, visible=False, elem_id="compared") as box:
        with gr.Row():
            left = gr.Dropdown([], label="Left", min_width=120)
            right = gr.Dropdown([], label="Right", min_width=120)
            seed = gr.Dropdown([], label="Seed", min_width=80)
        slider = gr.ImageSlider(
            label="Two pictures of one seed", interactive=False, buttons=["fullscreen"], max_height=640
        )
    return Compared(box, left, right, seed, slider)


def _again() -> Again:
    with gr.Accordion(
        "Strength, and retention: what is kept of each concept", open=False, visible=False
    ) as box:
        strength = gr.Slider(
            0,
            limits.MAX_STRENGTH,
            1.0,
            step=0.05,
            label="Strength of the merged LoRA",
            info="How strongly it is applied while drawing. It needs no new merge.",
        )
        retention = gr.Slider(
            0,
            limits.MAX_SEEDS,
            0,
            step=1,
            label="Retention: seeds of each concept alone",
            info="Each concept by its own LoRA and by every merged one: what the merge kept of it.",
        )
        draw = gr.Button("Draw again", elem_id="again")
    return Again(box, strength, retention, draw)


def _taken() -> Taken:
    with gr.Accordion("Take away", open=True, visible=False, elem_id="taken") as box:
        with gr.Row(elem_id="downloads"):
            files = {
                name: gr.DownloadButton(label, visible=False, size="sm", min_width=130)
                for name, label in _FILES.items()
            }
        with gr.Row(elem_id="lora", elem_classes="stacked"):
            method = gr.Dropdown([], label="LoRA merged by", min_width=120)
            layout = gr.Dropdown(
                [(_LAYOUTS[name], name) for name in export.LAYOUTS],
                value=export.LAYOUTS[0],
                label="File layout",
                min_width=120,
            )
            lora = gr.DownloadButton("Merged LoRA (zip)", size="sm", min_width=150, elem_id="lora-file")
        told = forms.markup("", elem_id="taken-told")
    return Taken(box, files, method, layout, lora, told)


# ---------------------------------------------------------------- what is shown


def started(outcome: Outcome) -> Update:
    """A new composition is asked for."""
    taken = outcome.taken
    return {
        outcome.compose: gr.Button(interactive=False),
        outcome.stop: gr.Button(visible=True),
        outcome.progress: results.STARTING,
        outcome.grid: gr.HTML(value=None),
        outcome.retained: gr.HTML(value=None),
        outcome.summary: "",
        outcome.link: "",
        outcome.compared.box: gr.Accordion(visible=False),
        outcome.again.box: gr.Accordion(visible=False),
        taken.box: gr.Accordion(visible=False),
        taken.told: "",
    }


def idle(outcome: Outcome) -> Update:
    """Nothing is at work."""
    return {outcome.compose: gr.Button(interactive=True), outcome.stop: gr.Button(visible=False)}


def seen(job: Job, outcome: Outcome) -> Update:
    """How far a job is, and the pictures by now."""
    recipe, state = job.recipe, job.state
    update: Update = {outcome.progress: results.progress(recipe, state)}
    if state.phase in ("running", "done", "stopped") and (state.pictures or state.phase == "running"):
        update[outcome.grid] = gr.HTML(value=results.composition(recipe, state.pictures, state.preview))
        update[outcome.retained] = gr.HTML(value=results.retention(recipe, state.pictures, state.preview))
    return update


def ended(job: Job, outcome: Outcome) -> Update:
    """Everything that a job came to."""
    state, files = job.state, job.state.files or {}
    update = {**seen(job, outcome), **idle(outcome)}
    if not state.pictures:
        return {**update, outcome.grid: gr.HTML(value=None), outcome.retained: gr.HTML(value=None)}
    made = Result(job.recipe, state.pictures, state.scores, job.bag)
    buttons = {
        button: gr.DownloadButton(value=str(files[name]) if name in files else None, visible=name in files)
        for name, button in outcome.taken.files.items()
    }
    shown = {**update, **_made(made, outcome), **buttons}
    if state.message and state.phase != "failed":
        shown[outcome.taken.told] = results.problem(state.message)
    return shown


def reopened(made: Result, outcome: Outcome) -> Update:
    """A composition of the history."""
    buttons = {button: gr.DownloadButton(visible=False) for button in outcome.taken.files.values()}
    note = '<p class="note">Press Compose to have its files and merged LoRAs again.</p>'
    return {
        **started(outcome),
        **idle(outcome),
        outcome.progress: f'<p class="ended" role="status">From the history: {results.pictures(len(made.drawn))}.</p>',
        outcome.grid: gr.HTML(value=results.composition(made.recipe, made.drawn)),
        outcome.retained: gr.HTML(value=results.retention(made.recipe, made.drawn)),
        **_made(made, outcome),
        **buttons,
        outcome.taken.told: note,
    }


def _made(made: Result, outcome: Outcome) -> Update:
    """Scores, the pair under the slider, and what can be taken away."""
    recipe, compared, taken = made.recipe, outcome.compared, outcome.taken
    columns = [
        (title(name), name)
        for name in recipe.columns
        if any(one.method == name and not one.scene for one in made.drawn)
    ]
    seeds = [str(seed) for seed in recipe.seeds if any(one.seed == seed for one in made.drawn)]
    names = [name for _, name in columns]
    left, right = (names[-2], names[-1]) if len(names) > 1 else (None, None)
    merged = [(title(name), name) for name in (made.bag.merged if made.bag else ())]
    last = merged[-1][1] if merged else None
    return {
        outcome.summary: results.summary(recipe, made.scores),
        outcome.link: link(recipe),
        compared.box: gr.Accordion(visible=len(columns) > 1),
        compared.left: gr.Dropdown(columns, value=left),
        compared.right: gr.Dropdown(columns, value=right),
        compared.seed: gr.Dropdown(seeds, value=seeds[0] if seeds else None),
        compared.slider: pair(made, left, right, seeds[0] if seeds else None),
        outcome.again.box: gr.Accordion(visible=bool(recipe.merging)),
        outcome.again.strength: recipe.strength,
        outcome.again.retention: gr.Slider(value=recipe.retention, maximum=len(recipe.seeds)),
        taken.box: gr.Accordion(visible=True),
        taken.method: gr.Dropdown(merged, value=last, visible=bool(merged)),
        taken.layout: gr.Dropdown(value=export.LAYOUTS[0], visible=bool(merged)),
        **_packed(made, last, outcome),
    }


def _packed(made: Result, method: str | None, outcome: Outcome) -> Update:
    """The button of a merged LoRA, or why there is none."""
    taken = outcome.taken
    try:
        return {taken.lora: lora(made, method, export.LAYOUTS[0])}
    except UserError as error:
        return {taken.lora: gr.DownloadButton(visible=False), taken.told: results.problem(str(error))}


def link(recipe: Recipe) -> str:
    """A link that opens the page with this recipe filled in; nothing where it would be too long."""
    try:
        query = escape(f"?recipe={restoring.to_query(recipe)}", quote=True)
    except UserError:
        return ""
    return (
        f'<p class="note"><a class="recipe-link" href="{query}">Link to this recipe</a> '
        '<button type="button" class="copy" data-copy="recipe-link">Copy it</button></p>'
    )


def pair(made: Result, left: str | None, right: str | None, seed: str | None) -> tuple[str, str] | None:
    """The files of two pictures of one seed, when both were drawn."""
    if left is None or right is None or seed is None or not str(seed).isdecimal():
        return None
    found = [made.picture(name, int(seed)) for name in (left, right)]
    there = [str(path) for path in found if path is not None and path.is_file()]
    return (there[0], there[1]) if len(there) == 2 else None


def lora(made: Result, method: str | None, layout: str) -> gr.DownloadButton:
    """The button that downloads a merged LoRA in a layout, packed when it is chosen. Raises UserError."""
    if made.bag is None or method is None:
        return gr.DownloadButton(value=None, visible=False)
    return gr.DownloadButton(value=str(made.bag.lora(method, layout)), visible=True)


def wire(visits: Visits, outcome: Outcome) -> None:
    """What follows from choosing a pair, or a LoRA to take away."""
    compared, taken = outcome.compared, outcome.taken

    def show_pair(
        left: str | None, right: str | None, seed: str | None, request: gr.Request
    ) -> tuple[str, str] | None:
        made = visits.of(request).result
        return None if made is None else pair(made, left, right, seed)

    def pack_lora(method: str | None, layout: str, request: gr.Request) -> Update:
        made = visits.of(request).result
        if made is None:
            return {taken.lora: gr.DownloadButton(visible=False)}
        try:
            return {taken.lora: lora(made, method, layout), taken.told: ""}
        except UserError as error:
            return {taken.lora: gr.DownloadButton(visible=False), taken.told: results.problem(str(error))}

    chosen = [compared.left, compared.right, compared.seed]
    for k, widget in enumerate(chosen):
        widget.input(show_pair, chosen, compared.slider, api_name=f"show_pair_{k}", **forms.SILENT)
    for name, widget in (("method", taken.method), ("layout", taken.layout)):
        widget.input(
            pack_lora,
            [taken.method, taken.layout],
            [taken.lora, taken.told],
            api_name=f"pack_lora_{name}",
            **forms.SILENT,
        )
