"""`bench render`: pictures per second of several methods by several seeds, here and by the plain diffusers loop.

The plain loop loads each method's LoRA into the pipeline and calls it once for each seed. Both ways draw the same
pictures on Stable Diffusion v1.5's shapes with random weights, method by method in turn. The bound is the U-Net alone,
with no LoRA, in the batches that we draw in.
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

from iteris_sd import bases, formats, rendering, sd15
from iteris_sd.backbone import Backbone
from iteris_sd.benchmarks import measuring
from iteris_sd.benchmarks.problems import random_lora
from iteris_sd.calibration import finish
from iteris_sd.lora import LoRA

PROMPT, NEGATIVE = "a dog next to a red barn on the beach", "blurry"


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
    pipeline = build().to(job.device)
    if job.device == "cuda":
        pipeline.to(torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    backbone = Backbone(bases.BASES["sd15"], pipeline)
    settings = rendering.Settings("dpm++", job.steps, 7.5, job.size)
    batch = min(job.seeds, rendering.together(backbone, settings))
    touched = {name: layer for name, layer in backbone.layers.items() if "attn" in name}
    loras = [random_lora(touched, job.rank, seed) for seed in range(job.methods)]
    _ours(backbone, loras[0], range(1), settings, 1)  # the first pass of all is slower
    ours = plain = 0.0
    with tempfile.TemporaryDirectory(prefix="iteris-sd-") as folder:
        for k, lora in enumerate(loras):
            file = Path(folder, f"{k}.safetensors")
            formats.write(file, lora, {})
            here = partial(_ours, backbone, lora, range(job.seeds), settings, batch)
            ours += measuring.seconds(here, job.device)[0]
            plain += measuring.seconds(partial(_plain, pipeline, file, job), job.device)[0]
    alone = measuring.seconds(lambda: _unet_alone(backbone, job, batch), job.device)[0]
    count = job.pictures
    return Result(job, measuring.machine(job.device), batch, count / ours, count / plain, count / alone)


def _ours(
    backbone: Backbone, lora: LoRA, seeds: Sequence[int], settings: rendering.Settings, batch: int
) -> None:
    with backbone.prepared({}, lora):
        for k in range(0, len(seeds), batch):
            finish(rendering.render(backbone, PROMPT, NEGATIVE, seeds[k : k + batch], settings))


def _plain(pipeline: StableDiffusionPipeline, file: Path, job: Job) -> None:
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
def _unet_alone(backbone: Backbone, job: Job, batch: int) -> None:
    latents = torch.zeros(2 * batch, *backbone.latent_shape(job.size)).to(backbone.device, backbone.dtype)
    states = backbone.encode([PROMPT]).expand(2 * batch, -1, -1)
    time = torch.tensor(500, device=backbone.device)
    for _ in range(job.methods * -(-job.seeds // batch) * job.steps):
        backbone.unet(latents, time, states)


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
