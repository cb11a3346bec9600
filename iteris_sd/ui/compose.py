"""The tab where concepts are composed: what is asked on the left, what came of it on the right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from iteris_sd import bases, limits, presets, restoring
from iteris_sd.bases import Base
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe
from iteris_sd.ui import form as forms
from iteris_sd.ui import outcome as outcomes
from iteris_sd.ui import picker as pickers
from iteris_sd.ui import results
from iteris_sd.ui.form import PRIVATE, SILENT, Form, Update
from iteris_sd.ui.jobs import Job
from iteris_sd.ui.outcome import Outcome
from iteris_sd.ui.visits import Visits

_REFRESH = 0.3  # seconds between updates of the page
# The work itself waits its turn, and says so; here only the number of those who may watch theirs is bounded.
WATCHING: dict[str, Any] = {"concurrency_limit": limits.MAX_WAITING, "concurrency_id": "watching"}
_TO_RESULTS = "() => { document.getElementById('results').scrollIntoView(); return []; }"


@dataclass(frozen=True)
class Tab:
    """The widgets of the tab."""

    form: Form
    outcome: Outcome
    add: gr.Button
    notice: gr.HTML

    @property
    def restored(self) -> list[Any]:
        """The widgets that `restored` changes, as outputs."""
        return [self.notice, *forms.filled_widgets(self.form)]


def layout(visits: Visits, base: Base, notice: gr.HTML) -> Tab:
    """Lay the tab out. `notice`: where the page tells what went wrong, whichever tab is open."""
    with gr.Row(elem_id="main"):
        with gr.Column(scale=5, min_width=320, elem_id="form"):
            which, told = forms.base_model(base)
            words = forms.words(visits.library, base)
            add = gr.Button("Add a concept of your own", size="sm", elem_id="add-own")
            go = gr.Button("Compose", variant="primary", size="lg", elem_id="go")
            columns, drawing, advanced = forms.columns(), forms.drawing(base), forms.advanced()
        with gr.Column(scale=6, min_width=320, elem_id="results"):
            outcome = outcomes.layout(go)
    form = Form(which, told, words, columns, drawing, advanced, gr.State({}))
    return Tab(form, outcome, add, notice)


def wire(visits: Visits, tab: Tab) -> None:
    """Make it work."""
    _wire_base(visits, tab.form, tab.notice)
    _wire_words(visits, tab.form, tab.notice)
    _wire_methods(tab.form)
    _wire_drawing(tab.form)
    _wire_work(visits, tab.form, tab.outcome)
    outcomes.wire(visits, tab.outcome)


# ---------------------------------------------------------------- what changes while the form is filled in


def _wire_base(visits: Visits, form: Form, notice: gr.HTML) -> None:
    """Another base model brings its own concepts and its own way of drawing."""
    words, drawing = form.words, form.drawing

    def show_base(name: str, request: gr.Request) -> Update:
        base, library = bases.find(name), visits.of(request).library
        first = [use.plain() for use in forms.first_picked(library, base)]
        return {
            form.base_told: forms.told_of_base(base),
            words.picked: gr.HTML(value=first, choices=pickers.choices(library.of_base(base.family))),
            words.sets: gr.Dataset(samples=forms.set_samples(library, base)),
            drawing.sampler: base.sampler,
            drawing.steps: base.steps,
            drawing.guidance: base.guidance,
            form.carried: {},
            notice: "",
        }

    drawn = [drawing.sampler, drawing.steps, drawing.guidance]
    changed = [form.base_told, words.picked, words.sets, *drawn, form.carried, notice]
    switched = form.base.input(show_base, form.base, changed, api_name="show_base", **SILENT)
    follow(visits, form, switched, "show_base_picked")


def follow(visits: Visits, form: Form, event: Any, name: str) -> None:
    """After an event that changed what is picked, show what follows from that."""
    words = form.words
    shown = [words.examples, words.read]
    event.then(_show_picked(visits, form), [words.picked, words.prompt], shown, api_name=name, **SILENT)


def _show_picked(visits: Visits, form: Form) -> Any:
    """What else the page shows for the picked concepts: examples, and the prompt as it reads."""

    def show_picked(picked: Any, prompt: str, request: gr.Request) -> Update:
        library = visits.of(request).library
        uses = pickers.read(picked, library)
        fitting = presets.prompts_for([use.name for use in uses])
        return {
            form.words.examples: gr.Dataset(samples=[[text] for text in fitting]),
            form.words.read: forms.read_as(prompt, uses, library),
        }

    return show_picked


def _wire_words(visits: Visits, form: Form, notice: gr.HTML) -> None:
    words = form.words

    def show_prompt(picked: Any, prompt: str, request: gr.Request) -> str:
        library = visits.of(request).library
        return forms.read_as(prompt, pickers.read(picked, library), library)

    def take_set(row: list[str], base: str, request: gr.Request) -> Update:
        chosen, library = forms.set_named(row[0]), visits.of(request).library
        if chosen is None:
            return {notice: ""}
        there = {concept.name for concept in library.of_base(bases.find(base).family)}
        if set(chosen.concepts) <= there:
            uses = pickers.of_names(chosen.concepts, library)
            found = [use.plain() for use in uses]
            return {words.picked: found, words.prompt: chosen.prompts[0], notice: "", form.carried: {}}
        lacking = ", ".join(name for name in chosen.concepts if name not in there)
        told = f"This set needs concepts that you do not have for this base model: {lacking}. Add them under Concepts."
        return {notice: results.problem(told)}

    both = [words.picked, words.prompt]
    shown = [words.examples, words.read]
    words.picked.change(_show_picked(visits, form), both, shown, api_name="show_picked", **SILENT)
    words.prompt.change(show_prompt, both, words.read, api_name="show_prompt", **SILENT)
    words.examples.click(lambda row: row[0], words.examples, words.prompt, api_name="take_example", **SILENT)
    taken = words.sets.click(
        take_set, [words.sets, form.base], [*both, notice, form.carried], api_name="take_set", **SILENT
    )
    follow(visits, form, taken, "show_set")


def _wire_methods(form: Form) -> None:
    columns = form.columns

    def show_dials(*ticked: list[str]) -> Update:
        names = forms.ticked(ticked)
        shown: Update = {
            group: gr.Accordion(visible=name in names) for name, group in columns.dial_groups.items()
        }
        return {**shown, columns.told: forms.told_of_methods(names)}

    for k, group in enumerate(columns.groups):
        told = [columns.told, *columns.dial_groups.values()]
        group.change(show_dials, list(columns.groups), told, api_name=f"show_dials_{k}", **SILENT)


def _wire_drawing(form: Form) -> None:
    drawing = form.drawing

    def roll(seeds: str) -> str:
        count = len([piece for piece in (seeds or "").replace(",", " ").split() if piece]) or 1
        rolled = random.sample(range(10_000), min(count, limits.MAX_SEEDS))
        return ", ".join(map(str, rolled))

    drawing.dice.click(roll, drawing.seeds, drawing.seeds, api_name="roll_dice", **SILENT)
    for name, button in drawing.settings.items():
        chosen = presets.settings()[name]
        button.click(
            lambda chosen=chosen: (chosen.sampler, chosen.steps, chosen.guidance, chosen.samples),
            outputs=[drawing.sampler, drawing.steps, drawing.guidance, form.advanced.samples],
            api_name=f"settings_{name}",
            **SILENT,
        )


# ---------------------------------------------------------------- the work


def _wire_work(visits: Visits, form: Form, outcome: Outcome) -> None:
    again = outcome.again

    def work(values: Update, request: gr.Request) -> Iterator[Update]:
        library = visits.of(request).library
        yield from _composed(visits, request, outcome, lambda: forms.recipe(values, form, library))

    def draw_again(strength: float, retention: int, request: gr.Request) -> Iterator[Update]:
        made = visits.of(request).result

        def asked() -> Recipe:
            if made is None:
                raise UserError("There is nothing to draw again yet; press Compose first.")
            changes = {"strength": strength, "retention": min(int(retention), len(made.recipe.seeds))}
            return Recipe.of({**made.recipe.model_dump(), **changes})

        yield from _composed(visits, request, outcome, asked)

    def end(request: gr.Request) -> Update:
        visit = visits.of(request)
        visit.given_up.add("compose")
        job = visit.job
        if job is None:
            return {outcome.progress: results.EMPTY, **outcomes.idle(outcome)}
        job.stop()
        job.wait()
        return outcomes.ended(job, outcome)

    def begin(request: gr.Request) -> Update:
        visits.of(request).given_up.discard("compose")
        return outcomes.started(outcome)

    def failed(request: gr.Request) -> Update:
        if "compose" in visits.of(request).given_up:  # what is cancelled counts as failed
            return end(request)
        return {outcome.progress: results.problem(results.BROKEN), **outcomes.idle(outcome)}

    working = []
    for button, asked, run, name in (
        (outcome.compose, set(form.asked), work, "work"),
        (again.draw, [again.strength, again.retention], draw_again, "draw_again"),
    ):
        started = button.click(
            begin, outputs=outcome.all, js=_TO_RESULTS, queue=False, api_name=f"begin_{name}", **PRIVATE
        )
        working.append(started.then(run, asked, outcome.all, api_name=name, **WATCHING, **PRIVATE))
        working[-1].failure(failed, outputs=outcome.all, api_name=f"failed_{name}", **SILENT)
    outcome.stop.click(end, outputs=outcome.all, cancels=working, queue=False, api_name="stop", **PRIVATE)


def _composed(visits: Visits, request: gr.Request, outcome: Outcome, asked: Any) -> Iterator[Update]:
    """Compose what is `asked` for while the page looks on; going away stops it.

    Where something else has taken its place meanwhile, it shows nothing more.
    """
    visit = visits.of(request)
    try:
        job = visit.begin(asked())
    except UserError as error:
        yield {outcome.progress: results.problem(str(error)), **outcomes.idle(outcome)}
        return
    try:
        for update in _watch(job, outcome):
            if visit.job is not job:
                return
            yield update
    finally:
        job.stop()
    if visit.job is job:
        yield outcomes.ended(job, outcome)


def _watch(job: Job, outcome: Outcome) -> Iterator[Update]:
    """Tell the page how far a job is, a few times a second; the pictures only when there is something new to see."""
    shown: Any = None
    while not job.wait(_REFRESH):
        state = job.state
        now = (len(state.pictures), state.preview, state.phase)
        update = outcomes.seen(job, outcome)
        if now == shown:
            update = {outcome.progress: update[outcome.progress]}
        shown = now
        yield update


# ---------------------------------------------------------------- recipes that come from elsewhere


def restored(recipe: Recipe, tab: Tab, visits: Visits, request: gr.Request) -> Update:
    """The form as a recipe fills it; a word where concepts are lacking."""
    library, told = visits.of(request).library, ""
    if missing := forms.lacking(recipe, library):
        told = results.problem(
            f"This recipe has concepts that are not here: {', '.join(missing)}. Add them under Concepts, or pick "
            "others."
        )
    told += forms.told_of_carried(forms.carried(recipe))
    return {**forms.filled(recipe, tab.form, library), tab.notice: told}


def from_link(query: str, tab: Tab, visits: Visits, request: gr.Request) -> Update:
    """The form as the recipe in a link fills it; a word where it is none."""
    try:
        return restored(restoring.from_query(query), tab, visits, request)
    except UserError as error:
        return {tab.notice: results.problem(str(error))}
