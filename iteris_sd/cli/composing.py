"""`compose` and `merge`: from concepts to pictures, and to one LoRA."""

from __future__ import annotations

from pathlib import Path

import typer

from iteris_sd.cli import asking, options, printing
from iteris_sd.cli.running import answering, watched
from iteris_sd.merging import registry
from iteris_sd.recipe import Recipe


def compose(
    names: options.Concepts = None,
    prompt: options.Prompt = None,
    methods: options.Columns = None,
    seeds: options.Seeds = None,
    output: options.Output = Path("out"),
    negative: options.Negative = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.SamplerName = None,
    size: options.Size = None,
    clip_skip: options.ClipSkip = None,
    scorer: options.Scorer = None,
    strength: options.Strength = None,
    retention: options.Retention = None,
    base: options.BaseModel = None,
    weights: options.Weights = None,
    samples: options.Samples = None,
    parameters: options.Parameters = None,
    recipe: options.FromRecipe = None,
) -> None:
    """Merge concepts by several methods, draw the same seeds with each, and score the pictures."""
    with answering():
        told = asking.told(recipe, base) if recipe else None
        drawing = {
            "prompt": prompt,
            "negative": negative,
            "seeds": None if seeds is None else asking.numbers("--seeds", seeds, int),
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "size": size,
            "clip_skip": clip_skip,
            "scorer": scorer,
            "strength": strength,
            "retention": retention,
        }
        columns = None if methods is None else asking.words(methods)

        def ask(base: str | None) -> Recipe:
            return asking.recipe(told, names, columns, base, weights, samples, parameters, drawing)

        asked = ask(base)
        from iteris_sd import composer, export

        export.check_folder(output)
        library = asking.library(asked)
        if told is None:
            asked = asking.weighed(ask(base or asking.suiting(asked, library)), library, weights)

        made = watched(composer.compose(asked, library))
        export.write(made, output)
        printing.scores(made)
        typer.echo(f"Written to {output}.")


def merge(
    names: options.Concepts,
    output: options.LoraOutput,
    method: options.Method = "iteris",
    base: options.BaseModel = None,
    weights: options.Weights = None,
    samples: options.Samples = None,
    unconditional: options.Unconditional = None,
    tokens_per_sample: options.TokensPerSample = None,
    diagnostics: options.Diagnostics = None,
    parameters: options.Parameters = None,
    layout: options.Layout = "diffusers",
    precision: options.Precision = None,
    bundle_tokens: options.BundleTokens = False,
) -> None:
    """Merge concepts into one LoRA that other tools load."""
    with answering():
        registry.find(method)
        words = {"prompt": "a picture"}  # a recipe has a prompt, which the merge does not depend on
        seen = {"unconditional": unconditional, "tokens_per_sample": tokens_per_sample}

        def ask(base: str | None) -> Recipe:
            return asking.seeing(
                asking.recipe(None, names, [method], base, weights, samples, parameters, words), seen
            )

        asked = ask(base)
        from iteris_sd import export, merger

        form = export.Form(layout, precision, bundle_tokens)
        export.check_lora_path(output, form)
        if diagnostics is not None:
            export.check_folder(diagnostics)
        library = asking.library(asked)
        asked = asking.weighed(ask(base or asking.suiting(asked, library)), library, weights)
        picked, merged = watched(merger.merge_all(asked, library, measured=diagnostics is not None))
        metadata = export.lora_metadata(asked, picked, merged[method])
        files = export.write_lora(merged[method].lora, merger.all_tokens(picked), output, metadata, form)
        if diagnostics is not None:
            files += export.write_diagnostics(merged[method], asked, diagnostics)
        for file in files:
            typer.echo(f"Written: {file}")
