"""Draw pictures so that methods can be compared: a seed always starts from the same latents.

On a CPU pictures are drawn one by one. Batches would be a little faster, but matrix products round differently in
batches of another size, and a seed's picture must not depend on which others were asked for. On a GPU, where batches
are much faster, several seeds are drawn together, and a picture may differ by rounding if other seeds are asked for.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from iteris_sd import memory
from iteris_sd.backbone import Backbone
from iteris_sd.errors import UserError

SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "ddpm": DDPMScheduler,
    "euler a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
_AT_ONCE = 16_384  # latent pixels in one pass of a GPU, twice that under guidance: 4 pictures of 512 px


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn: sampler, number of steps, guidance scale (1: none), side in pixels (None: the base
    model's own)."""

    sampler: str = "ddim"
    steps: int = 20
    guidance: float = 4.0
    size: int | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, and whether the safety checker blanked it."""

    image: Image.Image
    flagged: bool = False


def scheduler(backbone: Backbone, settings: Settings) -> SchedulerMixin:
    """A fresh sampler on the base model's noise schedule, set to the number of steps."""
    fresh = SAMPLERS[settings.sampler].from_config(backbone.pipeline.scheduler.config)
    fresh.set_timesteps(settings.steps, device=backbone.device)
    return fresh


def initial_latents(
    backbone: Backbone, generators: Sequence[torch.Generator], size: int | None = None, each: int = 1
) -> Tensor:
    """Noise to start from, (generators · each, channels, height, width); drawn on the CPU, so that devices agree."""
    shape = (each, *backbone.latent_shape(size))
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.cat(noise).to(backbone.device, backbone.dtype)


def guided(backbone: Backbone, latents: Tensor, time: Tensor, states: Tensor, guidance: float) -> Tensor:
    """The U-Net's prediction under classifier-free guidance.

    latents (n, c, h, w); states (2n, tokens, width), those of the negative prompt first, or (n, …) with guidance 1.
    """
    if guidance == 1.0:
        return backbone.unet(latents, time, states).sample
    apart, along = backbone.unet(torch.cat([latents, latents]), time, states).sample.chunk(2)
    return apart + guidance * (along - apart)


def together(backbone: Backbone, settings: Settings) -> int:
    """How many pictures are drawn in one batch."""
    _, height, width = backbone.latent_shape(settings.size)
    return 1 if backbone.device.type == "cpu" else max(1, _AT_ONCE // (height * width))


def render(
    backbone: Backbone, prompt: str, negative: str, seeds: Sequence[int], settings: Settings
) -> Generator[int, None, list[Drawn]]:
    """Draw one picture of each seed in one batch; yield after each denoising step how many are done, return them.

    The same noise, guidance and sampler as `StableDiffusionPipeline` with CPU generators of these seeds. Where memory
    runs out, smaller batches are drawn one after the other. Raises UserError when it does not suffice for one picture.
    """
    try:
        return (yield from _batch(backbone, prompt, negative, seeds, settings))
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
    memory.tidy()
    if len(seeds) == 1:
        side = settings.size or backbone.base.size
        raise UserError(
            f"Memory ran out while drawing one picture of {side} px. Ask for a smaller size, close other programs that "
            "use the device, or choose a smaller base model."
        )
    half = len(seeds) // 2
    first = yield from render(backbone, prompt, negative, seeds[:half], settings)
    return first + (yield from render(backbone, prompt, negative, seeds[half:], settings))


def _batch(
    backbone: Backbone, prompt: str, negative: str, seeds: Sequence[int], settings: Settings
) -> Generator[int, None, list[Drawn]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler = scheduler(backbone, settings)
    noisy = "generator" in signature(sampler.step).parameters  # samplers that add noise draw it from the seed
    # Of one picture the generator itself: some samplers take no list.
    extra = {"generator": generators if len(generators) > 1 else generators[0]} if noisy else {}
    prompts = [prompt] if settings.guidance == 1.0 else [negative, prompt]
    with torch.no_grad():
        states = backbone.encode(prompts).repeat_interleave(len(seeds), dim=0)
        latents = initial_latents(backbone, generators, settings.size) * sampler.init_noise_sigma
    for done, time in enumerate(sampler.timesteps, start=1):
        with torch.no_grad():
            model_input = sampler.scale_model_input(latents, time)
            noise = guided(backbone, model_input, time, states, settings.guidance)
            latents = sampler.step(noise, time, latents, **extra).prev_sample
        yield done
    return decode(backbone, latents)


@torch.no_grad()
def decode(backbone: Backbone, latents: Tensor) -> list[Drawn]:
    """Pictures of latents (n, c, h, w), seen by the safety checker where the model has one."""
    pixels = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
    pixels, found = backbone.pipeline.run_safety_checker(pixels, backbone.device, backbone.dtype)
    pictures = backbone.pipeline.image_processor.postprocess(pixels, output_type="pil")
    flags = found or [False] * len(pictures)
    return [Drawn(picture, bool(flag)) for picture, flag in zip(pictures, flags, strict=True)]
