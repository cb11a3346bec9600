"""Train Storybook from nothing: `python -m iteris_sd.storybook.train --stage vae|unet|clip|concepts|all`.

Each stage resumes from its checkpoint under `--runs`, and writes its averaged weights, in fp16, to `--assets`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"
STAGES = ("vae", "unet", "clip", "concepts")


def stage(name: str) -> Callable[..., None]:
    """The training function of a stage; each stands in a file of its own."""
    train: Callable[..., None] = import_module(f"iteris_sd.storybook.train_{name}").train
    return train


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/storybook"), help="checkpoints, logs, sample sheets"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the finished weights go")
    parser.add_argument("--scenes", type=int, default=24_000, help="how many scenes to draw and learn from")
    parser.add_argument("--steps", type=int, help="steps of the stage, instead of its own number")
    options = parser.parse_args()
    for name in STAGES if options.stage == "all" else (options.stage,):
        chosen = {} if options.steps is None else {"steps": options.steps}
        stage(name)(options.runs, options.assets, options.scenes, **chosen)


if __name__ == "__main__":
    main()
