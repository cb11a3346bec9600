"""`bench`: how fast and how well, measured against other ways."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from iteris_sd import checkpoints
from iteris_sd.cli import asking, printing
from iteris_sd.cli.options import AsJson, Samples
from iteris_sd.cli.running import answering, watched
from iteris_sd.merging import registry

bench = typer.Typer(help="How fast and how well, measured against other ways.", no_args_is_help=True)


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
    with answering():
        from iteris_sd.benchmarks import merging

        size = merging.on_this_machine(scope, samples, rank)
        if growing:
            steps = merging.growth(size, alpha)
            if as_json:
                printing.as_json([asdict(step) for step in steps])
            else:
                printing.growth(steps)
            return
        result = merging.run(size, alpha)
        if as_json:
            printing.as_json(merging.described(result))
            return
        printing.measured(merging.lines(result))


@bench.command(name="render")
def bench_render(as_json: AsJson = False) -> None:
    """Draw with several random LoRAs in Stable Diffusion v1.5's shapes, here and by the plain diffusers loop."""
    with answering():
        from iteris_sd.benchmarks import rendering

        result = rendering.run(rendering.on_this_machine())
        if as_json:
            printing.as_json(rendering.described(result))
            return
        printing.measured(rendering.lines(result))


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
        Path | None, typer.Option("--csv", help="Also write the scores of every picture here, as they come.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compose every pair of concepts by several methods, and score them: means over pairs, with 95 % intervals."""
    with answering():
        from iteris_sd import export
        from iteris_sd.benchmarks import composing

        if table is not None:
            export.check_folder(table.parent)
        library, base = asking.at_hand(), checkpoints.opened(base).name
        job = composing.job(library, base, names or [], asking.words(methods), prompts, seeds)
        keep = None if table is None else composing.table(table)
        made = composing.figures(watched(composing.shots(job, library, keep)))
        if as_json:
            printing.as_json(composing.described(job, made))
        else:
            printing.alignments(composing.rows(made), [*composing.MEASURES.values()])
