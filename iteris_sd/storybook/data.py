"""The training set: scenes drawn once into a memory-mapped file, and the captions that go with them."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from iteris_sd.storybook import world

CAPTIONS_PER_SCENE = 5  # the first says all there is to say
HELD_OUT = 10_000_000  # scenes drawn from seeds from here on are never trained on
_CHUNK = 500


def scene_captions(scene: world.Scene, seed: int) -> list[str]:
    """A few wordings of one scene, always the same for the same seed."""
    rng = np.random.default_rng((seed, 1))
    return [world.caption(scene, rng, full=k == 0) for k in range(CAPTIONS_PER_SCENE)]


def _draw_chunk(seeds: range) -> np.ndarray:
    return np.stack([np.asarray(world.draw(world.sample(seed))) for seed in seeds])


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes: `pixels` (n, 128, 128, 3) uint8 on disk, scene k drawn from seed `first + k`."""

    pixels: np.ndarray
    first: int

    def __len__(self) -> int:
        return len(self.pixels)

    def pick(self, count: int, rng: torch.Generator) -> tuple[list[int], np.ndarray]:
        """`count` random scenes: their indices and pixels (count, 128, 128, 3) uint8."""
        indices = sorted(torch.randint(len(self), (count,), generator=rng).tolist())
        return indices, self.pixels[indices]

    def captions(self) -> list[list[str]]:
        """All wordings of all scenes, `CAPTIONS_PER_SCENE` for each."""
        return [
            scene_captions(world.sample(seed), seed) for seed in range(self.first, self.first + len(self))
        ]


def drawn(directory: Path, count: int, first: int = 0, workers: int = 2) -> Scenes:
    """Draw scenes `first … first + count - 1` into `directory`, or open them if they are already there."""
    path = directory / f"scenes_{first}_{count}.npy"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        size = count * world.CANVAS**2 * 3 / 1e9
        print(f"Drawing {count:,} scenes ({size:.2g} GB), once, into {path}", flush=True)
        pixels = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.uint8, shape=(count, world.CANVAS, world.CANVAS, 3)
        )
        chunks = [range(k, min(k + _CHUNK, first + count)) for k in range(first, first + count, _CHUNK)]
        with ProcessPoolExecutor(workers) as pool:
            for seeds, block in zip(chunks, pool.map(_draw_chunk, chunks), strict=True):
                pixels[seeds.start - first : seeds.stop - first] = block
        pixels.flush()
        del pixels  # Windows renames no file that is mapped
        partial.rename(path)
    return Scenes(np.load(path, mmap_mode="r"), first)
