"""`app`: the page for browsers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from iteris_sd import bases, checkpoints
from iteris_sd.cli.running import answering


def page(
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model that the page begins with: a name, or the path of a diffusers folder or a single-file "
            "checkpoint, which it offers by that file's name."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on.", min=1, max=65535)] = None,
    share: Annotated[bool, typer.Option("--share", help="Also open a public link.")] = False,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also serve compose and merge as tools for language models (MCP).")
    ] = False,
) -> None:
    """Open the page for browsers."""
    with answering():
        from iteris_sd import ui

        ui.launch(host=host, port=port, share=share, mcp=mcp, base=None if base is None else offered(base))


def offered(text: str) -> str:
    """The name that a page has for the base model that is meant; of one at a path it tells nobody where that is."""
    found = checkpoints.opened(text)
    if not Path(found.name).is_absolute():
        return found.name
    del bases.BASES[found.name]
    name = Path(found.name).name
    while name in bases.BASES or name in bases.ALLOWED:
        name += " (another)"
    bases.add(replace(found, name=name))
    return name
