"""The tab where concepts are composed: what is asked on the left, what came of it on the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from iteris_sd import limits, presets
from iteris_sd.bases import Base
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.merging.registry import METHODS, Parameter
from iteris_sd.recipe import Recipe, Sampler, fill
from iteris_sd.ui import asking, results
from iteris_sd.ui.api import ONE_AT_A_TIME
from iteris_sd.ui.jobs import Job
from iteris_sd.ui.picker import choices, picker
from iteris_sd.ui.visits import Visit, Visits

FIRST_PICKED = ("dog", "barn")
_REFRESH = 0.3  # seconds between updates of the page
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_TO_RESULTS = "() => { document.getElementById('results').scrollIntoView(); return []; }"

Update = dict[Any, Any]


@dataclass(frozen=True)
class Form:
    """The widgets that say what is asked."""

    picked: gr.HTML
    preset: gr.Dropdown
    prompt: gr.Textbox
    read: gr.HTML
    examples: gr.Dataset
    methods: Sequence[gr.CheckboxGroup]
    told: gr.HTML
    seeds: gr.Textbox
    steps: gr.Slider
    guidance: gr.Slider
    sampler: gr.Dropdown
    negative: gr.Textbox
    samples: gr.Slider
    weights: Sequence[gr.Slider]
    dials: Mapping[tuple[str, str], gr.components.Component]
    groups: Mapping[str, gr.Group]

    @property
    def asked(self) -> set[Any]:
        """All widgets that a recipe is made of."""
        alone = (self.picked, self.prompt, self.seeds, self.steps, self.guidance)
        return {
            *alone,
            *self.methods,
            self.sampler,
            self.negative,
            self.samples,
            *self.weights,
            *self.dials.values(),
        }


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


def tab(visits: Visits, base: Base) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_id="main"):
        with gr.Column(scale=5, min_width=320, elem_id="form"):
            form, go = _form(visits.library, base)
            own = _own_file(base)
        with gr.Column(scale=6, min_width=320, elem_id="results"):
            outcome = _outcome(go)
    _wire_form(visits, base, form, own)
    _wire_work(visits, base, form, outcome)


# ---------------------------------------------------------------- layout


def _title(text: str, info: str) -> None:
    _markup(f"<h2>{text}</h2><p>{info}</p>", elem_classes="title")


def _markup(text: str, **options: Any) -> gr.HTML:
    """Markup of our own, styled by our own style sheet."""
    return gr.HTML(text, apply_default_css=False, **options)


def _form(library: Library, base: Base) -> tuple[Form, gr.Button]:
    concepts = library.of_base(base.name)
    first = [name for name in FIRST_PICKED if name in library.concepts]
    prompts = presets.prompts_for(first)
    known = [p for p in presets.presets().values() if set(p.concepts) <= set(library.concepts)]
    _title("Concepts", f"Pick up to {limits.MAX_CONCEPTS}. The number on a card is its place in the prompt.")
    picked = picker(concepts, first)
    preset = gr.Dropdown([(p.title, p.name) for p in known], value=None, label="Or take a ready-made set")
    prompt = gr.Textbox(
        prompts[0] if prompts else "",
        label="Prompt",
        info="{0}, {1} … stand for the picked concepts, in the order of picking.",
        lines=2,
        max_lines=6,
        max_length=limits.MAX_PROMPT_CHARS,
        elem_id="prompt",
    )
    read = _markup(_read(prompt.value, first, library), elem_id="read")
    examples = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[text] for text in prompts],
        label="Examples",
        samples_per_page=4,
        elem_id="examples",
    )
    go = gr.Button("Compose", variant="primary", size="lg", elem_id="go")
    with gr.Column(elem_id="methods"):
        _title("Methods", "Each is a column of the grid.")
        methods = [
            gr.CheckboxGroup(
                [(asking.METHOD_CHOICES[name][0], name) for name in names],
                value=[name for name in names if name in asking.DEFAULT_METHODS],
                label=title,
            )
            for title, names in asking.METHOD_GROUPS.items()
        ]
        told = _markup(_told(asking.DEFAULT_METHODS), elem_id="told")
    with gr.Row():
        seeds = gr.Textbox(
            "0, 1, 2, 3", label="Seeds", info="Each is a row of the grid.", elem_id="seeds", min_width=150
        )
        sampler = gr.Dropdown(
            list(get_args(Sampler)),
            value="ddim",
            label="Sampler",
            info="How the noise is removed.",
            min_width=150,
        )
    with gr.Row():
        steps = gr.Slider(1, limits.MAX_STEPS, base.steps, step=1, label="Steps", min_width=150)
        guidance = gr.Slider(1, limits.MAX_GUIDANCE, base.guidance, step=0.5, label="Guidance", min_width=150)
    with gr.Accordion("Advanced", open=False):
        settings = {name: gr.Button(f"{s.title} settings", size="sm") for name, s in _settings_row()}
        negative = gr.Textbox(label="Negative prompt", max_length=limits.MAX_PROMPT_CHARS)
        samples = gr.Slider(
            1,
            limits.MAX_SAMPLES,
            50,
            step=1,
            label="Calibration samples per concept",
            info="What the methods that look at layers' inputs see; fewer is faster and rougher.",
        )
        weights = [
            gr.Slider(
                0.1,
                limits.MAX_WEIGHT,
                1.0,
                step=0.1,
                label=_weight_label(first, k),
                visible=k < len(first),
            )
            for k in range(limits.MAX_CONCEPTS)
        ]
        groups, dials = _dials(asking.DEFAULT_METHODS)
    for name, button in settings.items():
        chosen = presets.settings()[name]
        button.click(
            lambda chosen=chosen: (chosen.sampler, chosen.steps, chosen.guidance, chosen.samples),
            outputs=[sampler, steps, guidance, samples],
            api_name=f"settings_{name}",
            queue=False,
            **_PRIVATE,
        )
    form = Form(
        picked,
        preset,
        prompt,
        read,
        examples,
        methods,
        told,
        seeds,
        steps,
        guidance,
        sampler,
        negative,
        samples,
        weights,
        dials,
        groups,
    )
    return form, go


def _settings_row() -> list[tuple[str, presets.Settings]]:
    return list(presets.settings().items())


def _dials(ticked: Sequence[str]) -> tuple[dict[str, gr.Group], dict[tuple[str, str], Any]]:
    """The parameters of each method, as the registry describes them."""
    groups: dict[str, gr.Group] = {}
    dials: dict[tuple[str, str], Any] = {}
    for method in METHODS.values():
        if not method.parameters:
            continue
        with gr.Group(visible=method.name in ticked) as groups[method.name]:
            for dial in method.parameters:
                dials[method.name, dial.name] = _dial(method.title, dial)
    return groups, dials


def _dial(method: str, dial: Parameter) -> Any:
    common: dict[str, Any] = {"label": f"{method}: {dial.name}", "info": dial.help}
    if dial.type == "choice":
        return gr.Dropdown(list(dial.choices), value=dial.default, **common)
    if dial.type == "floats":
        return gr.Textbox("", placeholder="1, 1", **common)
    if dial.default is None:  # a number field that was never filled in may come back as 0
        return gr.Textbox("", placeholder="empty", **common)
    return gr.Number(dial.default, precision=0 if dial.type == "int" else None, **common)


def _outcome(go: gr.Button) -> Outcome:
    with gr.Row(elem_id="doing"):
        progress = _markup(results.EMPTY, elem_id="progress")
        stop = gr.Button("Stop", visible=False, scale=0, min_width=90, elem_id="stop")
    grid = _markup("", elem_id="grid")
    summary = _markup("", elem_id="summary")
    labels = {"pictures": "Pictures (zip)", "grid": "Grid (PNG)", "recipe": "Recipe (JSON)"}
    labels |= {f"lora.{method.name}": f"LoRA merged by {method.title}" for method in METHODS.values()}
    with gr.Row(elem_id="downloads"):
        downloads = {
            name: gr.DownloadButton(label, visible=False, size="sm", min_width=150)
            for name, label in labels.items()
        }
    return Outcome(go, stop, progress, grid, summary, downloads)


# ---------------------------------------------------------------- what changes while the form is filled in


def _wire_form(visits: Visits, base: Base, form: Form, own: OwnFile) -> None:
    def show_picked(picked: list[str], prompt: str, request: gr.Request) -> Update:
        library = visits.of(request).library
        names = _names(picked, library)
        prompts = presets.prompts_for(names)
        shown: Update = {
            form.examples: gr.Dataset(samples=[[text] for text in prompts]),
            form.read: _read(prompt, names, library),
        }
        for k, slider in enumerate(form.weights):
            known = {} if k < len(names) else {"value": 1.0}
            shown[slider] = gr.Slider(label=_weight_label(names, k), visible=k < len(names), **known)
        return shown

    def show_prompt(picked: list[str], prompt: str, request: gr.Request) -> str:
        library = visits.of(request).library
        return _read(prompt, _names(picked, library), library)

    def take_preset(name: str | None) -> Update:
        if name not in presets.presets():
            return {form.picked: gr.skip()}
        chosen = presets.presets()[name]
        return {form.picked: list(chosen.concepts), form.prompt: chosen.prompts[0]}

    def show_dials(*ticked: list[str]) -> Update:
        names = _ticked(ticked)
        shown: Update = {group: gr.Group(visible=name in names) for name, group in form.groups.items()}
        return {**shown, form.told: _told(names)}

    def add_file(path: str | None, trigger: str, noun: str, picked: list[str], request: gr.Request) -> Update:
        if not path:
            return {own.told: results.problem("No file is chosen; choose a .safetensors file first.")}
        visit = visits.of(request)
        try:
            concept = visit.add_file(Path(path), trigger, noun, base.name)
        except UserError as error:
            return {own.told: results.problem(str(error))}
        names = [*_names(picked, visit.library), concept.name]
        known = choices(visit.library.of_base(base.name))
        return {
            form.picked: gr.HTML(value=names[: limits.MAX_CONCEPTS], choices=known),
            own.told: f'<p role="status">Added {escape(concept.name)}.</p>',
        }

    silent: dict[str, Any] = {"queue": False, **_PRIVATE}
    both = [form.picked, form.prompt]
    shown = [form.examples, form.read, *form.weights]
    form.picked.change(show_picked, both, shown, api_name="show_picked", **silent)
    form.prompt.change(show_prompt, both, form.read, api_name="show_prompt", **silent)
    form.examples.click(lambda row: row[0], form.examples, form.prompt, api_name="take_example", **silent)
    taken = form.preset.input(take_preset, form.preset, both, api_name="take_preset", **silent)
    taken.then(show_picked, both, shown, api_name="show_preset", **silent)
    added = own.add.click(
        add_file,
        [own.file, own.trigger, own.noun, form.picked],
        [form.picked, own.told],
        api_name="add_file",
        api_visibility="private",
        show_progress_on=own.told,
    )
    added.then(show_picked, both, shown, api_name="show_added", **silent)
    for k, group in enumerate(form.methods):
        told = [form.told, *form.groups.values()]
        group.change(show_dials, list(form.methods), told, api_name=f"show_dials_{k}", **silent)


def _ticked(groups: Iterable[Any]) -> list[str]:
    """The ticked methods, in the order of the columns."""
    names = {name for group in groups for name in group or []}
    return [name for name in asking.METHOD_CHOICES if name in names]


def _told(names: Sequence[str]) -> str:
    """What the ticked methods do, a sentence each."""
    lines = [
        f"<dt>{title}</dt><dd>{told}</dd>" for title, told in map(asking.METHOD_CHOICES.__getitem__, names)
    ]
    return f"<dl>{''.join(lines)}</dl>"


def _names(picked: Any, library: Library) -> list[str]:
    """The picked names that there are; what comes from a browser may be anything."""
    return [name for name in picked or [] if isinstance(name, str) and name in library.concepts]


def _weight_label(names: Sequence[str], k: int) -> str:
    return f"Weight of {names[k]}" if k < len(names) else "Weight"


def _read(prompt: str, names: Sequence[str], library: Library) -> str:
    """The prompt as the model reads it, and a word when a concept is left out of it."""
    triggers = [library.concepts[name].trigger for name in names]
    try:
        words = fill(prompt or "", triggers)
    except IndexError:
        return f"<p>The prompt has more places than concepts are picked ({len(names)}).</p>"
    left_out = [name for name, t in zip(names, triggers, strict=True) if t.lower() not in words.lower()]
    note = f" <b>Not in the prompt: {escape(', '.join(left_out))}.</b>" if left_out and words.strip() else ""
    return f"<p>Reads: {escape(words)}{note}</p>" if words.strip() else "<p></p>"


@dataclass(frozen=True)
class OwnFile:
    """The widgets that add a LoRA file."""

    file: gr.File
    trigger: gr.Textbox
    noun: gr.Textbox
    add: gr.Button
    told: gr.HTML


def _own_file(base: Base) -> OwnFile:
    with gr.Accordion("Add your own LoRA file", open=False, elem_id="own"):
        file = gr.File(
            label=f"A LoRA for {base.title} (.safetensors)", file_types=[".safetensors"], height=110
        )
        with gr.Row():
            trigger = gr.Textbox(
                label="Trigger", info="The words it was trained with.", min_width=130, placeholder="<rex> dog"
            )
            noun = gr.Textbox(
                label="Class noun", info="What kind of thing it is.", min_width=130, placeholder="dog"
            )
        add = gr.Button("Add concept")
        told = _markup("", elem_id="own-told")
    return OwnFile(file, trigger, noun, add, told)


# ---------------------------------------------------------------- the work


def _wire_work(visits: Visits, base: Base, form: Form, outcome: Outcome) -> None:
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
            recipe = _recipe(values, form, base, visit)
            job = visit.begin(recipe)
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


def _recipe(values: Update, form: Form, base: Base, visit: Visit) -> Recipe:
    names = values[form.picked] or []
    parameters: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    for (method, name), widget in form.dials.items():
        dial = next(p for p in METHODS[method].parameters if p.name == name)
        given = asking.parameter(dial, values[widget])
        if given != dial.default:
            parameters[method][name] = given
    return asking.recipe(
        base=base.name,
        concepts=[visit.library.find(str(name)).name for name in names],
        prompt=values[form.prompt] or "",
        negative=values[form.negative] or "",
        methods=_ticked(values[group] for group in form.methods),
        seeds=asking.seeds(values[form.seeds]),
        steps=values[form.steps],
        guidance=values[form.guidance],
        sampler=values[form.sampler],
        samples=values[form.samples],
        weights=[values[slider] for slider in form.weights[: len(names)]],
        parameters=parameters,
    )


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
