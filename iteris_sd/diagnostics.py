"""How well a merge went, layer by layer: a table and the three figures that tell most."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from iteris_sd.calibration import LayerReport, Merged

TABLE = "layers.csv"
_COLOURS = ("#0b6e6e", "#c8553d", "#e0a030", "#5b5b9f", "#7a9a3a", "#8a5a44")


def with_measures(merged: Merged, measured: Sequence[LayerReport]) -> Merged:
    """The merge with residual, discrepancy and balance as `calibration.measure` found them: alike for all methods."""
    found = {report.name: report for report in measured}
    reports = [
        replace(
            report,
            site=found[report.name].site,
            rows=found[report.name].rows,
            residual=found[report.name].residual,
            discrepancy=found[report.name].discrepancy,
            balance=found[report.name].balance,
        )
        if report.name in found
        else report
        for report in merged.reports
    ]
    return replace(merged, reports=tuple(reports))


def write(merged: Merged, concepts: Sequence[str], folder: Path) -> list[Path]:
    """Write `layers.csv`, `residual.png`, `discrepancy.png` and `balance.png` into `folder`; return what was written.

    A figure that no layer has a value for is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        rows = [row(report, concepts) for report in merged.reports]
        table = csv.DictWriter(file, list(rows[0]) if rows else ["layer"])
        table.writeheader()
        table.writerows(rows)
    return [folder / TABLE, *_figures(merged, concepts, folder)]


def row(report: LayerReport, concepts: Sequence[str]) -> dict[str, Any]:
    """One layer as a line of the table; what was not measured is empty."""
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


def _figures(merged: Merged, concepts: Sequence[str], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, draw, title in (
        ("residual", _draw_residual, "Relative residual Σλ‖XΔWₙᵀ − X̃ΔWᵀ‖² / Σλ‖XΔWₙᵀ‖²"),
        ("discrepancy", _draw_discrepancy, "Discrepancy of inputs ‖X̃ − X‖ / ‖X‖"),
        ("balance", _draw_balance, "Each concept's share of the residual"),
    ):
        figure, axes = pyplot.subplots(figsize=(9, 3.6))
        if draw(axes, merged.reports, concepts):
            axes.set_title(title, fontsize=11, loc="left")
            axes.set_xlabel("layer, in the order of the LoRAs", fontsize=9)
            axes.margins(x=0.01)
            axes.spines[["top", "right"]].set_visible(False)
            figure.tight_layout()
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def _draw_residual(axes: Axes, reports: Sequence[LayerReport], _: Sequence[str]) -> bool:
    return _dots(axes, reports, [r.residual for r in reports])


def _draw_discrepancy(axes: Axes, reports: Sequence[LayerReport], _: Sequence[str]) -> bool:
    return _dots(axes, reports, [r.discrepancy for r in reports])


def _dots(axes: Axes, reports: Sequence[LayerReport], values: Sequence[float | None]) -> bool:
    """One dot per layer, one colour per component."""
    places: dict[str, list[tuple[int, float]]] = {}
    for k, (report, value) in enumerate(zip(reports, values, strict=True)):
        if value is not None:
            places.setdefault(report.name.partition(".")[0], []).append((k, value))
    for colour, (component, dots) in zip(_COLOURS, places.items(), strict=False):
        axes.plot(*zip(*dots, strict=True), "o", markersize=4, color=colour, label=component)
    axes.set_ylim(bottom=0)
    if places:
        _legend(axes)
    return bool(places)


def _legend(axes: Axes) -> None:
    """Beside the title, where nothing is drawn."""
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=6)


def _draw_balance(axes: Axes, reports: Sequence[LayerReport], concepts: Sequence[str]) -> bool:
    measured = [(k, r) for k, r in enumerate(reports) if sum(r.balance) > 0]
    floor = [0.0] * len(measured)
    for n, name in enumerate(concepts):
        shares = [
            dict(zip(r.participants, r.balance, strict=True)).get(n, 0.0) / sum(r.balance)
            for _, r in measured
        ]
        axes.bar([k for k, _ in measured], shares, 1.0, floor, color=_COLOURS[n % len(_COLOURS)], label=name)
        floor = [low + share for low, share in zip(floor, shares, strict=True)]
    axes.set_ylim(0, 1)
    if measured:
        _legend(axes)
    return bool(measured)
