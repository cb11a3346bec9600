"""Options that several commands have, or that would hide what their command does."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from iteris_sd import bases
from iteris_sd.merging import registry
from iteris_sd.recipe import Sampler

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

# ---------------------------------------------------------------- of compose and merge

Prompt = Annotated[
    str | None, typer.Option(help="What to draw; {0}, {1} … stand for the concepts in the order given.")
]
Columns = Annotated[str | None, typer.Option(help="Columns of the grid: base,alone,linear,iteris.")]
Seeds = Annotated[str | None, typer.Option(help="Rows of the grid: 0,1,2,3.")]
Output = Annotated[Path, typer.Option(help="The folder to write to.")]
Negative = Annotated[str | None, typer.Option(help="What the picture should not show.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="How strongly the prompt is followed; 1: no guidance.")]
SamplerName = Annotated[str | None, typer.Option(help=f"{', '.join(get_args(Sampler))}.")]
Size = Annotated[
    int | None, typer.Option(help="Side of the pictures in pixels; the base model's own unless given.")
]
ClipSkip = Annotated[
    int | None,
    typer.Option(help="Which layer of the text encoder is read: 1 the last, 2 the one before …"),
]
Scorer = Annotated[
    str | None,
    typer.Option(help="Who scores: storybook, vit-l-14 or none; the base model's own scorer unless given."),
]
Strength = Annotated[
    float | None, typer.Option(help="How strongly merged adapters are applied while drawing.")
]
Retention = Annotated[
    int | None,
    typer.Option(
        help="Of so many seeds, also draw each concept alone: by its own LoRA, and by each merged one."
    ),
]
FromRecipe = Annotated[
    Path | None, typer.Option(help="Repeat a recipe.json; other options change parts of it.")
]
LoraOutput = Annotated[
    Path,
    typer.Option(help="The LoRA file to write, a folder for PEFT's layout; learned tokens go beside it."),
]
Method = Annotated[str, typer.Option(help=f"{', '.join(registry.METHODS)}.")]
Unconditional = Annotated[
    int | None,
    typer.Option(help="Samples more per concept with the empty prompt, which guidance runs, too."),
]
TokensPerSample = Annotated[
    int | None, typer.Option(help="Of each picture's places, look at so many only; all unless given.")
]
Diagnostics = Annotated[
    Path | None, typer.Option(help="A folder for layers.csv and figures: how well each layer was merged.")
]
Layout = Annotated[str, typer.Option(help="diffusers (also ComfyUI), kohya (A1111, Forge, ComfyUI) or peft.")]
Precision = Annotated[
    str | None,
    typer.Option(help="fp32, fp16 or bf16; fp32 unless given."),
]
BundleTokens = Annotated[
    bool, typer.Option("--bundle-tokens", help="Put learned tokens into the file; kohya's layout only.")
]
