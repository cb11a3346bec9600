"""The widgets that say what is asked, the recipe that is made of what stands in them, and how a recipe fills them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, get_args

import gradio as gr

from iteris_sd import bases, limits, presets, weights
from iteris_sd.bases import Base
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.merging.registry import METHODS, Parameter
from iteris_sd.prompting import escaped
from iteris_sd.recipe import Recipe, Sampler, fill
from iteris_sd.ui import asking, jobs
from iteris_sd.ui import picker as pickers
from iteris_sd.ui.picker import Use

PRIVATE: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
}  # of an event of the page's own
SILENT: dict[str, Any] = {"queue": False, **PRIVATE}  # of one that is over in a moment
FIRST_PICKED = ("dog", "barn")
Update = dict[Any, Any]
SAMPLERS: Mapping[str, str] = {
    "ddim": "DDIM",
    "dpm++": "DPM-Solver++",
    "ddpm": "DDPM",
    "euler a": "Euler a",
    "unipc": "UniPC",
    "lcm": "LCM (needs an LCM-LoRA)",
}
_CARRIED = {"strength", "retention", "scorer"}
_CALIBRATION = {"steps", "seed", "tokens_per_sample"}
_LORA_SYNTAX = re.compile(
    r"<lora:[^<>]{0,200}>", re.IGNORECASE
)  # bounded, lest each "<lora:" be searched to the end


@dataclass(frozen=True)
class Words:
    """What the picture is of."""

    picked: gr.HTML
    sets: gr.Dataset
    prompt: gr.Textbox
    read: gr.HTML
    examples: gr.Dataset


@dataclass(frozen=True)
class Columns:
    """Which methods. `dials`: (method, parameter) -> widget, in a group for each method."""

    groups: Sequence[gr.CheckboxGroup]
    told: gr.HTML
    dials: Mapping[tuple[str, str], gr.components.Component]
    dial_groups: Mapping[str, gr.Accordion]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn. `settings`: buttons that set several of these at once."""

    settings: Mapping[str, gr.Button]
    seeds: gr.Textbox
    dice: gr.Button
    sampler: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider


@dataclass(frozen=True)
class Advanced:
    """What most people leave alone."""

    negative: gr.Textbox
    size: gr.Textbox
    clip_skip: gr.Slider
    samples: gr.Slider
    unconditional: gr.Slider


@dataclass(frozen=True)
class Form:
    """All of them."""

    base: gr.Dropdown
    base_told: gr.HTML
    words: Words
    columns: Columns
    drawing: Drawing
    advanced: Advanced
    carried: gr.State

    @property
    def asked(self) -> list[Any]:
        """All widgets that a recipe is made of."""
        words, drawing, advanced = self.words, self.drawing, self.advanced
        return [
            self.base,
            words.picked,
            words.prompt,
            *self.columns.groups,
            *(drawing.seeds, drawing.sampler, drawing.steps, drawing.guidance),
            *(advanced.negative, advanced.size, advanced.clip_skip, advanced.samples, advanced.unconditional),
            *self.columns.dials.values(),
            self.carried,
        ]


def title(text: str, info: str) -> None:
    """A heading and a sentence under it."""
    markup(f"<h2>{text}</h2><p>{info}</p>", elem_classes="title")


def markup(text: str, **options: Any) -> gr.HTML:
    """Markup of our own, styled by our own style sheet."""
    return gr.HTML(text, apply_default_css=False, **options)


# ---------------------------------------------------------------- layout


def base_model(base: Base) -> tuple[gr.Dropdown, gr.HTML]:
    """Which base model, and a word on it."""
    choices = [(one.title, one.name) for one in bases.everyone()]
    chosen = gr.Dropdown(choices, value=base.name, label="Base model", elem_id="base")
    return chosen, markup(told_of_base(base), elem_id="base-told")


def told_of_base(base: Base) -> str:
    """What a base model is, where it runs, whether it must be downloaded, and whether its pictures are checked."""
    device = jobs.device()
    told = [base.description, f"Runs on {escape(device)}." if device else "Loading what draws and merges …"]
    if base.download and weights.located(base) is None:
        told.append(
            f"<b>Not on this machine yet: Compose downloads it once, about {escape(base.download)}.</b>"
        )
    if base.family != "storybook":
        if device and "processor" in device:
            told.append("Without a GPU a picture takes minutes.")
        told.append(f"Safety checker: {weights.safety(base)}.")
    return f"<p>{' '.join(told)}</p>"


def words(library: Library, base: Base) -> Words:
    """Concepts, prompt and examples."""
    first = first_picked(library, base)
    prompts = presets.prompts_for([use.name for use in first])
    title("Concepts", f"Pick up to {limits.MAX_CONCEPTS}. The number on a card is its place in the prompt.")
    picked = pickers.picker(library.of_base(base.family), first)
    sets = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=set_samples(library, base),
        label="Or take a ready-made set",
        samples_per_page=6,
        elem_id="sets",
        elem_classes="chips-list",
    )
    prompt = gr.Textbox(
        prompts[0] if prompts else "",
        label="Prompt",
        info="{0}, {1} … stand for the picked concepts, in the order of picking; (word:1.2) weighs a word.",
        lines=2,
        max_lines=6,
        max_length=limits.MAX_PROMPT_CHARS,
        elem_id="prompt",
    )
    read = markup(read_as(prompt.value, first, library), elem_id="read")
    examples = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[text] for text in prompts],
        label="Examples",
        samples_per_page=4,
        elem_id="examples",
        elem_classes="chips-list",
    )
    return Words(picked, sets, prompt, read, examples)


def first_picked(library: Library, base: Base) -> list[Use]:
    """What is picked to begin with, as far as there is something to pick."""
    there = {concept.name for concept in library.of_base(base.family)}
    return pickers.of_names([name for name in FIRST_PICKED if name in there], library)


def set_samples(library: Library, base: Base) -> list[list[str]]:
    """The presets of particular concepts, those first that this library has all concepts of for this base model."""
    there = {concept.name for concept in library.of_base(base.family)}
    whole, lacking = [], []
    for preset in presets.presets().values():
        missing = [name for name in preset.concepts if name not in there]
        if preset.general:
            continue
        if missing:
            lacking.append([f"{preset.title} (lacks {', '.join(missing)})"])
        else:
            whole.append([preset.title])
    return [*whole, *lacking]


def set_named(sample: str) -> presets.Preset | None:
    """The preset that one of `set_samples` stands for."""
    called = sample.partition(" (lacks ")[0]
    return next((preset for preset in presets.presets().values() if preset.title == called), None)


def columns() -> Columns:
    """The methods, in groups, a sentence for each that is ticked, and its parameters."""
    with gr.Column(elem_id="methods"):
        title("Methods", f"Each is a column of the grid; up to {limits.MAX_METHODS}.")
        groups = [
            gr.CheckboxGroup(
                [(asking.METHOD_CHOICES[name][0], name) for name in names],
                value=[name for name in names if name in asking.DEFAULT_METHODS],
                label=group,
                elem_classes="ticks",
            )
            for group, names in asking.METHOD_GROUPS.items()
        ]
        told = markup(told_of_methods(asking.DEFAULT_METHODS), elem_id="told")
        dial_groups, dials = _dials(asking.DEFAULT_METHODS)
    return Columns(groups, told, dials, dial_groups)


def drawing(base: Base) -> Drawing:
    """Seeds, sampler, steps, guidance."""
    with gr.Row(elem_id="settings"):
        settings = {
            name: gr.Button(f"{chosen.title} settings", size="sm", min_width=110)
            for name, chosen in presets.settings().items()
        }
    words = " ".join(
        f"{escape(chosen.title)}: {escape(chosen.description)}" for chosen in presets.settings().values()
    )
    markup(f"<p>{words}</p>", elem_id="settings-told")
    with gr.Row(elem_id="seeds-row"):
        seeds = gr.Textbox(
            "0, 1, 2, 3",
            label="Seeds",
            info=f"Each is a row of the grid; up to {limits.MAX_SEEDS}.",
            elem_id="seeds",
            min_width=150,
            scale=3,
        )
        dice = gr.Button("Roll dice", size="sm", min_width=90, scale=1, elem_id="dice")
        sampler = gr.Dropdown(
            [(SAMPLERS[name], name) for name in get_args(Sampler)],
            value=base.sampler,
            label="Sampler",
            info="How the noise is removed.",
            min_width=150,
            scale=3,
        )
    with gr.Row(elem_classes="stacked"):
        steps = gr.Slider(1, limits.MAX_STEPS, base.steps, step=1, label="Steps", min_width=150)
        guidance = gr.Slider(1, limits.MAX_GUIDANCE, base.guidance, step=0.5, label="Guidance", min_width=150)
    return Drawing(settings, seeds, dice, sampler, steps, guidance)


def advanced() -> Advanced:
    """The rest, folded away."""
    with gr.Accordion("Advanced", open=False):
        negative = gr.Textbox(label="Negative prompt", max_length=limits.MAX_PROMPT_CHARS)
        with gr.Row(elem_classes="stacked"):
            size = gr.Textbox(
                "",
                label="Size",
                placeholder="the model's own",
                info="Side in pixels, a multiple of 64.",
                min_width=150,
            )
            clip_skip = gr.Slider(
                1,
                limits.MAX_CLIP_SKIP,
                1,
                step=1,
                label="Clip skip",
                info="1: the text encoder's last layer; 2: the one before.",
                min_width=150,
            )
        samples = gr.Slider(
            1,
            limits.MAX_SAMPLES,
            50,
            step=1,
            label="Calibration samples per concept",
            info="What the methods that look at layers' inputs see; fewer is faster and rougher.",
        )
        unconditional = gr.Slider(
            0,
            limits.MAX_SAMPLES,
            0,
            step=1,
            label="Samples without a prompt",
            info="As many more with empty words, which guidance also runs the merged adapter on.",
        )
    return Advanced(negative, size, clip_skip, samples, unconditional)


def _dials(ticked: Sequence[str]) -> tuple[dict[str, gr.Accordion], dict[tuple[str, str], Any]]:
    """The parameters of each method, as the registry describes them."""
    groups: dict[str, gr.Accordion] = {}
    dials: dict[tuple[str, str], Any] = {}
    for method in METHODS.values():
        if not method.parameters:
            continue
        with gr.Accordion(f"{method.title}: parameters", open=False, visible=method.name in ticked) as groups[
            method.name
        ]:
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


# ---------------------------------------------------------------- what stands in them


def ticked(groups: Iterable[Any]) -> list[str]:
    """The ticked methods, in the order of the columns."""
    names = {name for group in groups for name in group or []}
    return [name for name in asking.METHOD_CHOICES if name in names]


def told_of_methods(names: Sequence[str]) -> str:
    """What the ticked methods do, a sentence each."""
    lines = [
        f"<dt>{name}</dt><dd>{told}</dd>" for name, told in map(asking.METHOD_CHOICES.__getitem__, names)
    ]
    return f"<dl>{''.join(lines)}</dl>"


def read_as(prompt: str, uses: Sequence[Use], library: Library) -> str:
    """The prompt as the model reads it, and a word on what will not come out as meant."""
    concepts = [library.concepts[use.name] for use in uses]
    said = [c.trigger if use.on else c.class_noun for c, use in zip(concepts, uses, strict=True)]
    try:
        text = fill((prompt or "")[: limits.MAX_PROMPT_CHARS], said)  # a browser's bound is not the server's
    except IndexError:
        return f"<p>The prompt has more places than concepts are picked ({len(uses)}).</p>"
    notes = []
    triggers = [c.trigger.lower() for c, use in zip(concepts, uses, strict=True) if use.on]
    left_out = [c.title for c, use in zip(concepts, uses, strict=True) if use.on]
    left_out = [name for name, t in zip(left_out, triggers, strict=True) if t not in text.lower()]
    if left_out and text.strip():
        notes.append(f"Not in the prompt: {', '.join(left_out)}.")
    if twice := sorted({trigger for trigger in triggers if triggers.count(trigger) > 1}):
        notes.append(f"Several concepts have the trigger {', '.join(twice)}: change one under Concepts.")
    if found := _LORA_SYNTAX.findall(text):
        notes.append(f"{found[0]} is read as words here: pick the LoRA as a concept instead.")
    told = "".join(f' <b class="warning">{escape(note)}</b>' for note in notes)
    return f"<p>Reads: {escape(text)}{told}</p>" if text.strip() else f"<p>{told}</p>"


def recipe(values: Update, form: Form, library: Library) -> Recipe:
    """The recipe that the widgets ask for. Raises UserError on the first thing that is wrong."""
    drawing, advanced = form.drawing, form.advanced
    uses = pickers.read(values[form.words.picked], library)
    prompt, used = _without_those_off(values[form.words.prompt] or "", uses, library)
    methods = ticked(values[group] for group in form.columns.groups)
    parameters: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for (method, name), widget in form.columns.dials.items():
        if method not in methods:
            continue  # nobody sees what stands in it
        dial = METHODS[method].parameter(name)
        given = asking.parameter(dial, values[widget])
        if given != dial.default:
            parameters[method][name] = given
    made = asking.recipe(
        base=str(values[form.base]),
        concepts=[pickers.asked(use) for use in used],
        prompt=prompt,
        negative=values[advanced.negative] or "",
        methods=methods,
        seeds=asking.seeds(values[drawing.seeds]),
        steps=values[drawing.steps],
        guidance=values[drawing.guidance],
        sampler=values[drawing.sampler],
        size=asking.size(values[advanced.size]),
        clip_skip=values[advanced.clip_skip],
        samples=values[advanced.samples],
        unconditional=values[advanced.unconditional],
        parameters=parameters,
    )
    return with_carried(made, values[form.carried])


def carried(recipe: Recipe) -> dict[str, Any]:
    """What a restored recipe has that no widget of the form shows, as far as it is not as usual."""
    found = recipe.model_dump(include=_CARRIED, exclude_defaults=True, mode="json")
    seen = recipe.calibration.model_dump(include=_CALIBRATION, exclude_defaults=True, mode="json")
    return found | ({"calibration": seen} if seen else {})


def with_carried(recipe: Recipe, more: Mapping[str, Any] | None) -> Recipe:
    """The recipe with what was carried over from a restored one."""
    if not more:
        return recipe
    data = recipe.model_dump()
    calibration = {**data["calibration"], **more.get("calibration", {})}
    retention = min(more.get("retention", 0), len(recipe.seeds))
    return Recipe.of({**data, **more, "calibration": calibration, "retention": retention})


def told_of_carried(more: Mapping[str, Any]) -> str:
    """A word on what is carried over, so that nobody wonders."""
    if not more:
        return ""
    plain = {**more.get("calibration", {}), **{k: v for k, v in more.items() if k != "calibration"}}
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plain.items())
    return (
        f'<p class="note" role="status">This recipe also sets {escape(words)}, which stays until another base model, '
        "set or recipe is chosen.</p>"
    )


def _without_those_off(prompt: str, uses: Sequence[Use], library: Library) -> tuple[str, list[Use]]:
    """The prompt with class nouns for concepts that are switched off, and the others, numbered anew."""
    on = [use for use in uses if use.on]
    if uses and not on:
        raise UserError("All picked concepts are switched off; switch one on.")
    if len(on) == len(uses) or len(prompt) > limits.MAX_PROMPT_CHARS:  # of too long a one the recipe tells
        return prompt, on
    words = [
        f"{{{on.index(use)}}}" if use.on else escaped(library.concepts[use.name].class_noun) for use in uses
    ]
    try:
        return fill(prompt, words), on
    except IndexError as error:
        raise UserError(f"The prompt has more places than concepts are picked ({len(uses)}).") from error


def filled(recipe: Recipe, form: Form, library: Library) -> Update:
    """All widgets as a recipe would have them; concepts that the library lacks are left out."""
    base, drawing, advanced, words = bases.find(recipe.base), form.drawing, form.advanced, form.words
    uses = pickers.of_recipe(recipe.concepts, library)
    names, methods = [use.name for use in uses], [use.name for use in recipe.methods]
    given = {use.name: use.parameters for use in recipe.methods}
    group_of = zip(form.columns.groups, asking.METHOD_GROUPS.values(), strict=True)
    return {
        form.base: base.name,
        form.base_told: told_of_base(base),
        words.picked: gr.HTML(
            value=[use.plain() for use in uses], choices=pickers.choices(library.of_base(base.family))
        ),
        words.prompt: recipe.prompt,
        words.read: read_as(recipe.prompt, uses, library),
        words.examples: gr.Dataset(samples=[[text] for text in presets.prompts_for(names)]),
        **{group: [name for name in named if name in methods] for group, named in group_of},
        form.columns.told: told_of_methods(methods),
        **{group: gr.Accordion(visible=name in methods) for name, group in form.columns.dial_groups.items()},
        **{
            widget: _shown(METHODS[method].parameter(name), given.get(method, {}))
            for (method, name), widget in form.columns.dials.items()
        },
        drawing.seeds: ", ".join(map(str, recipe.seeds)),
        drawing.sampler: recipe.sampler,
        drawing.steps: recipe.steps,
        drawing.guidance: recipe.guidance,
        advanced.negative: recipe.negative,
        advanced.size: "" if recipe.size is None else str(recipe.size),
        advanced.clip_skip: recipe.clip_skip,
        advanced.samples: recipe.calibration.samples,
        advanced.unconditional: recipe.calibration.unconditional,
        form.carried: carried(recipe),
        words.sets: gr.Dataset(samples=set_samples(library, base)),
    }


def _shown(dial: Parameter, given: Mapping[str, Any]) -> Any:
    """A parameter's value as its widget has it."""
    value = given.get(dial.name, dial.default)
    if isinstance(value, list | tuple):
        return ", ".join(f"{number:g}" for number in value)
    if value is None:
        return ""
    return f"{value:g}" if dial.default is None and not isinstance(value, str) else value


def filled_widgets(form: Form) -> list[Any]:
    """The widgets that `filled` changes, as outputs."""
    words, columns = form.words, form.columns
    told = [
        form.base_told,
        words.read,
        words.examples,
        words.sets,
        columns.told,
        *columns.dial_groups.values(),
    ]
    return [*form.asked, *told]


def lacking(recipe: Recipe, library: Library) -> list[str]:
    """The concepts of a recipe that the library lacks for its base model."""
    there = {concept.name for concept in library.of_base(bases.find(recipe.base).family)}
    return [use.name for use in recipe.concepts if use.name not in there]
