"""Draw pictures so that methods can be compared: a seed always starts from the same latents.

Pictures are drawn one by one. Batches would be a little faster, but matrix products round differently in batches
of another size, and a seed's picture must not depend on which others were asked for.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from inspect import signature

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from PIL import Image
from torch import Tensor

from iteris_sd.backbone import Backbone

SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "ddpm": DDPMScheduler,
}


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn: sampler, number of steps, guidance scale (1: none)."""

    sampler: str = "ddim"
    steps: int = 20
    guidance: float = 4.0


def scheduler(backbone: Backbone, settings: Settings) -> SchedulerMixin:
    """A fresh sampler on the base model's noise schedule, set to the number of steps."""
    fresh = SAMPLERS[settings.sampler].from_config(backbone.pipeline.scheduler.config)
    fresh.set_timesteps(settings.steps, device=backbone.device)
    return fresh


def initial_latents(backbone: Backbone, generator: torch.Generator, count: int = 1) -> Tensor:
    """Noise to start from, (count, channels, height, width); drawn on the CPU, so that devices agree."""
    shape = (count, *backbone.latent_shape)
    return torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype)


def guided(backbone: Backbone, latents: Tensor, time: Tensor, states: Tensor, guidance: float) -> Tensor:
    """The U-Net's prediction under classifier-free guidance.

    latents (n, c, h, w); states (2n, tokens, width), those of the negative prompt first, or (n, …) with guidance 1.
    """
    if guidance == 1.0:
        return backbone.unet(latents, time, states).sample
    apart, along = backbone.unet(torch.cat([latents, latents]), time, states).sample.chunk(2)
    return apart + guidance * (along - apart)


def render(
    backbone: Backbone, prompt: str, negative: str, seed: int, settings: Settings
) -> Generator[int, None, Image.Image]:
    """Draw one picture; yield after each denoising step how many are done, return the picture.

    The same noise, guidance and sampler as `StableDiffusionPipeline` with a CPU generator of this seed.
    """
    generator = torch.Generator().manual_seed(seed)
    sampler = scheduler(backbone, settings)
    noisy = "generator" in signature(sampler.step).parameters  # samplers that add noise draw it from the seed
    extra = {"generator": generator} if noisy else {}
    prompts = [prompt] if settings.guidance == 1.0 else [negative, prompt]
    with torch.no_grad():
        states = backbone.encode(prompts)
        latents = initial_latents(backbone, generator) * sampler.init_noise_sigma
    for done, time in enumerate(sampler.timesteps, start=1):
        with torch.no_grad():
            model_input = sampler.scale_model_input(latents, time)
            noise = guided(backbone, model_input, time, states, settings.guidance)
            latents = sampler.step(noise, time, latents, **extra).prev_sample
        yield done
    return decode(backbone, latents)[0]


@torch.no_grad()
def decode(backbone: Backbone, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents (n, c, h, w)."""
    pixels = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
    pictures: list[Image.Image] = backbone.pipeline.image_processor.postprocess(pixels, output_type="pil")
    return pictures
