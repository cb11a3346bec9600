"""`methods` and `inspect`: what there is to merge by, and what is in a LoRA."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from iteris_sd.cli import printing
from iteris_sd.cli.options import AsJson
from iteris_sd.cli.running import answering
from iteris_sd.merging import registry
from iteris_sd.recipe import ALONE_COLUMN, BASE_COLUMN


def methods(as_json: AsJson = False) -> None:
    """List the merging methods and their parameters. `base` and `alone` are columns to compare them with."""
    if as_json:
        printing.as_json([printing.plain(asdict(method)) for method in registry.METHODS.values()])
        return
    table = printing.columns("Name", "What it does", "Parameters (default)", show_lines=True)
    table.add_row(BASE_COLUMN, "No LoRA at all: a reference column.", "")
    table.add_row(ALONE_COLUMN, "Each concept's own LoRA and nobody else's: a reference column for each.", "")
    for method in registry.METHODS.values():
        dials = [f"{method.name}.{p.name} ({p.default}): {p.help}" for p in method.parameters]
        table.add_row(method.name, escape(f"{method.description} {method.paper}."), escape("\n".join(dials)))
    Console().print(table)


def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA file.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second one: how much the two meet in the layers both touch.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a LoRA touches, how strongly, and how much it overlaps with a second one."""
    with answering():
        from iteris_sd import formats, inspecting

        found = inspecting.describe(file)
        met = None
        if other is not None:
            met = inspecting.overlap(formats.read(file).lora, formats.read(other).lora)
        if as_json:
            printing.as_json({**asdict(found), "overlap": None if met is None else asdict(met)})
            return
        printing.description(found)
        if other is not None:
            printing.overlap(str(file), str(other), met)
