"""What a composition looks like on the page: progress, the grid of pictures, the table of scores."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote

from iteris_sd.recipe import Recipe
from iteris_sd.ui.asking import METHOD_CHOICES
from iteris_sd.ui.jobs import State
from iteris_sd.ui.takeaway import Drawn

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
STARTING = '<div class="progress"><p role="status">Waiting for its turn…</p><progress></progress></div>'


def problem(message: str) -> str:
    """A sentence about what is wrong."""
    return f'<p class="problem" role="alert">{escape(message)}</p>'


def progress(recipe: Recipe, state: State) -> str:
    """What is being done, which picture it is, and a bar; or how it ended."""
    ready, total = len(state.pictures), len(recipe.seeds) * len(recipe.methods)
    if state.phase == "failed":
        return problem(state.message)
    if state.phase == "done":
        return f'<p class="ended" role="status">Done: {_pictures(ready)}.</p>'
    if state.phase == "stopped":
        return f'<p class="ended" role="status">Stopped. {ready} of {_pictures(total)} finished.</p>'
    if not state.stage.startswith("Drawing"):
        where, value, most = "", state.done, state.total
    else:
        where = f"Picture {ready + 1} of {total}, step {state.done} of {state.total}"
        value, most = ready * state.total + state.done, total * state.total
    bar = f'<progress value="{value}" max="{max(most, 1)}"></progress>' if value else "<progress></progress>"
    return (
        f'<div class="progress"><p role="status">{escape(state.stage)}</p>'
        f'{bar}<p class="where">{where or "&nbsp;"}</p></div>'
    )


def _pictures(count: int) -> str:
    return f"{count} picture" if count == 1 else f"{count} pictures"


def grid(recipe: Recipe, state: State) -> str:
    """Rows are seeds, columns are methods; pictures that are not there yet are blank."""
    if state.phase in ("failed", "stopped") and not state.pictures:
        return ""
    found = {(drawn.method, drawn.seed): drawn for drawn in state.pictures}
    methods = [method.name for method in recipe.methods]
    head = "".join(f'<th scope="col">{escape(METHOD_CHOICES[name][0])}</th>' for name in methods)
    rows = "".join(
        f'<tr><th scope="row"><span>seed </span>{seed}</th>'
        + "".join(_cell(found.get((name, seed)), recipe, name, seed) for name in methods)
        + "</tr>"
        for seed in recipe.seeds
    )
    return (
        f'<div class="wide"><table class="pictures" style="--columns: {len(methods)}">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(drawn: Drawn | None, recipe: Recipe, method: str, seed: int) -> str:
    if drawn is None:
        return '<td><div class="pending"></div></td>'
    title = METHOD_CHOICES[method][0]
    images = [(use.name, drawn.images.get(use.name)) for use in recipe.concepts]
    told = ", ".join(f"{name} {_number(value)}" for name, value in [("text", drawn.text), *images])
    alt = escape(f"{title}, seed {seed}: {recipe.prompt}. Alignment: {told}.", quote=True)
    url = escape(f"gradio_api/file={quote(str(drawn.path))}", quote=True)
    scores = "".join(f"<span>{escape(name)} {_number(value)}</span>" for name, value in images)
    if drawn.flagged:
        scores += '<span class="flagged">blanked by the safety checker, not scored</span>'
    return (
        f'<td><figure><a href="{url}" target="_blank" rel="noopener"><img src="{url}" alt="{alt}"></a>'
        f"<figcaption><b>{escape(title)}, seed {seed}</b>"
        f'<span class="text">text {_number(drawn.text)}</span>{scores}</figcaption></figure></td>'
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def summary(recipe: Recipe, scores: Mapping[str, Any] | None) -> str:
    """The table of means, their 95 % intervals and n; `scores` are those of `export.scores`."""
    if scores is None:
        return ""
    measures = {"text": "Text"} | {f"image:{use.name}": use.name for use in recipe.concepts}
    if len(recipe.concepts) > 1:
        measures["minimum"] = "Weakest concept"
    rows = {(row["method"], row["measure"]): row for row in scores["summary"]}
    shown = [m.name for m in recipe.methods if (m.name, "text") in rows]
    if not shown:
        return f'<p class="note">Scored by {escape(scores["scorer"])}</p>'
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in measures.values())
    body = "".join(
        f'<tr><th scope="row">{escape(METHOD_CHOICES[name][0])}</th>'
        + "".join(f"<td>{_mean(rows.get((name, measure)))}</td>" for measure in measures)
        + f"<td>{rows[name, 'text']['n']}</td></tr>"
        for name in shown
    )
    return (
        '<div class="wide"><table class="summary"><caption>Mean alignment, and its 95 % interval</caption>'
        f'<thead><tr><th scope="col">Method</th>{head}<th scope="col"><i>n</i></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<p class="note">Text: how well the picture fits the prompt. A concept: how much it looks like that '
        f"concept’s reference pictures. More is better. Scored by {escape(scores['scorer'])}.</p>"
    )


def _mean(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["low"] is None:
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f}<small>{row['low']:.2f} to {row['high']:.2f}</small>"
