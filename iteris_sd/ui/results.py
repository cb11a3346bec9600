"""What a composition looks like on the page: progress, the grid of pictures, the table of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from iteris_sd.recipe import Recipe, alone, fill, title
from iteris_sd.ui.jobs import Preview, State
from iteris_sd.ui.takeaway import Drawn

_GRID = Path(__file__).with_name("grid.js").read_text(encoding="utf-8")
OWN = "own"  # of what a concept alone is drawn by: its own LoRA
EMPTY = """
<div class="empty">
<p><strong>Several of your own things in one picture.</strong></p>
<ol>
<li>Pick concepts: each is a LoRA that knows one particular thing.</li>
<li>Say what the picture shows.</li>
<li>Press Compose. Every method draws the same seeds, side by side.</li>
</ol>
</div>
"""
BROKEN = "That did not come to its end: too many are waiting, or something went wrong inside. Try again."
STARTING = '<div class="progress"><p role="status">Waiting for its turn…</p><progress></progress></div>'


def problem(message: str) -> str:
    """A sentence about what is wrong."""
    return f'<p class="problem" role="alert">{escape(message)}</p>'


# ---------------------------------------------------------------- how far it is


def progress(recipe: Recipe, state: State) -> str:
    """What is being done, which picture it is, how long it still takes, and a bar; or how it ended."""
    ready, total = len(state.pictures), recipe.count
    if state.phase == "failed":
        return problem(state.message)
    if state.phase == "done":
        return f'<p class="ended" role="status">Done: {pictures(ready)}.</p>'
    if state.phase == "stopped":
        return f'<p class="ended" role="status">Stopped. {ready} of {pictures(total)} finished.</p>'
    if state.phase == "waiting":
        return waiting(state)
    if not state.at_once:
        return bar(state, "", state.done, state.total)
    which = (
        f"Picture {ready + 1}" if state.at_once == 1 else f"Pictures {ready + 1} to {ready + state.at_once}"
    )
    where = f"{which} of {total}, step {state.done} of {state.total}"
    return bar(state, where, ready * state.total + state.done * state.at_once, total * state.total)


def waiting(state: State) -> str:
    """Whose turn it is."""
    before = f"{state.before} before you" if state.before else "you are next"
    return f'<div class="progress"><p role="status">Waiting for its turn: {before}.</p><progress></progress></div>'


def bar(state: State, where: str, value: float, most: float) -> str:
    """The stage, a bar, and how long it still takes."""
    told = ", ".join(text for text in (where, _left(state)) if text)
    filled = (
        f'<progress value="{value}" max="{max(most, 1)}"></progress>' if value else "<progress></progress>"
    )
    return (
        f'<div class="progress"><p role="status">{escape(state.stage)}</p>'
        f'{filled}<p class="where">{told or "&nbsp;"}</p></div>'
    )


def _left(state: State) -> str:
    if state.left is None:
        return ""
    what = "about" if state.at_once else "this step about"
    seconds = max(1, round(state.left))
    return f"{what} {seconds} s left" if seconds < 100 else f"{what} {round(seconds / 60)} min left"


def pictures(count: int) -> str:
    """So many pictures, in words."""
    return f"{count} picture" if count == 1 else f"{count} pictures"


# ---------------------------------------------------------------- the pictures


def grid(elem_id: str) -> gr.HTML:
    """An empty grid; its value is what `composition` or `retention` say."""
    return gr.HTML(
        value=None,
        html_template='<div class="grid"></div>',
        js_on_load=_GRID,
        apply_default_css=False,
        elem_id=elem_id,
    )


def composition(recipe: Recipe, drawn: Iterable[Drawn], preview: Preview | None = None) -> dict[str, Any]:
    """Rows are seeds, columns are methods; pictures that are not there yet are blank, or seen as they are by now."""
    drawn = [one for one in drawn if not one.scene]
    return {
        "name": recipe.prompt,
        "columns": [{"id": name, "title": title(name)} for name in recipe.columns],
        "rows": [{"id": str(seed), "kind": "seed", "title": str(seed)} for seed in recipe.seeds],
        **_measures(recipe, drawn),
        "cells": {f"{one.seed}|{one.method}": _cell(one, recipe) for one in drawn},
        "previews": _previews(preview, lambda scene, column, seed: f"{seed}|{column}", False),
    }


def retention(
    recipe: Recipe, drawn: Iterable[Drawn], preview: Preview | None = None
) -> dict[str, Any] | None:
    """Each concept alone, a row for each and each seed: by its own LoRA, and by every merged adapter."""
    if not recipe.retention:
        return None
    names = [use.name for use in recipe.concepts]

    def place(scene: str, column: str, seed: int) -> str:
        return f"{scene} {seed}|{OWN if column == alone(scene) else column}"

    drawn = [one for one in drawn if one.scene]
    return {
        "name": f"retention {recipe.prompt}",
        "columns": [
            {"id": OWN, "title": "Its own LoRA"},
            *({"id": use.name, "title": title(use.name)} for use in recipe.merging),
        ],
        "rows": [
            {"id": f"{name} {seed}", "title": f"{name}, seed {seed}"}
            for name in names
            for seed in recipe.retained
        ],
        **_measures(recipe, drawn, least=False),
        "cells": {place(one.scene, one.method, one.seed): _cell(one, recipe) for one in drawn},
        "previews": _previews(preview, place, True),
    }


def _previews(preview: Preview | None, place: Callable[[str, str, int], str], of_one: bool) -> dict[str, str]:
    """Previews of the composition, or those `of_one` concept, by their places."""
    if preview is None or bool(preview.scene) != of_one:
        return {}
    return {place(preview.scene, column, seed): uri for (column, seed), uri in preview.pictures.items()}


def _measures(recipe: Recipe, drawn: Sequence[Drawn], least: bool = True) -> dict[str, Any]:
    """All measures that were taken, and which of them stand under every picture."""
    taken = dict.fromkeys(name for one in drawn for name in one.measures)
    main = ["text", *(f"image:{use.name}" for use in recipe.concepts)]
    main += ["minimum"] if least and len(recipe.concepts) > 1 else []
    return {
        "measures": [{"id": name, "title": measured(name), "short": _short(name)} for name in taken or main],
        "main": [name for name in main if name in taken or not taken],
    }


def measured(measure: str) -> str:
    """A measure's name for people."""
    kind, _, concept = measure.partition(":")
    return {
        "text": "Text",
        "text_cosine": "Text, plain cosine",
        "minimum": "Weakest concept",
        "mean": "Mean of the concepts",
        "crop_minimum": "Weakest concept, closest part",
        "image": concept,
        "crop": f"{concept}, closest part",
        "dino": f"{concept}, by DINO",
    }.get(kind, measure)


def _short(measure: str) -> str:
    return {"minimum": "least", "text": "text"}.get(measure, measured(measure))


def address(path: Path) -> str:
    """Where the page finds a file, as an attribute has it."""
    return f"gradio_api/file={quote(str(path))}"


def _cell(one: Drawn, recipe: Recipe) -> dict[str, Any]:
    what = title(one.method) if not one.scene or one.method != alone(one.scene) else "Its own LoRA"
    named = f"{what}, seed {one.seed}"
    named_so = ("text", *(f"image:{use.name}" for use in recipe.concepts), "minimum")
    shown = [m for m in named_so if m in one.measures]
    told = ", ".join(f"{_short(m)} {one.measures[m]:z.2f}" for m in shown)
    subject = one.scene or fill(recipe.prompt, [use.name for use in recipe.concepts])
    return {
        "url": address(one.path),
        "title": named,
        "alt": f"{named}: {subject}." + (f" Alignment: {told}." if told else ""),
        "scores": dict(one.measures),
        "flagged": one.flagged,
    }


# ---------------------------------------------------------------- the table


def summary(recipe: Recipe, scores: Mapping[str, Any] | None) -> str:
    """The table of means, their 95 % intervals and n, and of differences; `scores` are those of `export.scores`."""
    if scores is None:
        return ""
    scorer, rows = str(scores["scorer"]), scores["summary"]
    if not rows:
        return f'<p class="note">Scored by {escape(scorer)}</p>'
    taken = dict.fromkeys(row["measure"] for row in rows)
    main = ["text", *(f"image:{use.name}" for use in recipe.concepts), "minimum"]
    main = [name for name in main if name in taken and (name != "minimum" or len(recipe.concepts) > 1)]
    further = [name for name in taken if name not in (*main, "text_cosine", "mean", "minimum")]
    caption = _caption(_several(rows))
    parts = [_table(recipe, rows, main, caption), _note(scorer, _several(rows))]
    if further:
        closest = "Alignment of the closest part, and by other encoders"
        parts.append(_folded("Further scores", _table(recipe, rows, further, closest) + said(_CLOSEST)))
    if differences := [row for row in scores.get("paired", ()) if row["measure"] in main]:
        caption = f"Difference to {title(differences[0]['to'])}"
        meaning = _PAIRED if _several(differences) else _PAIRED_ONCE
        table = _table(recipe, differences, main, caption, "+") + said(meaning)
        parts.append(_folded("Differences to the linear average", table))
    return "".join(parts)


_MEANING = (
    "Text: how well the picture fits the prompt. A concept: how much the picture looks like its reference pictures. "
    "More is better."
)
_CLOSEST = (
    "A concept may be small in a picture, or gone: the largest alignment of any part of the picture with its "
    "reference pictures."
)
_PAIRED = (
    "Mean over seeds of the difference on the same seed. An interval that does not hold 0 is a difference that chance "
    "alone would seldom make."
)
_PAIRED_ONCE = "The difference on one seed, which chance alone may have made; more seeds tell."


def said(text: str) -> str:
    """A remark under a table."""
    return f'<p class="note">{escape(text)}</p>'


def _several(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any mean is of more than one picture, so that it has an interval."""
    return any(row["low"] is not None for row in rows)


def _caption(several: bool) -> str:
    meaning = f'<abbr title="{escape(_MEANING, quote=True)}">?</abbr>'
    if several:
        return f"Mean alignment {meaning}, 95 % interval under it"
    return f"Alignment {meaning}, without an interval: of one picture each"


def _note(scorer: str, several: bool) -> str:
    bold = "; the best of a column is bold only where its interval meets no other" if several else ""
    return (
        '<p class="note">Text: how well the picture fits the prompt. A concept: how much it looks like that '
        f"concept’s reference pictures. More is better{bold}. Scored by {escape(scorer)}.</p>"
    )


def _folded(name: str, content: str) -> str:
    return f"<details><summary>{name}</summary>{content}</details>"


def _table(
    recipe: Recipe, rows: Sequence[Mapping[str, Any]], measures: Sequence[str], caption: str, sign: str = ""
) -> str:
    """A line for each column of the grid that has numbers, a column for each measure, and n."""
    found = {(row["method"], row["measure"]): row for row in rows}
    names = [name for name in recipe.columns if any((name, m) in found for m in measures)]
    best = {m: _best([found[name, m] for name in names if (name, m) in found]) for m in measures}
    head = "".join(f'<th scope="col">{escape(measured(m))}</th>' for m in measures)
    body = "".join(
        f'<tr><th scope="row">{escape(title(name))}</th>'
        + "".join(
            f"<td>{_mean(found.get((name, m)), best[m] == name and not sign, sign)}</td>" for m in measures
        )
        + f"<td>{max(found[name, m]['n'] for m in measures if (name, m) in found)}</td></tr>"
        for name in names
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="Scores"><table class="summary">'
        f"<caption>{caption}</caption>"
        f'<thead><tr><th scope="col">Method</th>{head}<th scope="col"><i>n</i></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _best(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The method whose interval lies above all others of a measure; nobody where intervals meet or are not known."""
    if len(rows) < 2 or any(row["low"] is None for row in rows):
        return None
    first, *others = sorted(rows, key=lambda row: row["mean"], reverse=True)
    return str(first["method"]) if all(first["low"] > other["high"] for other in others) else None


def _mean(row: Mapping[str, Any] | None, best: bool, sign: str) -> str:
    if row is None:
        return "–"
    mean = f"{row['mean']:{sign}.3f}"
    mean = f"<strong>{mean}</strong>" if best else mean
    if row["low"] is None:
        return mean
    return f"{mean}<small>{row['low']:{sign}.2f} to {row['high']:{sign}.2f}</small>"
