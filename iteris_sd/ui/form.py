"""The widgets that say what is asked, and the recipe that is made of what stands in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, get_args

import gradio as gr

from iteris_sd import bases, limits, presets, weights
from iteris_sd.bases import Base
from iteris_sd.concepts import Library
from iteris_sd.merging.registry import METHODS, Parameter
from iteris_sd.recipe import Recipe, Sampler, fill
from iteris_sd.ui import asking
from iteris_sd.ui.picker import picker

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


@dataclass(frozen=True)
class Words:
    """What the picture is of."""

    picked: gr.HTML
    preset: gr.Dropdown
    prompt: gr.Textbox
    read: gr.HTML
    examples: gr.Dataset


@dataclass(frozen=True)
class Columns:
    """Which methods."""

    groups: Sequence[gr.CheckboxGroup]
    told: gr.HTML


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn."""

    seeds: gr.Textbox
    sampler: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider


@dataclass(frozen=True)
class Advanced:
    """What most people leave alone. `dials`: (method, parameter) -> widget, in a group for each method."""

    settings: Mapping[str, gr.Button]
    negative: gr.Textbox
    size: gr.Textbox
    clip_skip: gr.Slider
    samples: gr.Slider
    weights: Sequence[gr.Slider]
    dials: Mapping[tuple[str, str], gr.components.Component]
    groups: Mapping[str, gr.Group]


@dataclass(frozen=True)
class Form:
    """All of them."""

    base: gr.Dropdown
    base_told: gr.HTML
    words: Words
    columns: Columns
    drawing: Drawing
    advanced: Advanced

    @property
    def asked(self) -> set[Any]:
        """All widgets that a recipe is made of."""
        words, drawing, advanced = self.words, self.drawing, self.advanced
        return {
            self.base,
            words.picked,
            words.prompt,
            *self.columns.groups,
            *(drawing.seeds, drawing.sampler, drawing.steps, drawing.guidance),
            *(advanced.negative, advanced.size, advanced.clip_skip, advanced.samples),
            *advanced.weights,
            *advanced.dials.values(),
        }


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
    """What a base model is, whether it must be downloaded, and whether its pictures are checked."""
    told = [base.description]
    if base.download and weights.located(base) is None:
        told.append(
            f"<b>Not on this machine yet: Compose downloads it once, about {escape(base.download)}.</b>"
        )
    if base.family != "storybook":
        told.append("Without a GPU a picture takes minutes.")
        told.append(f"Safety checker: {'on' if weights.safety_wanted() else 'off'}.")
    return f"<p>{' '.join(told)}</p>"


def words(library: Library, base: Base) -> Words:
    """Concepts, prompt and examples."""
    first = first_picked(library, base)
    prompts = presets.prompts_for(first)
    title("Concepts", f"Pick up to {limits.MAX_CONCEPTS}. The number on a card is its place in the prompt.")
    picked = picker(library.of_base(base.family), first)
    preset = gr.Dropdown(preset_choices(library, base), value=None, label="Or take a ready-made set")
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
    )
    return Words(picked, preset, prompt, read, examples)


def first_picked(library: Library, base: Base) -> list[str]:
    """What is picked to begin with, as far as there is something to pick."""
    there = [concept.name for concept in library.of_base(base.family)]
    return [name for name in FIRST_PICKED if name in there]


def preset_choices(library: Library, base: Base) -> list[tuple[str, str]]:
    """The presets of particular concepts, each with what of it the library lacks for this base model."""
    there = {concept.name for concept in library.of_base(base.family)}
    choices = []
    for preset in presets.presets().values():
        lacking = [name for name in preset.concepts if name not in there]
        told = f" (lacks {', '.join(lacking)})" if lacking else ""
        if not preset.general:
            choices.append((preset.title + told, preset.name))
    return choices


def columns() -> Columns:
    """The methods, in groups, and a sentence for each that is ticked."""
    with gr.Column(elem_id="methods"):
        title("Methods", "Each is a column of the grid.")
        groups = [
            gr.CheckboxGroup(
                [(asking.METHOD_CHOICES[name][0], name) for name in names],
                value=[name for name in names if name in asking.DEFAULT_METHODS],
                label=group,
            )
            for group, names in asking.METHOD_GROUPS.items()
        ]
        return Columns(groups, markup(told_of_methods(asking.DEFAULT_METHODS), elem_id="told"))


def drawing(base: Base) -> Drawing:
    """Seeds, sampler, steps, guidance."""
    with gr.Row():
        seeds = gr.Textbox(
            "0, 1, 2, 3", label="Seeds", info="Each is a row of the grid.", elem_id="seeds", min_width=150
        )
        sampler = gr.Dropdown(
            [(SAMPLERS[name], name) for name in get_args(Sampler)],
            value=base.sampler,
            label="Sampler",
            info="How the noise is removed.",
            min_width=150,
        )
    with gr.Row():
        steps = gr.Slider(1, limits.MAX_STEPS, base.steps, step=1, label="Steps", min_width=150)
        guidance = gr.Slider(1, limits.MAX_GUIDANCE, base.guidance, step=0.5, label="Guidance", min_width=150)
    return Drawing(seeds, sampler, steps, guidance)


def advanced(first: Sequence[str]) -> Advanced:
    """The rest, folded away."""
    with gr.Accordion("Advanced", open=False):
        settings = {
            name: gr.Button(f"{chosen.title} settings", size="sm")
            for name, chosen in presets.settings().items()
        }
        negative = gr.Textbox(label="Negative prompt", max_length=limits.MAX_PROMPT_CHARS)
        with gr.Row():
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
        strengths = [
            gr.Slider(
                0.1,
                limits.MAX_WEIGHT,
                1.0,
                step=0.1,
                label=weight_label(first, k),
                visible=k < len(first),
            )
            for k in range(limits.MAX_CONCEPTS)
        ]
        groups, dials = _dials(asking.DEFAULT_METHODS)
    return Advanced(settings, negative, size, clip_skip, samples, strengths, dials, groups)


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


def weight_label(names: Sequence[str], k: int) -> str:
    """What the k-th weight is called."""
    return f"Weight of {names[k]}" if k < len(names) else "Weight"


def read_as(prompt: str, names: Sequence[str], library: Library) -> str:
    """The prompt as the model reads it, and a word when a concept is left out of it."""
    triggers = [library.concepts[name].trigger for name in names]
    try:
        text = fill(prompt or "", triggers)
    except IndexError:
        return f"<p>The prompt has more places than concepts are picked ({len(names)}).</p>"
    left_out = [name for name, t in zip(names, triggers, strict=True) if t.lower() not in text.lower()]
    note = f" <b>Not in the prompt: {escape(', '.join(left_out))}.</b>" if left_out and text.strip() else ""
    return f"<p>Reads: {escape(text)}{note}</p>" if text.strip() else "<p></p>"


def names_of(picked: Any, library: Library) -> list[str]:
    """The picked names that there are; what comes from a browser may be anything."""
    return [name for name in picked or [] if isinstance(name, str) and name in library.concepts]


def recipe(values: Update, form: Form, library: Library) -> Recipe:
    """The recipe that the widgets ask for. Raises UserError on the first thing that is wrong."""
    drawing, advanced = form.drawing, form.advanced
    names = values[form.words.picked] or []
    parameters: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    for (method, name), widget in advanced.dials.items():
        dial = next(p for p in METHODS[method].parameters if p.name == name)
        given = asking.parameter(dial, values[widget])
        if given != dial.default:
            parameters[method][name] = given
    return asking.recipe(
        base=str(values[form.base]),
        concepts=[library.find(str(name)).name for name in names],
        prompt=values[form.words.prompt] or "",
        negative=values[advanced.negative] or "",
        methods=ticked(values[group] for group in form.columns.groups),
        seeds=asking.seeds(values[drawing.seeds]),
        steps=values[drawing.steps],
        guidance=values[drawing.guidance],
        sampler=values[drawing.sampler],
        size=asking.size(values[advanced.size]),
        clip_skip=values[advanced.clip_skip],
        samples=values[advanced.samples],
        weights=[values[slider] for slider in advanced.weights[: len(names)]],
        parameters=parameters,
    )
