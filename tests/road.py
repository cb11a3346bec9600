"""The whole road on Stable Diffusion v1.5's true shapes with random weights, in a process of its own.

`python -m tests.road FOLDER LORA LORA` prints JSON: what was found, and the process's peak memory in bytes.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from iteris_sd import adding, checkpoints, composer, export, formats, merger, sd15
from iteris_sd.calibration import finish
from iteris_sd.concepts import Library
from iteris_sd.events import Composition
from iteris_sd.recipe import Recipe


def saved_model(folder: Path) -> None:
    """A random Stable Diffusion v1.5 in diffusers' layout, in halves, as the Hub has it."""
    pipeline = sd15.random_pipeline().to(torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", safe_serialization=True)


def recipe(base: str, names: list[str], method: str) -> Recipe:
    """Two prompts at two timesteps per concept; two steps of 256 px."""
    return Recipe.of(
        {
            "base": base,
            "concepts": [{"name": name} for name in names],
            "prompt": " next to ".join(f"a (({{{k}}}):1.1)" for k in range(len(names))),
            "methods": [{"name": method}],
            "seeds": [0],
            "sampler": "dpm++",
            "steps": 2,
            "guidance": 7.5,
            "size": 256,
            "scorer": "storybook",
            "calibration": {"samples": 4, "steps": 2},
        }
    )


def walk(folder: Path, files: list[str]) -> dict[str, Any]:
    """Read, calibrate, merge, write as kohya does, read again, draw, score."""
    base = checkpoints.opened(str(folder / "model")).name
    asked = recipe(base, files, "iteris")
    library = finish(adding.opening(Library.shipped(), files))
    picked, merged = finish(merger.merge_all(asked, library))
    made = merged["iteris"]
    path = folder / "merged.safetensors"
    tokens = merger.all_tokens(picked)
    metadata = export.lora_metadata(asked, picked, made)
    export.write_lora(made.lora, tokens, path, metadata, export.Form("kohya"))
    again = formats.read(path)
    apart = max(
        float((adapter.delta() - again.lora[name].delta()).norm() / adapter.delta().norm().clamp_min(1e-30))
        for name, adapter in made.lora.items()
    )
    library = finish(adding.opening(Library.shipped(), [str(path)]))
    drawn: Composition = finish(composer.compose(recipe(base, [str(path)], "linear"), library))
    return {
        "layers": len(made.lora),
        "read again": len(again.lora),
        "apart": apart,
        "residual": max(report.residual or 0.0 for report in made.reports),
        "size": drawn.pictures[0].image.size,
        "text": drawn.pictures[0].score.text_cosine,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    print(json.dumps(walk(Path(sys.argv[1]), sys.argv[2:])))
