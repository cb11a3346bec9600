"""Train Storybook from nothing: `python -m iteris_sd.storybook.train --stage vae|clip|unet|oracle|concepts|all`.

Each stage resumes from its checkpoint under `--runs`, and writes its averaged weights, in fp16, to `--assets`; but
`concepts` makes those that are not there yet. It runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from iteris_sd.storybook.machine import here
from iteris_sd.storybook.run import Run

ASSETS = Path(__file__).resolve().parents[2] / "assets"
STAGES = ("vae", "clip", "unet", "oracle", "concepts")


def stage(name: str) -> Callable[[Run], None]:
    """The training function of a stage; each stands in a file of its own."""
    train: Callable[[Run], None] = import_module(f"iteris_sd.storybook.train_{name}").train
    return train


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/storybook"), help="checkpoints, logs, sample sheets"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the finished weights go")
    parser.add_argument("--scenes", type=int, default=60_000, help="how many scenes to draw and learn from")
    parser.add_argument("--steps", type=int, help="steps of the stage, instead of its own number")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--warm", action="store_true", help="start from the weights in --assets")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: two minutes to begin, then faster"
    )
    options = parser.parse_args()
    machine = here(options.precision, options.compile)
    print(machine, flush=True)
    run = Run(
        options.runs,
        options.assets,
        options.scenes,
        machine,
        options.steps,
        options.save_every,
        options.warm,
    )
    try:
        for name in STAGES if options.stage == "all" else (options.stage,):
            stage(name)(run)
    except FileNotFoundError as missing:  # an earlier stage's work; it says which
        parser.exit(2, f"{missing}\n")


if __name__ == "__main__":
    main()
