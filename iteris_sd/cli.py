"""The terminal: the same verbs as the page. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from iteris_sd import bases, checkpoints, events
from iteris_sd.concepts import Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.kept import Kept
from iteris_sd.merging import registry
from iteris_sd.recipe import ALONE_COLUMN, BASE_COLUMN, Recipe, Sampler, title

if TYPE_CHECKING:
    from iteris_sd.benchmarks.merging import Step
    from iteris_sd.events import Composition, Event
    from iteris_sd.inspecting import Description, Overlap
    from iteris_sd.scoring import Paired, Row

T = TypeVar("T")
N = TypeVar("N", int, float)

app = typer.Typer(
    help="Several concept LoRAs in one picture: merge them, draw, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Concepts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONCEPTS...",
        help="Names (`concepts` lists them), concept folders, LoRA files, or ids on the Hub: owner/name[:file].",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help=f"The base model: {', '.join([*bases.BASES, *bases.ALLOWED])}, or the path of a diffusers folder or a "
        "single-file checkpoint made from Stable Diffusion 1."
    ),
]
Weights = Annotated[str | None, typer.Option(help="How strongly each concept is applied: 1,0.8.")]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="METHOD.NAME=VALUE",
        help="A parameter of a method, repeatable; `methods` lists them.",
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration samples per concept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


shelf = typer.Typer(help="List the concepts that can be picked; add, change, take away and remove your own.")
app.add_typer(shelf, name="concepts")

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
    with _answering():
        found = _at_hand().concepts.values()
        if as_json:
            _print_json([concept.described() for concept in found])
            return
        table = _table("Name", "Title", "Trigger", "Class noun", "Base model")
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
    with _answering():
        from iteris_sd import bringing, hub

        file, own, more = Path(source), tokens or [], _said(title, trigger, class_noun, weight)
        if not file.exists() and (id := hub.parse(source)) is not None:
            file, found, revision = _watched(events.downloading(hub.fetch_lora(id), source))
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
    with _answering():
        said = _said(title, trigger, class_noun, weight)
        _tell(Kept.usual().edit(name, references=pictures or None, tokens=tokens or [], **said))


@shelf.command()
def remove(name: Name) -> None:
    """Remove one of your own concepts."""
    with _answering():
        Kept.usual().remove(name)
        typer.echo(f"Removed {name}.")


@shelf.command("export")
def take_away(name: Name, file: Annotated[Path, typer.Argument(help="The .zip to write.")]) -> None:
    """Write one of your own concepts as one zip; `concepts add` brings it back."""
    with _answering():
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


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the merging methods and their parameters. `base` and `alone` are columns to compare them with."""
    if as_json:
        _print_json([_plain(asdict(method)) for method in registry.METHODS.values()])
        return
    table = _table("Name", "What it does", "Parameters (default)", show_lines=True)
    table.add_row(BASE_COLUMN, "No LoRA at all: a reference column.", "")
    table.add_row(ALONE_COLUMN, "Each concept's own LoRA and nobody else's: a reference column for each.", "")
    for method in registry.METHODS.values():
        dials = [f"{method.name}.{p.name} ({p.default}): {p.help}" for p in method.parameters]
        table.add_row(method.name, escape(f"{method.description} {method.paper}."), escape("\n".join(dials)))
    Console().print(table)


@app.command()
def compose(
    names: Concepts = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to draw; {0}, {1} … stand for the concepts in the order given.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Columns of the grid: base,alone,linear,iteris.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Rows of the grid: 0,1,2,3.")] = None,
    output: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("out"),
    negative: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How strongly the prompt is followed; 1: no guidance.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(get_args(Sampler))}.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; the base model's own unless given.")
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(help="Which layer of the text encoder is read: 1 the last, 2 the one before …"),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="Who scores: storybook, vit-l-14 or none; the base model's own scorer unless given."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How strongly merged adapters are applied while drawing.")
    ] = None,
    retention: Annotated[
        int | None,
        typer.Option(
            help="Of so many seeds, also draw each concept alone: by its own LoRA, and by each merged one."
        ),
    ] = None,
    base: BaseModel = None,
    weights: Weights = None,
    samples: Samples = None,
    parameters: Parameters = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Repeat a recipe.json; other options change parts of it.")
    ] = None,
) -> None:
    """Merge concepts by several methods, draw the same seeds with each, and score the pictures."""
    with _answering():
        told = _told(recipe, base) if recipe else None
        drawing = {
            "prompt": prompt,
            "negative": negative,
            "seeds": None if seeds is None else _numbers("--seeds", seeds, int),
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "size": size,
            "clip_skip": clip_skip,
            "scorer": scorer,
            "strength": strength,
            "retention": retention,
        }
        columns = None if methods is None else _words(methods)

        def ask(base: str | None) -> Recipe:
            return _recipe(told, names, columns, base, weights, samples, parameters, drawing)

        asked = ask(base)
        from iteris_sd import composer, export

        export.check_folder(output)
        library = _library(asked)
        if told is None:
            asked = _weighed(ask(base or _suiting(asked, library)), library, weights)

        made = _watched(composer.compose(asked, library))
        export.write(made, output)
        _print_scores(made)
        typer.echo(f"Written to {output}.")


@app.command()
def merge(
    names: Concepts,
    output: Annotated[
        Path,
        typer.Option(help="The LoRA file to write, a folder for PEFT's layout; learned tokens go beside it."),
    ],
    method: Annotated[str, typer.Option(help=f"{', '.join(registry.METHODS)}.")] = "iteris",
    base: BaseModel = None,
    weights: Weights = None,
    samples: Samples = None,
    unconditional: Annotated[
        int | None,
        typer.Option(help="Samples more per concept with the empty prompt, which guidance runs, too."),
    ] = None,
    tokens_per_sample: Annotated[
        int | None, typer.Option(help="Of each picture's places, look at so many only; all unless given.")
    ] = None,
    diagnostics: Annotated[
        Path | None, typer.Option(help="A folder for layers.csv and figures: how well each layer was merged.")
    ] = None,
    parameters: Parameters = None,
    layout: Annotated[
        str, typer.Option(help="diffusers (also ComfyUI), kohya (A1111, Forge, ComfyUI) or peft.")
    ] = "diffusers",
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or bf16; fp32 unless given."),
    ] = None,
    bundle_tokens: Annotated[
        bool, typer.Option("--bundle-tokens", help="Put learned tokens into the file; kohya's layout only.")
    ] = False,
) -> None:
    """Merge concepts into one LoRA that other tools load."""
    with _answering():
        registry.find(method)
        words = {"prompt": "a picture"}  # a recipe has a prompt, which the merge does not depend on
        seen = {"unconditional": unconditional, "tokens_per_sample": tokens_per_sample}

        def ask(base: str | None) -> Recipe:
            return _seeing(_recipe(None, names, [method], base, weights, samples, parameters, words), seen)

        asked = ask(base)
        from iteris_sd import export, merger

        form = export.Form(layout, precision, bundle_tokens)
        export.check_lora_path(output, form)
        if diagnostics is not None:
            export.check_folder(diagnostics)
        library = _library(asked)
        asked = _weighed(ask(base or _suiting(asked, library)), library, weights)
        picked, merged = _watched(merger.merge_all(asked, library, measured=diagnostics is not None))
        metadata = export.lora_metadata(asked, picked, merged[method])
        files = export.write_lora(merged[method].lora, merger.all_tokens(picked), output, metadata, form)
        if diagnostics is not None:
            files += export.write_diagnostics(merged[method], asked, diagnostics)
        for file in files:
            typer.echo(f"Written: {file}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA file.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second one: how much the two meet in the layers both touch.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a LoRA touches, how strongly, and how much it overlaps with a second one."""
    with _answering():
        from iteris_sd import formats, inspecting

        found = inspecting.describe(file)
        met = None
        if other is not None:
            met = inspecting.overlap(formats.read(file).lora, formats.read(other).lora)
        if as_json:
            _print_json({**asdict(found), "overlap": None if met is None else asdict(met)})
            return
        _print_description(found)
        if other is not None:
            _print_overlap(str(file), str(other), met)


bench = typer.Typer(help="How fast and how well, measured against other ways.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command(name="merge")
def bench_merge(
    scope: Annotated[
        str, typer.Option(help="text: text encoder and cross-attention K/V; everything: the U-Net, too.")
    ] = "text",
    samples: Samples = None,
    rank: Annotated[int, typer.Option(help="Rank of each of the two LoRAs.", min=1)] = 32,
    alpha: Annotated[float, typer.Option(help="Regularisation of all ways.", min=0.0, max=1.0)] = 1e-4,
    growing: Annotated[
        bool, typer.Option("--growth", help="Instead: how ours grows with samples and concepts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge random LoRAs in Stable Diffusion v1.5's shapes by IterIS, here and as its authors' code does it."""
    with _answering():
        from iteris_sd.benchmarks import merging

        size = merging.on_this_machine(scope, samples, rank)
        if growing:
            _print_growth(merging.growth(size, alpha), as_json)
            return
        result = merging.run(size, alpha)
        if as_json:
            _print_json(merging.described(result))
            return
        _print_measured(merging.lines(result))


@bench.command(name="render")
def bench_render(as_json: AsJson = False) -> None:
    """Draw with several random LoRAs in Stable Diffusion v1.5's shapes, here and by the plain diffusers loop."""
    with _answering():
        from iteris_sd.benchmarks import rendering

        result = rendering.run(rendering.on_this_machine())
        if as_json:
            _print_json(rendering.described(result))
            return
        _print_measured(rendering.lines(result))


@bench.command(name="compose")
def bench_compose(
    names: Annotated[
        list[str] | None, typer.Argument(help="Concepts by name; all of the base model unless given.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Merging methods, beside the linear average.")] = ",".join(
        registry.METHODS
    ),
    base: Annotated[str, typer.Option(help="The base model, by name or path.")] = "storybook",
    prompts: Annotated[int, typer.Option(help="Prompts for each pair.", min=1)] = 4,
    seeds: Annotated[int, typer.Option(help="Seeds for each prompt.", min=1)] = 1,
    table: Annotated[
        Path | None, typer.Option("--csv", help="Also write the scores of every picture here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compose every pair of concepts by several methods, and score them: means over pairs, with 95 % intervals."""
    with _answering():
        from iteris_sd import export
        from iteris_sd.benchmarks import composing

        if table is not None:
            export.check_folder(table.parent)
        library, base = _at_hand(), checkpoints.opened(base).name
        job = composing.job(library, base, names or [], _words(methods), prompts, seeds)
        found = _watched(composing.shots(job, library))
        made = composing.figures(found)
        if as_json:
            _print_json(composing.described(job, made))
        else:
            _print_alignments(composing.rows(made), [*composing.MEASURES.values()])
        if table is not None:
            composing.write_csv(found, table)


@app.command(name="app")
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
    with _answering():
        from iteris_sd import ui

        ui.launch(host=host, port=port, share=share, mcp=mcp, base=None if base is None else _offered(base))


@contextmanager
def _answering() -> Iterator[None]:
    """A UserError becomes one sentence and exit code 2; Ctrl-C becomes exit code 130."""
    try:
        yield
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(130) from stop


def _watched(work: Generator[Event, None, T]) -> T:
    """Run `work` to its end behind a progress bar and return its result."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with closing(work), bar:
        task = bar.add_task("Starting", total=None)
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(event, events.Progress):
                bar.update(task, description=event.stage, completed=event.done, total=event.total)


def _told(path: Path, base: str | None) -> Recipe:
    """A recipe from a file, with the base model that was given instead of its own; either may be at a path."""
    data = Recipe.data(path)
    if isinstance(meant := base or data.get("base"), str):
        try:
            data["base"] = checkpoints.opened(meant).name
        except UserError as error:
            if base:
                raise
            raise UserError(
                f"{error} If the recipe was made with a model at a path, say --base and that path."
            ) from error
    return Recipe.of(data)


def _offered(text: str) -> str:
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


def _library(recipe: Recipe) -> Library:
    """The concepts at hand, and those that the recipe names by a path or an id on the Hub, which are fetched."""
    from iteris_sd import adding

    work = adding.opening(_at_hand(), [use.name for use in recipe.concepts])
    return _watched(events.downloading(work, "a LoRA"))


def _at_hand() -> Library:
    return Kept.usual().library().joined(Library.shipped())


def _suiting(recipe: Recipe, library: Library) -> str | None:
    """The base model that all concepts of a recipe were made for; None where they differ."""
    found = {library.find(use.name).base for use in recipe.concepts}
    return found.pop() if len(found) == 1 else None


def _recipe(
    told: Recipe | None,
    names: Sequence[str] | None,
    methods: Sequence[str] | None,
    base: str | None,
    weights: str | None,
    samples: int | None,
    parameters: Sequence[str] | None,
    drawing: Mapping[str, Any],
) -> Recipe:
    """The recipe that was `told`, or the base model's defaults, with what was given put in its place."""
    base = None if base is None else checkpoints.opened(base).name
    data = told.model_dump() if told else _defaults(base)
    data |= {name: value for name, value in {"base": base, **drawing}.items() if value is not None}
    if names:
        data["concepts"] = [{"name": name} for name in names]
    if weights is not None:
        given = _numbers("--weights", weights, float)
        if len(given) != len(data["concepts"]):
            raise UserError(
                f"--weights needs one number per concept, {len(data['concepts'])}, not {len(given)}."
            )
        data["concepts"] = [c | {"weight": w} for c, w in zip(data["concepts"], given, strict=True)]
    if methods is not None:
        known = {use["name"]: use for use in data["methods"]}
        data["methods"] = [known.get(name, {"name": name}) for name in methods]
    if samples is not None:
        data["calibration"] = {**data.get("calibration", {}), "samples": samples}
    for dial in parameters or []:
        data["methods"] = _turned(data["methods"], dial)
    return Recipe.of(data)


def _weighed(recipe: Recipe, library: Library, told: str | None) -> Recipe:
    """The recipe with every concept as strong as it was kept, unless weights were `told`."""
    if told is not None:
        return recipe
    uses = [{"name": use.name, "weight": library.find(use.name).weight} for use in recipe.concepts]
    return Recipe.of({**recipe.model_dump(), "concepts": uses})


def _seeing(recipe: Recipe, seen: Mapping[str, int | None]) -> Recipe:
    """The recipe with those of its calibration's values that were given."""
    given = {name: value for name, value in seen.items() if value is not None}
    data = recipe.model_dump()
    return Recipe.of({**data, "calibration": {**data["calibration"], **given}})


def _defaults(base: str | None) -> dict[str, Any]:
    """A recipe's values where nothing was said."""
    plain = {name: field.default for name, field in Recipe.model_fields.items() if not field.is_required()}
    chosen = bases.find(base or plain["base"])
    methods = [use.model_dump() for use in plain["methods"]]
    own = {
        "steps": chosen.steps,
        "guidance": chosen.guidance,
        "sampler": chosen.sampler,
        "methods": methods,
    }
    return plain | own | {"calibration": plain["calibration"].model_dump(), "concepts": [], "prompt": ""}


def _turned(methods: Sequence[Mapping[str, Any]], dial: str) -> list[dict[str, Any]]:
    """The methods of a recipe with one parameter set, as in `iteris.alpha=1e-5`."""
    place, equals, text = dial.partition("=")
    method, dot, name = place.strip().partition(".")
    if not (equals and dot):
        raise UserError(f"--param takes METHOD.NAME=VALUE, such as iteris.alpha=1e-5, not {dial!r}.")
    if method not in (use["name"] for use in methods):
        raise UserError(
            f"--param {dial} sets a parameter of {method}, which is not among the methods asked for."
        )
    value = registry.find(method).parameter(name).parse(text)
    return [
        {"name": use["name"], "parameters": {**use.get("parameters", {}), name: value}}
        if use["name"] == method
        else dict(use)
        for use in methods
    ]


def _print_measured(lines: Sequence[tuple[str, str]]) -> None:
    table = _table("What", "Measured")
    for name, value in lines:
        table.add_row(name, value)
    Console().print(table)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Numbers with commas between them. Raises UserError naming the option."""
    try:
        return [kind(word) for word in _words(text)]
    except ValueError:
        noun = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} takes {noun} with commas between them, not {text!r}.") from None


def _print_scores(made: Composition) -> None:
    """The summary by method and, under it, how methods differ from the linear average on the same seeds."""
    from iteris_sd import scoring

    rows = scoring.summarise(made.pictures)
    if not rows:
        typer.echo(f"No picture was scored; the scorer was {made.scorer.rstrip('.')}.")
        return
    _print_by_method(rows)
    typer.echo(f"Means ± 95 % intervals over seeds; text and image alignment by {made.scorer}.")
    differences = scoring.paired(made.pictures, scoring.BASELINE)
    if differences:
        _print_by_method(differences, "+")
        typer.echo(f"Differences to {title(scoring.BASELINE)} on the same seeds: means ± 95 % intervals.")


def _table(*headers: str, **options: Any) -> Table:
    """A table that cuts nothing off, however narrow the terminal: what its first column names, people type."""
    table = Table(**options)
    for place, header in enumerate(headers):
        table.add_column(header, no_wrap=place == 0, overflow="fold")
    return table


def _print_by_method(rows: Sequence[Row] | Sequence[Paired], sign: str = "") -> None:
    """A line per method, a column per measure; of crops only the least, since there is little room."""
    every = dict.fromkeys(row.measure for row in rows)
    measures = [name for name in every if name != "text_cosine" and not name.startswith("crop:")]
    table = _table("Method", "n", *(escape(measure.removeprefix("image:")) for measure in measures))
    for column in dict.fromkeys(row.method for row in rows):
        own = {row.measure: row for row in rows if row.method == column}
        cells = [_with_interval(own[measure], sign) if measure in own else "" for measure in measures]
        table.add_row(escape(title(column)), str(own["text"].n), *cells)
    Console().print(table)


def _print_alignments(rows: Sequence[Sequence[str]], measures: Sequence[str]) -> None:
    table = _table(
        "Method",
        *measures,
        title="Alignment, in brackets what is more than the linear average's, with 95 % interval",
    )
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _print_growth(steps: Sequence[Step], as_json: bool) -> None:
    if as_json:
        _print_json([asdict(step) for step in steps])
        return
    table = _table("Samples", "Concepts", "Sweep", "It held", "Its peak memory", "Peak of iterations")
    for step in steps:
        sizes = (step.frontier, step.sweep_memory, step.iterations_memory)
        mib = [f"{size / 2**20:.0f} MiB" for size in sizes]
        table.add_row(str(step.samples), str(step.concepts), f"{step.sweep:.2f} s", *mib)
    Console().print(table)


def _print_description(found: Description) -> None:
    table = _table("File", escape(found.file))
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


def _print_overlap(one: str, other: str, met: Overlap | None) -> None:
    if met is None:
        typer.echo(
            f"{one} and {other} touch no layer of one shape together; they cannot get into each other's way."
        )
        return
    table = _table(f"Overlap in {met.layers} layers", "Mean", title=escape(f"{one} and {other}"))
    table.add_row("of the inputs they read (0 to 1)", f"{met.inputs:.3f}, by chance {met.chance:.3f}")
    table.add_row("of the outputs they write (0 to 1)", f"{met.outputs:.3f}")
    table.add_row("largest cosine of a principal angle", f"{met.nearest:.3f}")
    table.add_row("cosine of the weight changes", f"{met.cosine:+.3f}")
    Console().print(table)


def _with_interval(row: Row | Paired, sign: str = "") -> str:
    """The mean and, for several seeds, half the width of its 95 % interval; the sign "+" is shown, too."""
    reach = "" if row.high is None else f" ±{row.high - row.mean:.3f}"
    return f"{row.mean:{sign}.3f}{reach}"


def _print_json(value: Any) -> None:
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not unicode))


def _plain(value: Any) -> Any:
    """The value as JSON can say it: an open bound is null, a set is a sorted list."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return None if isinstance(value, float) and math.isinf(value) else value
