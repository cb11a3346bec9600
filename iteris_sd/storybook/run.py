"""One training run, as every stage is told of it: where it reads and writes, how much it does, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iteris_sd.storybook.machine import Machine


@dataclass(frozen=True)
class Run:
    """Folders for checkpoints (`runs`) and weights (`assets`), how many scenes, and steps if not the stage's own.

    A checkpoint is written every `save_every` steps. `warm` starts a stage that has no checkpoint from the weights
    in `assets`, with a fresh optimizer.
    """

    runs: Path
    assets: Path
    scenes: int
    machine: Machine
    steps: int | None = None
    save_every: int = 250
    warm: bool = False

    @property
    def storybook(self) -> Path:
        """The diffusers folder."""
        return self.assets / "storybook"
