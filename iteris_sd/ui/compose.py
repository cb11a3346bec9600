"""The tab where concepts are composed: what is asked on the left, what came of it on the right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from iteris_sd import bases, presets
from iteris_sd.bases import Base
from iteris_sd.errors import UserError
from iteris_sd.merging.registry import METHODS
from iteris_sd.ui import form as forms
from iteris_sd.ui import own, results
from iteris_sd.ui.api import ONE_AT_A_TIME
from iteris_sd.ui.form import Form, Update
from iteris_sd.ui.jobs import Job
from iteris_sd.ui.picker import choices
from iteris_sd.ui.visits import Visits

_REFRESH = 0.3  # seconds between updates of the page
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_SILENT: dict[str, Any] = {"queue": False, **_PRIVATE}
_TO_RESULTS = "() => { document.getElementById('results').scrollIntoView(); return []; }"


@dataclass(frozen=True)
class Outcome:
    """The widgets that show what came of it."""

    compose: gr.Button
    stop: gr.Button
    progress: gr.HTML
    grid: gr.HTML
    summary: gr.HTML
    downloads: Mapping[str, gr.DownloadButton]

    @property
    def all(self) -> list[Any]:
        """All of them, as outputs."""
        shown = [self.compose, self.stop, self.progress, self.grid, self.summary]
        return [*shown, *self.downloads.values()]


def tab(visits: Visits, base: Base, page: gr.Blocks) -> None:
    """Lay out the tab and wire it."""
    library = visits.library
    with gr.Row(elem_id="main"):
        with gr.Column(scale=5, min_width=320, elem_id="form"):
            which, told = forms.base_model(base)
            words = forms.words(library, base)
            go = gr.Button("Compose", variant="primary", size="lg", elem_id="go")
            columns, drawing = forms.columns(), forms.drawing(base)
            advanced = forms.advanced(forms.first_picked(library, base))
            form = Form(which, told, words, columns, drawing, advanced)
            mine = own.layout()
        with gr.Column(scale=6, min_width=320, elem_id="results"):
            outcome = _outcome(go)
    _wire_base(visits, form)
    _wire_words(visits, form)
    _wire_methods(form)
    _wire_settings(form)
    own.wire(visits, form, mine, _show_picked(visits, form))
    _wire_work(visits, form, outcome)

    def show_library(request: gr.Request) -> Update:
        visit = visits.of(request)
        return {
            words.picked: gr.HTML(choices=choices(visit.library.of_base(base.family))),
            words.preset: gr.Dropdown(forms.preset_choices(visit.library, base)),
            mine.which: own.shelf(visit),
        }

    # The layout is made once, and concepts come and go.
    page.load(
        show_library, outputs=[words.picked, words.preset, mine.which], api_name="show_library", **_SILENT
    )


def _outcome(go: gr.Button) -> Outcome:
    with gr.Row(elem_id="doing"):
        progress = forms.markup(results.EMPTY, elem_id="progress")
        stop = gr.Button("Stop", visible=False, scale=0, min_width=90, elem_id="stop")
    grid = forms.markup("", elem_id="grid")
    summary = forms.markup("", elem_id="summary")
    labels = {"pictures": "Pictures (zip)", "grid": "Grid (PNG)", "recipe": "Recipe (JSON)"}
    labels |= {f"lora.{method.name}": f"LoRA merged by {method.title}" for method in METHODS.values()}
    with gr.Row(elem_id="downloads"):
        downloads = {
            name: gr.DownloadButton(label, visible=False, size="sm", min_width=150)
            for name, label in labels.items()
        }
    return Outcome(go, stop, progress, grid, summary, downloads)


# ---------------------------------------------------------------- what changes while the form is filled in


def _wire_base(visits: Visits, form: Form) -> None:
    """Another base model brings its own concepts and its own way of drawing."""
    words, drawing = form.words, form.drawing

    def show_base(name: str, request: gr.Request) -> Update:
        base, library = bases.find(name), visits.of(request).library
        first = forms.first_picked(library, base)
        return {
            form.base_told: forms.told_of_base(base),
            words.picked: gr.HTML(value=first, choices=choices(library.of_base(base.family))),
            words.preset: gr.Dropdown(forms.preset_choices(library, base), value=None),
            drawing.sampler: base.sampler,
            drawing.steps: base.steps,
            drawing.guidance: base.guidance,
        }

    changed = [form.base_told, words.picked, words.preset, drawing.sampler, drawing.steps, drawing.guidance]
    switched = form.base.input(show_base, form.base, changed, api_name="show_base", **_SILENT)
    both = [words.picked, words.prompt]
    shown = [words.examples, words.read, *form.advanced.weights]
    switched.then(_show_picked(visits, form), both, shown, api_name="show_base_picked", **_SILENT)


def _show_picked(visits: Visits, form: Form) -> Any:
    """What else the page shows for the picked concepts: examples, the prompt as it reads, weights."""

    def show_picked(picked: list[str], prompt: str, request: gr.Request) -> Update:
        library = visits.of(request).library
        names = forms.names_of(picked, library)
        shown: Update = {
            form.words.examples: gr.Dataset(samples=[[text] for text in presets.prompts_for(names)]),
            form.words.read: forms.read_as(prompt, names, library),
        }
        for k, slider in enumerate(form.advanced.weights):
            there = k < len(names)
            value = library.concepts[names[k]].weight if there else 1.0
            shown[slider] = gr.Slider(value=value, label=forms.weight_label(names, k), visible=there)
        return shown

    return show_picked


def _wire_words(visits: Visits, form: Form) -> None:
    words = form.words
    show_picked = _show_picked(visits, form)

    def show_prompt(picked: list[str], prompt: str, request: gr.Request) -> str:
        library = visits.of(request).library
        return forms.read_as(prompt, forms.names_of(picked, library), library)

    def take_preset(name: str | None, base: str, request: gr.Request) -> Update:
        if name not in presets.presets():
            return {words.picked: gr.skip()}
        chosen = presets.presets()[name]
        there = {concept.name for concept in visits.of(request).library.of_base(bases.find(base).family)}
        if set(chosen.concepts) <= there:
            return {words.picked: list(chosen.concepts), words.prompt: chosen.prompts[0]}
        lacking = ", ".join(name for name in chosen.concepts if name not in there)
        gr.Warning(f"This set needs concepts that you do not have for this base model: {lacking}.")
        return {words.preset: None}

    both = [words.picked, words.prompt]
    shown = [words.examples, words.read, *form.advanced.weights]
    words.picked.change(show_picked, both, shown, api_name="show_picked", **_SILENT)
    words.prompt.change(show_prompt, both, words.read, api_name="show_prompt", **_SILENT)
    words.examples.click(lambda row: row[0], words.examples, words.prompt, api_name="take_example", **_SILENT)
    taken = words.preset.input(
        take_preset, [words.preset, form.base], [*both, words.preset], api_name="take_preset", **_SILENT
    )
    taken.then(show_picked, both, shown, api_name="show_preset", **_SILENT)


def _wire_methods(form: Form) -> None:
    groups = form.advanced.groups

    def show_dials(*ticked: list[str]) -> Update:
        names = forms.ticked(ticked)
        shown: Update = {group: gr.Group(visible=name in names) for name, group in groups.items()}
        return {**shown, form.columns.told: forms.told_of_methods(names)}

    for k, group in enumerate(form.columns.groups):
        told = [form.columns.told, *groups.values()]
        group.change(show_dials, list(form.columns.groups), told, api_name=f"show_dials_{k}", **_SILENT)


def _wire_settings(form: Form) -> None:
    drawing = form.drawing
    for name, button in form.advanced.settings.items():
        chosen = presets.settings()[name]
        button.click(
            lambda chosen=chosen: (chosen.sampler, chosen.steps, chosen.guidance, chosen.samples),
            outputs=[drawing.sampler, drawing.steps, drawing.guidance, form.advanced.samples],
            api_name=f"settings_{name}",
            **_SILENT,
        )


# ---------------------------------------------------------------- the work


def _wire_work(visits: Visits, form: Form, outcome: Outcome) -> None:
    def begin() -> Update:
        hidden = {button: gr.DownloadButton(visible=False) for button in outcome.downloads.values()}
        return {
            outcome.compose: gr.Button(interactive=False),
            outcome.stop: gr.Button(visible=True),
            outcome.progress: results.STARTING,
            outcome.grid: "",
            outcome.summary: "",
            **hidden,
        }

    def work(values: Update, request: gr.Request) -> Iterator[Update]:
        visit = visits.of(request)
        try:
            job = visit.begin(forms.recipe(values, form, visit.library))
        except UserError as error:
            yield {outcome.progress: results.problem(str(error)), **_idle(outcome)}
            return
        try:
            yield from _watch(job, outcome)
        finally:
            job.stop()
        yield _ended(job, outcome)

    def end(request: gr.Request) -> Update:
        job = visits.of(request).job
        if job is None:
            return {outcome.progress: results.EMPTY, **_idle(outcome)}
        job.stop()
        job.wait()
        return _ended(job, outcome)

    started = outcome.compose.click(
        begin, outputs=outcome.all, js=_TO_RESULTS, queue=False, api_name="begin", **_PRIVATE
    )
    working = started.then(work, form.asked, outcome.all, api_name="work", **ONE_AT_A_TIME, **_PRIVATE)
    outcome.stop.click(end, outputs=outcome.all, cancels=[working], queue=False, api_name="stop", **_PRIVATE)


def _watch(job: Job, outcome: Outcome) -> Iterator[Update]:
    """Tell the page how far a job is, a few times a second; the grid only when there is a new picture."""
    shown = -1
    while not job.wait(_REFRESH):
        state = job.state
        update: Update = {outcome.progress: results.progress(job.recipe, state)}
        if len(state.pictures) != shown:
            shown = len(state.pictures)
            update[outcome.grid] = results.grid(job.recipe, state)
        yield update


def _ended(job: Job, outcome: Outcome) -> Update:
    """Everything that a job came to."""
    state, files = job.state, job.state.files or {}
    return {
        outcome.progress: results.progress(job.recipe, state),
        outcome.grid: results.grid(job.recipe, state),
        outcome.summary: results.summary(job.recipe, state.scores),
        **{
            button: gr.DownloadButton(
                value=str(files[name]) if name in files else None, visible=name in files
            )
            for name, button in outcome.downloads.items()
        },
        **_idle(outcome),
    }


def _idle(outcome: Outcome) -> Update:
    return {outcome.compose: gr.Button(interactive=True), outcome.stop: gr.Button(visible=False)}
