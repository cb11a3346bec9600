"""`bench render`: pictures per second of several methods by several seeds, here and by the plain diffusers loop.

The plain loop loads each method's LoRA into the pipeline and calls it once for each seed. Both ways draw the same
pictures with the same model, of Stable Diffusion v1.5's shapes and random weights, placed in memory as ours is; all
pictures are drawn by one way, then by the other, twice. The bound is the U-Net alone, with no LoRA, in the batches that
we draw in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from iteris_sd import bases, formats, memory, rendering, sd15
from iteris_sd.backbone import Backbone
from iteris_sd.benchmarks import measuring
from iteris_sd.benchmarks.problems import random_lora
from iteris_sd.generators import finish
from iteris_sd.lora import LoRA

PROMPT, NEGATIVE = "a dog next to a red barn on the beach", "blurry"
ROUNDS = 2


@dataclass(frozen=True)
class Job:
    """What is drawn: so many methods and seeds, denoising steps, pixels; `rank` of each method's LoRA."""

    methods: int = 3
    seeds: int = 4
    steps: int = 20
    size: int = 512
    rank: int = 64
    device: str = "cpu"

    @property
    def pictures(self) -> int:
        """How many pictures that makes."""
        return self.methods * self.seeds


@dataclass(frozen=True)
class Result:
    """Pictures per second: ours, the plain loop's, and as many as the U-Net alone would allow."""

    job: Job
    machine: str
    batch: int
    ours: float
    plain: float
    bound: float


def on_this_machine() -> Job:
    """A real composition where a GPU is present; on a CPU few and small pictures."""
    if torch.cuda.is_available():
        return Job(device="cuda")
    return Job(methods=2, seeds=2, steps=4, size=256)


def run(job: Job, build: Callable[[], StableDiffusionPipeline] = sd15.random_pipeline) -> Result:
    """Measure both ways on the pipeline that `build` makes."""
    transformers.utils.logging.disable_progress_bar()
    pipeline = build()
    if job.device == "cuda":
        pipeline.to(torch.float16)
    memory.place(pipeline, torch.device(job.device))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    backbone = Backbone(bases.BASES["sd15"], pipeline)
    settings = rendering.Settings("dpm++", job.steps, 7.5, job.size)
    touched = {name: layer for name, layer in backbone.layers.items() if "attn" in name}
    loras = [random_lora(touched, job.rank, seed) for seed in range(job.methods)]
    most = rendering.together(backbone, settings)
    parts = list(rendering.batches(job.methods, range(job.seeds), most))
    sizes = [len(loras[some]) * len(seeds) for some, seeds in parts]
    _ours(backbone, loras, parts[:1], settings)  # the first pass of all is slower
    ours = plain = 0.0
    with tempfile.TemporaryDirectory(prefix="iteris-sd-") as folder:
        files = [Path(folder, f"{k}.safetensors") for k in range(job.methods)]
        for file, lora in zip(files, loras, strict=True):
            formats.write(file, lora, {})
        for _ in range(ROUNDS):
            ours += measuring.seconds(partial(_ours, backbone, loras, parts, settings), job.device)[0]
            plain += measuring.seconds(partial(_plain, pipeline, files, job), job.device)[0]
    alone = measuring.seconds(partial(_unet_alone, backbone, job, sizes), job.device)[0]
    count = job.pictures
    rates = (ROUNDS * count / ours, ROUNDS * count / plain, count / alone)
    return Result(job, measuring.machine(job.device), max(sizes), *rates)


def _ours(
    backbone: Backbone,
    loras: Sequence[LoRA],
    parts: Sequence[tuple[slice, Sequence[int]]],
    settings: rendering.Settings,
) -> None:
    looks = [rendering.Look(PROMPT, lora) for lora in loras]
    for some, seeds in parts:
        finish(rendering.render_columns(backbone, looks[some], NEGATIVE, seeds, settings))


def _plain(pipeline: StableDiffusionPipeline, files: Sequence[Path], job: Job) -> None:
    for file in files:
        pipeline.load_lora_weights(str(file))
        for seed in range(job.seeds):
            pipeline(
                PROMPT,
                negative_prompt=NEGATIVE,
                num_inference_steps=job.steps,
                guidance_scale=7.5,
                height=job.size,
                width=job.size,
                generator=torch.Generator().manual_seed(seed),
            )
        pipeline.unload_lora_weights()


@torch.no_grad()
def _unet_alone(backbone: Backbone, job: Job, sizes: Sequence[int]) -> None:
    """All denoising steps of batches of these sizes."""
    state, time = backbone.encode([PROMPT]), torch.tensor(500, device=backbone.device)
    for size in sizes:
        latents = torch.zeros(2 * size, *backbone.latent_shape(job.size))
        latents = latents.to(backbone.device, backbone.dtype)
        for _ in range(job.steps):
            backbone.predict(latents, time, state.expand(2 * size, -1, -1))


def described(result: Result) -> dict[str, Any]:
    """Everything as plain values for JSON."""
    return asdict(result) | {"ratio": result.ours / result.plain, "of_bound": result.ours / result.bound}


def lines(result: Result) -> list[tuple[str, str]]:
    """What was measured, as pairs of words."""
    job = result.job
    return [
        (
            "job",
            f"{job.methods} methods × {job.seeds} seeds, {job.steps} steps, {job.size} px, LoRAs of rank {job.rank}",
        ),
        ("machine", result.machine),
        ("pictures in one batch", str(result.batch)),
        ("ours", f"{result.ours:.4g} pictures/s"),
        ("plain diffusers loop", f"{result.plain:.4g} pictures/s"),
        ("U-Net alone", f"{result.bound:.4g} pictures/s"),
        ("ours / plain loop", f"{result.ours / result.plain:.2f}"),
        ("ours / U-Net alone", f"{result.ours / result.bound:.2f}"),
    ]
