"""The terminal: the same verbs as the page, a file for each group. Nothing heavy is imported before it is needed."""

import typer

from iteris_sd.cli import composing, looking, page
from iteris_sd.cli.bench import bench
from iteris_sd.cli.shelf import shelf

app = typer.Typer(
    help="Several concept LoRAs in one picture: merge them, draw, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shelf, name="concepts")
for command in (looking.methods, composing.compose, composing.merge, looking.inspect):
    app.command()(command)
app.add_typer(bench, name="bench")
app.command(name="app")(page.page)
