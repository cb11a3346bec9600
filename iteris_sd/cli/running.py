"""How commands run: errors as sentences, work behind a progress bar."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iteris_sd import events
from iteris_sd.errors import UserError
from iteris_sd.generators import finish

if TYPE_CHECKING:
    from iteris_sd.events import Event

T = TypeVar("T")


@contextmanager
def answering() -> Iterator[None]:
    """A UserError becomes one sentence and exit code 2; Ctrl-C becomes exit code 130."""
    try:
        yield
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(130) from stop


def watched(work: Generator[Event, None, T]) -> T:
    """Run `work` to its end behind a progress bar and return its result."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("Starting", total=None)

        def show(event: Event) -> None:
            if isinstance(event, events.Progress):
                bar.update(task, description=event.stage, completed=event.done, total=event.total)

        return finish(work, show)
