"""How well a merge went, layer by layer: a table, and the figures that tell most.

Figures are on a paper of their own, 720 px wide at a device's two pixels each, and told apart by markers, line styles
and hatching beside colours.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from iteris_sd.errors import UserError
from iteris_sd.merging import registry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from iteris_sd.calibration import Change, LayerReport, Merged

TABLE = "layers.csv"
COMPARED = ("iteris", "regmean", "linear")  # by the paper's Fig. 3a, whatever else there is
TITLES: Mapping[str, str] = {
    "discrepancy": "Lower is closer to what each concept's own model sees",
    "residual": "Further left, more of what each LoRA does is kept",
    "balance": "Equal parts: no concept is served at another's cost",
    "change": "Where it falls, the iteration settles",
}  # of the figures, by name: what is better
_FORMULAE = {
    "discrepancy": "discrepancy of a layer's inputs, ‖X̃ − X‖ / ‖X‖",
    "residual": "residual Σλₙ‖XₙΔWₙᵀ − X̃ₙΔWᵀ‖² / Σλₙ‖XₙΔWₙᵀ‖²: median layer, range",
    "balance": "each concept's share of Σλₙ‖XₙΔWₙᵀ − X̃ₙΔWᵀ‖²",
    "change": "change of a layer in one iteration, ‖ΔWₖ − ΔWₖ₋₁‖ / ‖ΔWₖ‖",
}
_PAPER, _INK, _PALE = "#faf8f4", "#26231f", "#b5afa6"
_COLOURS = ("#0b6e6e", "#c8553d", "#b07a10", "#5b5b9f", "#5f7f22", "#8a5a44", "#a03a72", "#4a4a4a")
_FILLS = ("#8fc7c1", "#f3c1b1", "#f3dc9a", "#c6c6e8", "#cfe0ac", "#ddc6b8")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 2)), (0, (3, 1, 1, 1)), (0, (8, 2)))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "++++")
_BLOCK = re.compile(r"text_encoder|unet\.(?:(?:down|up)_blocks\.\d+|\w+)")
_LEAST = 1e-3  # residual that is drawn; what is below is as good as none, and a logarithm ends somewhere
_WIDTH, _DPI = 4.8, 300  # inches, and pixels of each: 1440 of them, twice what is shown


def with_measures(merged: Merged, measured: Sequence[LayerReport]) -> Merged:
    """The merge with residual, discrepancy and balance as `calibration.measure` found them: alike for all methods.

    A concept that takes part in a layer without touching it has no term there, so its balance is 0. Site and rows stay
    those that the layer was solved from, if it was.
    """
    found = {report.name: report for report in measured}
    reports = [
        _with_measure(report, found[report.name]) if report.name in found else report
        for report in merged.reports
    ]
    return replace(merged, reports=tuple(reports))


def _with_measure(report: LayerReport, measured: LayerReport) -> LayerReport:
    terms = dict(zip(measured.participants, measured.balance, strict=True))
    solved = report if report.site is not None else measured
    return replace(
        report,
        site=solved.site,
        rows=solved.rows,
        residual=measured.residual,
        discrepancy=measured.discrepancy,
        balance=tuple(terms.get(n, 0.0) for n in report.participants),
    )


def write(merged: Merged, concepts: Sequence[str], folder: Path) -> list[Path]:
    """Write `layers.csv`, `discrepancy.png`, `residual.png` and `balance.png` into `folder`; return what was written.

    A figure that no layer has a value for is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        rows = [row(report, concepts) for report in merged.reports]
        table = csv.DictWriter(file, list(rows[0]) if rows else ["layer"])
        table.writeheader()
        table.writerows(rows)
    reports = {merged.method: merged.reports}
    drawn = {
        "discrepancy": _discrepancy(reports, {merged.method}),
        "residual": _residual(reports),
        "balance": _balance(reports, concepts),
    }
    return [folder / TABLE, *_saved(drawn, folder).values()]


def row(report: LayerReport, concepts: Sequence[str]) -> dict[str, Any]:
    """One layer as a line of the table; what was not measured is empty.

    `lambda`: the weights that the method itself has; `miss`: shares of eq. 5, by eq. 8's weights for all methods alike
    where a merge was measured (`with_measures`).
    """
    numbers = {
        "residual": report.residual,
        "discrepancy": report.discrepancy,
        "condition": report.condition,
        "change": report.change,
        "truncation": report.truncation,
    }
    per_concept: dict[str, Any] = {}
    for kind, values in (("lambda", report.weights), ("miss", report.balance)):
        known = dict(zip(report.participants, values, strict=False))
        per_concept |= {f"{kind} {name}": _text(known.get(n)) for n, name in enumerate(concepts)}
    return {
        "layer": report.name,
        "method": report.method,
        "concepts": " + ".join(concepts[n] for n in report.participants),
        "site": report.site or "",
        "rows": report.rows or "",
        **{name: _text(value) for name, value in numbers.items()},
        **per_concept,
        "left out": "; ".join(f"{concepts[n]}: {why}" for n, why in report.dropped.items()),
    }


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def block(name: str) -> str:
    """`text_encoder`, or the U-Net's block that a layer lies in: `unet.down_blocks.0`, `unet.mid_block`."""
    found = _BLOCK.match(name)
    return found[0] if found else name.partition(".")[0]


def shares(reports: Sequence[LayerReport], concepts: Sequence[str]) -> dict[str, float]:
    """Each concept's share of Σ λₙ‖XₙΔWₙᵀ − X̃ₙΔWᵀ‖² over these layers (Fig. 3c); empty where that is zero."""
    totals = dict.fromkeys(range(len(concepts)), 0.0)
    for report in reports:
        for n, miss in zip(report.participants, report.balance, strict=False):
            totals[n] += miss
    whole = sum(totals.values())
    return {concepts[n]: miss / whole for n, miss in totals.items()} if whole > 0 else {}


def figures(
    reports: Mapping[str, Sequence[LayerReport]],
    concepts: Sequence[str],
    changes: Sequence[Change],
    folder: Path,
    method: str = "iteris",
) -> dict[str, Path]:
    """Draw `discrepancy` (Fig. 3a), `residual`, `balance` (Fig. 3c, of `method` beside linear) and `change` (Fig. 8).

    `reports`: by method, linear among them, of the layers that all were measured at; `changes`: of each iteration.
    Returns figure -> PNG in `folder`; a figure that there are no values for is left out. May run in any thread. Raises
    UserError when nothing was merged by `method`.
    """
    if method not in reports:
        known = ", ".join(reports)
        raise UserError(f"Nothing was merged by {method!r} here; choose one of {known}.")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "discrepancy": _discrepancy(reports, {*COMPARED, method}),
        "residual": _residual(reports),
        "balance": _balance({name: reports[name] for name in (method, "linear")}, concepts),
        "change": _change(changes),
    }
    return _saved(drawn, folder)


def _title(method: str) -> str:
    return registry.find(method).title


def _label(concept: str) -> str:
    """A concept's name, or the last part of its path, as short as a figure needs it."""
    name = Path(concept).name
    return name if len(name) <= 18 else f"{name[:17]}…"


def _saved(drawn: Mapping[str, Figure | None], folder: Path) -> dict[str, Path]:
    written = {}
    for name, figure in drawn.items():
        if figure is not None:
            written[name] = folder / f"{name}.png"
            figure.savefig(written[name], dpi=_DPI, facecolor=_PAPER)
    return written


def _paper(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and axes side by side that share what is up and down."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, height), layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    for axes in panels:
        axes.set_facecolor(_PAPER)
        axes.tick_params(labelsize=9, color=_INK, labelcolor=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
    return figure, panels


def _titled(figure: Figure, axes: Axes, name: str) -> Figure:
    """The figure with its title, and under it what its marks mean."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(len(labels), 3),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=3.2,
        borderpad=0.1,
        title=TITLES[name],
        title_fontproperties={"size": 10.5, "weight": "bold"},
        alignment="left",
    ).get_title().set_color(_INK)
    return figure


def _line(axes: Axes, points: Sequence[tuple[int, float]], k: int, label: str, every: Any = None) -> None:
    """The k-th line of some axes; `every`: which points bear a marker."""
    axes.plot(
        *zip(*points, strict=True),
        color=_COLOURS[k],
        linestyle=_LINES[k],
        marker=_MARKERS[k],
        markevery=every,
        markersize=5,
        linewidth=1.6,
        label=label,
    )


def _discrepancy(reports: Mapping[str, Sequence[LayerReport]], shown: Collection[str]) -> Figure | None:
    """A line for each method `shown` over the different inputs that layers get, those of the text encoder first."""
    values = {
        method: {r.site: r.discrepancy for r in of if r.site is not None and r.discrepancy is not None}
        for method, of in reports.items()
    }
    sites = sorted({site for found in values.values() for site in found}, key=_from_the_input_on)
    if not sites:
        return None
    figure, (axes,) = _paper(3.7)
    for k, (method, found) in enumerate(values.items()):
        points = [(place, found[site]) for place, site in enumerate(sites) if site in found]
        every = max(1, len(points) // 12)
        if points and method in shown:
            _line(axes, points, k, _title(method), (k * every // len(values), every))
    _block_ticks(axes, sites)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.set_title(_FORMULAE["discrepancy"], fontsize=9, loc="left", color=_INK)
    return _titled(figure, axes, "discrepancy")


def _from_the_input_on(name: str) -> tuple[Any, ...]:
    """Sorts layers as the model meets them: text encoder, what reads the text's states, the U-Net's blocks.

    Of a module's layers the one called out is the last.
    """
    text = name.startswith("text_encoder.")
    words = [
        (int(word), False, "") if word.isdigit() else (-1, "out" in word, word) for word in name.split(".")
    ]
    return not text, not name.endswith(("attn2.to_k", "attn2.to_v")), words


def _block_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Name the blocks under the x axis, with a line where one begins."""
    starts: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        starts.setdefault(block(name), []).append(place)
    for places in list(starts.values())[1:]:
        axes.axvline(places[0] - 0.5, color=_PALE, linewidth=0.7, zorder=0)
    axes.set_xticks([sum(places) / len(places) for places in starts.values()], [_short(b) for b in starts])
    axes.tick_params(axis="x", length=0)
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")


def _short(block: str) -> str:
    """`text`, `down 0`, `mid`."""
    words = block.removeprefix("unet.").replace("_blocks.", " ").replace("_block", "")
    return words.replace("text_encoder", "text").replace("_", " ")


def _blocks(reports: Mapping[str, Sequence[LayerReport]]) -> dict[str, dict[str, list[LayerReport]]]:
    """Block -> method -> its measured layers, blocks from the model's input on."""
    found: dict[str, dict[str, list[LayerReport]]] = {}
    names = {r.name for of in reports.values() for r in of if r.residual is not None}
    for name in sorted(names):
        found.setdefault(block(name), {method: [] for method in reports})
    for method, of in reports.items():
        for report in of:
            if report.residual is not None:
                found[block(report.name)][method].append(report)
    return found


def _residual(reports: Mapping[str, Sequence[LayerReport]]) -> Figure | None:
    """For every block a marker per method at the median layer, on a line from the least to the largest."""
    blocks = _blocks(reports)
    if not blocks:
        return None
    figure, (axes,) = _paper(1.2 + len(blocks) * (0.16 + 0.12 * len(reports)))
    for k, method in enumerate(reports):
        offset = (k + 1) / (len(reports) + 1) - 0.5
        points: list[tuple[float, float]] = []
        for place, of in enumerate(blocks.values()):
            found = [max(report.residual, _LEAST) for report in of[method] if report.residual is not None]
            if found:
                axes.hlines(place + offset, min(found), max(found), _COLOURS[k], linewidth=1.2)
                points.append((median(found), place + offset))
        if points:
            axes.plot(*zip(*points, strict=True), _MARKERS[k], color=_COLOURS[k], label=_title(method))
    _named_blocks(axes, list(blocks))
    for place in range(1, len(blocks)):
        axes.axhline(place - 0.5, color=_PALE, linewidth=0.7, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.supxlabel(_FORMULAE["residual"], fontsize=9, color=_INK)
    return _titled(figure, axes, "residual")


def _named_blocks(axes: Axes, blocks: Sequence[str]) -> None:
    """Name the blocks beside the y axis, the first on top."""
    axes.set_yticks(range(len(blocks)), [_short(block) for block in blocks])
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _balance(reports: Mapping[str, Sequence[LayerReport]], concepts: Sequence[str]) -> Figure | None:
    """For every block a bar, in parts as the concepts share the misfit; a panel per method."""
    blocks = _blocks(reports)
    if not blocks:
        return None
    figure, panels = _paper(1.5 + 0.3 * len(blocks), len(reports))
    for axes, method in zip(panels, reports, strict=True):
        parts = [shares(of[method], concepts) for of in blocks.values()]
        floor = [0.0] * len(parts)
        for n, concept in enumerate(concepts):
            widths = [part.get(concept, 0.0) for part in parts]
            axes.barh(
                range(len(parts)),
                widths,
                0.72,
                floor,
                color=_FILLS[n],
                hatch=_HATCHES[n],
                edgecolor=_INK,
                linewidth=0.8,
                clip_on=False,
                label=_label(concept),
            )
            floor = [low + width for low, width in zip(floor, widths, strict=True)]
        axes.set_title(_title(method), fontsize=9.5, loc="left", color=_INK)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        _named_blocks(axes, list(blocks))
    figure.supxlabel(_FORMULAE["balance"], fontsize=9, color=_INK)
    return _titled(figure, panels[0], "balance")


def _change(changes: Sequence[Change]) -> Figure | None:
    """The median and the largest change per iteration, on a logarithmic scale; what is zero is not on it."""
    told = {
        "largest of all layers": [change.largest for change in changes],
        "median layer": [change.median for change in changes],
    }
    if not any(value > 0 for values in told.values() for value in values):
        return None
    figure, (axes,) = _paper(3.4)
    for k, (label, values) in enumerate(told.items()):
        points = [(iteration, value) for iteration, value in enumerate(values, start=1) if value > 0]
        if points:
            _line(axes, points, k, label)
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(changes) + 1))
    axes.set_xlabel("iteration", fontsize=9, color=_INK)
    axes.set_title(_FORMULAE["change"], fontsize=9, loc="left", color=_INK)
    return _titled(figure, axes, "change")
