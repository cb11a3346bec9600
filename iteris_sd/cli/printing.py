"""Results as tables, and as JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iteris_sd.recipe import title

if TYPE_CHECKING:
    from iteris_sd.benchmarks.merging import Step
    from iteris_sd.events import Composition
    from iteris_sd.inspecting import Description, Overlap
    from iteris_sd.intervals import Paired, Row


def measured(lines: Sequence[tuple[str, str]]) -> None:
    """What was measured, and what came out."""
    table = columns("What", "Measured")
    for name, value in lines:
        table.add_row(name, value)
    Console().print(table)


def scores(made: Composition) -> None:
    """The summary by method and, under it, how methods differ from the linear average on the same seeds."""
    from iteris_sd import intervals

    rows = intervals.summarise(made.pictures)
    if not rows:
        typer.echo(f"No picture was scored; the scorer was {made.scorer.rstrip('.')}.")
        return
    by_method(rows)
    typer.echo(f"Means ± 95 % intervals over seeds; text and image alignment by {made.scorer}.")
    differences = intervals.paired(made.pictures, intervals.BASELINE)
    if differences:
        by_method(differences, "+")
        typer.echo(f"Differences to {title(intervals.BASELINE)} on the same seeds: means ± 95 % intervals.")


def columns(*headers: str, **options: Any) -> Table:
    """A table that cuts nothing off, however narrow the terminal: what its first column names, people type."""
    table = Table(**options)
    for place, header in enumerate(headers):
        table.add_column(header, no_wrap=place == 0, overflow="fold")
    return table


def by_method(rows: Sequence[Row] | Sequence[Paired], sign: str = "") -> None:
    """A line per method, a column per measure; of crops only the least, since there is little room."""
    every = dict.fromkeys(row.measure for row in rows)
    measures = [name for name in every if name != "text_cosine" and not name.startswith("crop:")]
    table = columns("Method", "n", *(escape(measure.removeprefix("image:")) for measure in measures))
    for column in dict.fromkeys(row.method for row in rows):
        own = {row.measure: row for row in rows if row.method == column}
        cells = [_with_interval(own[measure], sign) if measure in own else "" for measure in measures]
        table.add_row(escape(title(column)), str(own["text"].n), *cells)
    Console().print(table)


def alignments(rows: Sequence[Sequence[str]], measures: Sequence[str]) -> None:
    """A row for each method, a column for each of the measures."""
    table = columns(
        "Method",
        *measures,
        title="Alignment, in brackets what is more than the linear average's, with 95 % interval",
    )
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def growth(steps: Sequence[Step]) -> None:
    """What a sweep takes, by samples and concepts."""
    table = columns("Samples", "Concepts", "Sweep", "It held", "Its peak memory", "Peak of iterations")
    for step in steps:
        sizes = (step.frontier, step.sweep_memory, step.iterations_memory)
        mib = [f"{size / 2**20:.0f} MiB" for size in sizes]
        table.add_row(str(step.samples), str(step.concepts), f"{step.sweep:.2f} s", *mib)
    Console().print(table)


def description(found: Description) -> None:
    """What a LoRA touches, and how strongly."""
    table = columns("File", escape(found.file))
    table.add_row("Format", found.format)
    table.add_row("Base family", found.family)
    for component, part in found.parts.items():
        ranks = ", ".join(map(str, part.ranks))
        table.add_row(component, f"{part.layers} layers, rank {ranks}")
    tokens = [f"{token} ({count} vectors)" if count > 1 else token for token, count in found.tokens.items()]
    table.add_row("Tokens in it", escape(", ".join(tokens)) or "none")
    for block, norm in found.blocks.items():
        table.add_row(f"‖ΔW‖ {block}", f"{norm:.4g}")
    Console().print(table)


def overlap(one: str, other: str, met: Overlap | None) -> None:
    """How much two LoRAs, of the files so called, meet."""
    if met is None:
        typer.echo(
            f"{one} and {other} touch no layer of one shape together; they cannot get into each other's way."
        )
        return
    table = columns(f"Overlap in {met.layers} layers", "Mean", title=escape(f"{one} and {other}"))
    table.add_row("of the inputs they read (0 to 1)", f"{met.inputs:.3f}, by chance {met.chance:.3f}")
    table.add_row("of the outputs they write (0 to 1)", f"{met.outputs:.3f}")
    table.add_row("largest cosine of a principal angle", f"{met.nearest:.3f}")
    table.add_row("cosine of the weight changes", f"{met.cosine:+.3f}")
    Console().print(table)


def _with_interval(row: Row | Paired, sign: str = "") -> str:
    """The mean and, for several seeds, half the width of its 95 % interval; the sign "+" is shown, too."""
    reach = "" if row.high is None else f" ±{row.high - row.mean:.3f}"
    return f"{row.mean:{sign}.3f}{reach}"


def as_json(value: Any) -> None:
    """The value for programs, in letters that the terminal can show."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not unicode))


def plain(value: Any) -> Any:
    """The value as JSON can say it: an open bound is null, a set is a sorted list."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return None if isinstance(value, float) and math.isinf(value) else value
