"""A person's own concepts: added from a file or the Hub, changed, taken away as a zip, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from iteris_sd import bases, hub, limits, serving
from iteris_sd.concepts import PICTURES, Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.generators import relayed
from iteris_sd.ui import form as forms
from iteris_sd.ui import heavy, results
from iteris_sd.ui import picker as pickers
from iteris_sd.ui.form import Form, Update
from iteris_sd.ui.picker import Use
from iteris_sd.ui.visits import Visit, Visits

_NEW = ""  # in the list of one's own concepts: none of them, a new one
_FIRST = ("A new one", _NEW)
_REMOVE = "Remove"


@dataclass(frozen=True)
class Own:
    """The widgets. `sure`: the concept that is removed for good if it is asked for once more."""

    which: gr.Dropdown
    files: gr.File
    id: gr.Textbox
    title: gr.Textbox
    trigger: gr.Textbox
    noun: gr.Textbox
    weight: gr.Slider
    pictures: gr.File
    keep: gr.Button
    export: gr.DownloadButton
    remove: gr.Button
    sure: gr.State
    told: gr.HTML

    @property
    def words(self) -> list[Any]:
        """Those that say what a concept is."""
        return [self.title, self.trigger, self.noun, self.weight, self.pictures]


def layout() -> Own:
    """Lay the widgets out."""
    with gr.Column(elem_id="own"):
        which = gr.Dropdown([_FIRST], value=_NEW, label="Add or change", elem_id="own-which")
        files = gr.File(
            label="A LoRA and what belongs to it, or a .zip",
            file_types=[".safetensors", ".json", ".zip"],
            file_count="multiple",
            height=150,
            elem_classes="drop",
        )
        forms.markup(
            '<p class="note">A .safetensors file, with its learned tokens and PEFT\'s adapter_config.json where it has '
            "them. Tokens can be added to a concept of yours later, too.</p>"
        )
        id = gr.Textbox(
            label="Or from the Hugging Face Hub",
            info="owner/name, or owner/name:file.safetensors",
            placeholder="owner/name",
            max_length=300,
        )
        title = gr.Textbox(label="Title", max_length=limits.MAX_NAME_CHARS)
        with gr.Row():
            trigger = gr.Textbox(
                label="Trigger", info="The words it was trained with.", min_width=130, placeholder="<rex> dog"
            )
            noun = gr.Textbox(
                label="Class noun", info="What kind of thing it is.", min_width=130, placeholder="dog"
            )
        weight = gr.Slider(0.1, limits.MAX_WEIGHT, 1.0, step=0.1, label="Weight to begin with")
        pictures = gr.File(
            label=f"Up to {limits.MAX_REFERENCES} pictures of it, to score against",
            file_types=list(PICTURES),
            file_count="multiple",
            height=150,
            elem_classes="drop",
        )
        with gr.Row():
            keep = gr.Button("Keep concept", size="md", min_width=120)
            export = gr.DownloadButton("Export (zip)", size="md", visible=False, min_width=120)
            remove = gr.Button(_REMOVE, variant="stop", size="md", visible=False, min_width=150)
        told = forms.markup("", elem_id="own-told")
    sure = gr.State(_NEW)
    return Own(which, files, id, title, trigger, noun, weight, pictures, keep, export, remove, sure, told)


def shelf(visit: Visit) -> gr.Dropdown:
    """The list of one's own concepts, a new one chosen."""
    mine = [(concept.title, concept.name) for concept in visit.mine().values()]
    return gr.Dropdown([_FIRST, *mine], value=_NEW)


def names(library: Library) -> list[tuple[str, str]]:
    """All concepts of a library, each with the base model it is for."""
    return [
        (f"{concept.title} ({bases.find(concept.base).title})", concept.name)
        for concept in library.concepts.values()
    ]


def wire(
    visits: Visits, form: Form, own: Own, look_at: gr.Dropdown, follow: Callable[[Any, str], None]
) -> None:
    """Make them work; `look_at`: the list of all concepts elsewhere on the page, which is kept up to date.

    `follow(event, name)` shows what follows from what is picked after an event.
    """
    changed = [
        own.which,
        own.files,
        own.id,
        *own.words,
        form.words.picked,
        form.words.sets,
        *(own.export, own.remove, own.sure, own.told),
        look_at,
    ]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": own.told}

    words = [own.title, own.trigger, own.noun, own.weight]
    chosen = [*words, own.files, own.export, own.remove, own.sure, own.told]
    own.which.input(_show(visits, own), own.which, chosen, api_name="show_own", **forms.SILENT)
    own.files.upload(
        _guess(visits),
        [own.files, own.which],
        [own.title, own.trigger, own.noun, own.told],
        api_name="guess_own",
        **private,
    )
    asked = [own.which, own.files, own.id, *own.words, form.words.picked, form.base]
    kept = own.keep.click(_keep(visits, form, own, look_at), asked, changed, api_name="keep_own", **private)
    gone = own.remove.click(
        _remove(visits, form, own, look_at),
        [own.which, own.sure, form.words.picked, form.base],
        changed,
        api_name="remove_own",
        **private,
    )
    follow(kept, "show_kept")
    follow(gone, "show_removed")


def _show(visits: Visits, own: Own) -> Callable[..., Update]:
    """What is known of one of one's own concepts; nothing for a new one."""

    def show_own(name: str, request: gr.Request) -> Update:
        visit = visits.of(request)
        concept = visit.mine().get(name)
        fresh = {own.files: None, own.sure: _NEW}
        if concept is None:
            return {**fresh, **_empty(own), own.told: ""}
        try:
            told, export = "", gr.DownloadButton(value=str(visit.export(name)), visible=True)
        except UserError as error:
            told, export = results.problem(str(error)), gr.DownloadButton(visible=False)
        return {
            **fresh,
            own.title: concept.title,
            own.trigger: concept.trigger,
            own.noun: concept.class_noun,
            own.weight: concept.weight,
            own.export: export,
            own.remove: gr.Button(_REMOVE, visible=True),
            own.told: told,
        }

    return show_own


def _empty(own: Own) -> Update:
    """No words, and nothing to take away or to remove."""
    return {
        **{own.title: "", own.trigger: "", own.noun: "", own.weight: 1.0},
        own.export: gr.DownloadButton(visible=False),
        own.remove: gr.Button(_REMOVE, visible=False),
    }


def _guess(visits: Visits) -> Callable[..., tuple[Any, Any, Any, str]]:
    """What a LoRA says of itself, to be looked at and mended before it is kept."""

    def guess_own(paths: list[str] | None, which: str, request: gr.Request) -> tuple[Any, Any, Any, str]:
        nothing = gr.skip(), gr.skip(), gr.skip()
        if not paths or which != _NEW:  # a concept that is chosen has words of its own
            return *nothing, ""
        try:
            found = visits.of(request).look_at([Path(path) for path in paths])
        except UserError as error:
            return *nothing, results.problem(str(error))
        if isinstance(found, str):
            return *nothing, f'<p role="status">{escape(found)}</p>'
        told = '<p role="status">These words are guessed from the file; mend what is wrong, then keep it.</p>'
        return found.title, found.trigger, found.class_noun, told

    return guess_own


def _keep(visits: Visits, form: Form, own: Own, look_at: gr.Dropdown) -> Callable[..., Iterator[Update]]:
    def keep_own(
        which: str,
        paths: list[str] | None,
        id: str,
        title: str,
        trigger: str,
        noun: str,
        weight: float,
        pictures: list[str] | None,
        picked: Any,
        base: str,
        request: gr.Request,
    ) -> Iterator[Update]:
        visit = visits.of(request)
        words = {"title": title, "trigger": trigger, "class_noun": noun, "weight": weight}
        files, shown = ([Path(path) for path in several or []] for several in (paths, pictures))
        try:
            if which in visit.mine():
                if id.strip():
                    raise UserError(
                        "One of your concepts is chosen, and an id on the Hub, too; choose “A new one” to keep what is "
                        "on the Hub, or take the id away to change what is chosen."
                    )
                concept = visit.change(which, words, shown, files)
            elif id.strip():
                concept = yield from _from_hub(visit, id, words, shown, files, own)
            elif files:
                concept = visit.add(files, words, shown)
            else:
                raise UserError(
                    "Nothing is chosen; choose a .safetensors or .zip file, or write the id of one on the Hub."
                )
        except UserError as error:
            yield {own.told: results.problem(str(error))}
            return
        _forget([*files, *shown])
        uses = pickers.read(picked, visit.library)
        if all(use.name != concept.name for use in uses):
            uses += pickers.of_names([concept.name], visit.library)
        told = _welcome(concept, base)
        yield {**_shelf(form, own, visit, base, uses, told), look_at: gr.Dropdown(names(visit.library))}

    return keep_own


def _forget(uploaded: Sequence[Path]) -> None:
    """Remove what was uploaded to a public page, of which there is a copy now; Gradio would keep it for an hour."""
    folder = Path(get_upload_folder()).resolve()
    for path in uploaded if serving.public() else ():
        if path.resolve().is_relative_to(folder):
            with suppress(OSError):  # somebody else may have brought the same file, and it is gone
                path.unlink()


def _from_hub(
    visit: Visit, id: str, words: dict[str, Any], shown: list[Path], files: list[Path], own: Own
) -> Any:
    """Download a LoRA while the page shows how far it is, and keep it; `files`: its learned tokens."""
    heavy.bring_in()
    from iteris_sd import bringing

    parsed = hub.parse(id)
    if parsed is None:
        raise UserError(
            f"{id.strip()!r} is no id on the Hub; write owner/name, or owner/name:file.safetensors."
        )
    if not bringing.are_tokens(files):
        raise UserError(
            "An id on the Hub is written, and other files than learned tokens are chosen; take one of the two away."
        )
    work = visit.add_from_hub(parsed, words, shown, files)

    def told(step: tuple[int, int]) -> Update:
        done, total = map(hub.readable, step)
        return {own.told: f'<p role="status">Downloading: {done} of {total}.</p>'}

    return (yield from relayed(work, told))


def _welcome(concept: Concept, base: str) -> str:
    title = escape(concept.title)
    if concept.base == bases.find(base).family:
        return f'<p role="status">Kept: {title}.</p>'
    suits = escape(bases.find(concept.base).title)
    return f'<p role="status">Kept: {title}. It was made for {suits}: choose that as the base model to see it.</p>'


def _remove(visits: Visits, form: Form, own: Own, look_at: gr.Dropdown) -> Callable[..., Update]:
    def remove_own(which: str, sure: str, picked: Any, base: str, request: gr.Request) -> Update:
        visit = visits.of(request)
        concept = visit.mine().get(which)
        if concept is None:
            return {own.told: results.problem("No concept of yours is chosen.")}
        if sure != which:
            return {own.remove: gr.Button("Remove for good?"), own.sure: which, own.told: ""}
        try:
            visit.remove(which)
        except UserError as error:
            return {own.told: results.problem(str(error))}
        told = f'<p role="status">Removed: {escape(concept.title)}.</p>'
        shown = _shelf(form, own, visit, base, pickers.read(picked, visit.library), told)
        return {**shown, look_at: gr.Dropdown(names(visit.library), value=None)}

    return remove_own


def _shelf(form: Form, own: Own, visit: Visit, base: str, picked: Sequence[Use], told: str) -> Update:
    """The page after one's own concepts have changed."""
    chosen = bases.find(base)
    there = visit.library.of_base(chosen.family)
    names = {concept.name for concept in there}
    uses = [use.plain() for use in picked if use.name in names][: limits.MAX_CONCEPTS]
    return {
        own.which: shelf(visit),
        own.files: None,
        own.id: "",
        own.sure: _NEW,
        **_empty(own),
        own.pictures: None,
        form.words.picked: gr.HTML(value=uses, choices=pickers.choices(there)),
        form.words.sets: gr.Dataset(samples=forms.set_samples(visit.library, chosen)),
        own.told: told,
    }
