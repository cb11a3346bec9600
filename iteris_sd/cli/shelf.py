"""`concepts`: those that can be picked, and a person's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from iteris_sd import bases, events
from iteris_sd.cli import asking, printing
from iteris_sd.cli.options import AsJson
from iteris_sd.cli.running import answering, watched
from iteris_sd.concepts import Concept
from iteris_sd.kept import Kept

shelf = typer.Typer(help="List the concepts that can be picked; add, change, take away and remove your own.")

Name = Annotated[str, typer.Argument(help="The name of one of your own concepts.")]
Title = Annotated[str | None, typer.Option(help="What it is called, for people.")]
Trigger = Annotated[str | None, typer.Option(help="The words it was trained with, such as '<rex> dog'.")]
ClassNoun = Annotated[str | None, typer.Option(help="What kind of thing it is, such as dog.")]
Weight = Annotated[float | None, typer.Option(help="How strongly it is applied unless told.")]
Pictures = Annotated[
    list[Path] | None, typer.Option("--picture", help="A picture of it to score against, repeatable.")
]
Tokens = Annotated[
    list[Path] | None,
    typer.Option(
        "--token", metavar="FILE", help="A file of learned tokens (textual inversion) of it, repeatable."
    ),
]


@shelf.callback(invoke_without_command=True)
def concepts(context: typer.Context, as_json: AsJson = False) -> None:
    """List the concepts that can be picked; add, change, take away and remove your own."""
    if context.invoked_subcommand is not None:
        return
    with answering():
        found = asking.at_hand().concepts.values()
        if as_json:
            printing.as_json([concept.described() for concept in found])
            return
        table = printing.columns("Name", "Title", "Trigger", "Class noun", "Base model")
        for one in found:
            table.add_row(*map(escape, (one.name, one.title, one.trigger, one.class_noun, one.base)))
        Console().print(table)
        for folder, problem in Kept.usual().broken.items():
            typer.echo(f"{folder} is left out: {problem}", err=True)


@shelf.command()
def add(
    source: Annotated[
        str,
        typer.Argument(
            help="A LoRA file, a folder, a .zip of either or an exported one, or an id on the Hugging Face Hub: "
            "owner/name[:file]."
        ),
    ],
    title: Title = None,
    trigger: Trigger = None,
    class_noun: ClassNoun = None,
    weight: Weight = None,
    pictures: Pictures = None,
    tokens: Tokens = None,
) -> None:
    """Keep a concept; what is not told is guessed from its file."""
    with answering():
        from iteris_sd import bringing, hub

        file, own, more = Path(source), tokens or [], _said(title, trigger, class_noun, weight)
        if not file.exists() and (id := hub.parse(source)) is not None:
            file, found, revision = watched(events.downloading(hub.fetch_lora(id), source))
            own, more = [*found, *own], {"origin": str(id), "revision": revision, **more}
        _tell(bringing.keep(Kept.usual(), [file], references=pictures or [], tokens=own, **more))


@shelf.command()
def edit(
    name: Name,
    title: Title = None,
    trigger: Trigger = None,
    class_noun: ClassNoun = None,
    weight: Weight = None,
    pictures: Pictures = None,
    tokens: Tokens = None,
) -> None:
    """Change what is said of a concept; new pictures take the place of the old ones, tokens are added."""
    with answering():
        said = _said(title, trigger, class_noun, weight)
        _tell(Kept.usual().edit(name, references=pictures or None, tokens=tokens or [], **said))


@shelf.command()
def remove(name: Name) -> None:
    """Remove one of your own concepts."""
    with answering():
        Kept.usual().remove(name)
        typer.echo(f"Removed {name}.")


@shelf.command("export")
def take_away(name: Name, file: Annotated[Path, typer.Argument(help="The .zip to write.")]) -> None:
    """Write one of your own concepts as one zip; `concepts add` brings it back."""
    with answering():
        Kept.usual().export_zip(name, file)
        typer.echo(f"Written: {file}")


def _said(
    title: str | None, trigger: str | None, class_noun: str | None, weight: float | None
) -> dict[str, Any]:
    words = {"title": title, "trigger": trigger, "class_noun": class_noun, "weight": weight}
    return {word: value for word, value in words.items() if value is not None}


def _tell(concept: Concept) -> None:
    typer.echo(
        f"Kept {concept.name}: trigger {concept.trigger!r}, class noun {concept.class_noun!r}, for "
        f"{bases.find(concept.base).title}."
    )
