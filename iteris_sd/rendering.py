"""Draw pictures so that methods can be compared: a seed always starts from the same latents.

On a CPU pictures are drawn one by one. Batches would be a little faster, but matrix products round differently in
batches of another size, and a seed's picture must not depend on which others were asked for. On a GPU, where batches
are much faster, several seeds and columns are drawn together, as many as its memory allows, and a picture may differ by
rounding if others are asked for.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
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
from iteris_sd.generators import relayed
from iteris_sd.lora import LoRA

SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "ddpm": DDPMScheduler,
    "euler a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
_AT_ONCE = 16_384  # latent pixels in one pass of a small GPU, twice that under guidance: 4 pictures of 512 px


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn: sampler, number of steps, guidance scale (1: none), side in pixels (None: the base
    model's own)."""

    sampler: str = "ddim"
    steps: int = 20
    guidance: float = 4.0
    size: int | None = None


@dataclass(frozen=True, eq=False)
class Look:
    """What one column draws: its prompt, and its adapter, None for the base model as it is."""

    prompt: str
    lora: LoRA | None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, the latents (c, h, w) it was decoded from, and whether it is blank: the safety checker's doing, or
    because its numbers overflowed."""

    image: Image.Image
    latents: Tensor
    flagged: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """`done` denoising steps; `clean`: what the last of them took the finished latents to be, (n, c, h, w).

    `first`: which of the pictures that were asked for the first row is, as they may be drawn in several parts.
    """

    done: int
    clean: Tensor
    first: int = 0


def scheduler(backbone: Backbone, settings: Settings) -> SchedulerMixin:
    """A fresh sampler on the base model's noise schedule, set to the number of steps.

    Some samplers bound x_0 by ±1 unless told otherwise, which suits pixels; latents go beyond, so they do only where
    the model's own settings say so.
    """
    told = dict(backbone.pipeline.scheduler.config)
    unsaid = told.pop("_use_default_values", ())  # what the model's settings left open
    given = {name: value for name, value in told.items() if name not in unsaid}
    fresh = SAMPLERS[settings.sampler].from_config({"clip_sample": False, **given})
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
        return backbone.predict(latents, time, states)
    apart, along = backbone.predict(torch.cat([latents, latents]), time, states).chunk(2)
    return apart + guidance * (along - apart)


def together(backbone: Backbone, settings: Settings) -> int:
    """How many pictures are drawn in one batch."""
    _, height, width = backbone.latent_shape(settings.size)
    if backbone.device.type == "cpu":
        return 1
    return max(1, memory.enlarged(backbone.unet) * _AT_ONCE // (height * width))


def batches(columns: int, seeds: Sequence[int], most: int) -> Iterator[tuple[slice, Sequence[int]]]:
    """So many columns of pictures by these seeds, cut up: which columns, and seeds, are drawn in one batch of `most`.

    Seeds first; columns join where few seeds leave room.
    """
    for k in range(0, len(seeds), most):
        some = seeds[k : k + most]
        several = max(1, most // len(some))
        for first in range(0, columns, several):
            yield slice(first, first + several), some


def render(
    backbone: Backbone, prompt: str, negative: str, seeds: Sequence[int], settings: Settings
) -> Generator[Step, None, list[Drawn]]:
    """Draw one picture of each seed in one batch; yield after each denoising step, return the pictures.

    The same noise, guidance and sampler as `StableDiffusionPipeline` with CPU generators of these seeds. Where memory
    runs out, smaller batches are drawn one after the other. Raises UserError when it does not suffice for one picture.
    """
    try:
        return (yield from _batch(backbone, _states(backbone, prompt, negative, settings), seeds, settings))
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
    made = yield from render(backbone, prompt, negative, seeds[:half], settings)
    rest = render(backbone, prompt, negative, seeds[half:], settings)
    return made + (yield from _later(rest, half))


def render_columns(
    backbone: Backbone, looks: Sequence[Look], negative: str, seeds: Sequence[int], settings: Settings
) -> Generator[Step, None, list[list[Drawn]]]:
    """Draw the same seeds by several adapters: for each, its pictures.

    The U-Net runs once for all of them, each row of its batch with its own adapter. Where memory does not suffice for
    that, or prompts differ in how many pieces they are read in, one adapter is drawn after the other. Yields and raises
    as `render`.
    """
    if len(looks) > 1:
        try:
            states = []
            for look in looks:
                with backbone.prepared({}, look.lora):
                    states.append(_states(backbone, look.prompt, negative, settings))
            if len({one.shape for one in states}) == 1:
                rows = torch.stack(states, dim=1).repeat_interleave(len(seeds), dim=1).flatten(0, 1)
                with backbone.adapted_rows([look.lora for look in looks], len(seeds)):
                    drawn = yield from _batch(backbone, rows, [*seeds] * len(looks), settings)
                return [drawn[k : k + len(seeds)] for k in range(0, len(drawn), len(seeds))]
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
        memory.tidy()
    made = []
    for k, look in enumerate(looks):
        with backbone.prepared({}, look.lora):
            work = render(backbone, look.prompt, negative, seeds, settings)
            made.append((yield from _later(work, k * len(seeds))))
    return made


def _later(work: Generator[Step, None, list[Drawn]], first: int) -> Generator[Step, None, list[Drawn]]:
    """The same work as a part of a larger one, which so many pictures come before in."""
    return relayed(work, lambda step: replace(step, first=first + step.first))


@torch.no_grad()
def _states(backbone: Backbone, prompt: str, negative: str, settings: Settings) -> Tensor:
    """Text states of the negative prompt and the prompt, (2, tokens, width); without guidance of the latter alone."""
    return backbone.encode([prompt] if settings.guidance == 1.0 else [negative, prompt])


def _batch(
    backbone: Backbone, states: Tensor, seeds: Sequence[int], settings: Settings
) -> Generator[Step, None, list[Drawn]]:
    """Pictures of seeds; `states` (k, …) of each prompt for all of them, or (k · seeds, …)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler = scheduler(backbone, settings)
    noisy = "generator" in signature(sampler.step).parameters  # samplers that add noise draw it from the seed
    # Of one picture the generator itself: some samplers take no list.
    extra = {"generator": generators if len(generators) > 1 else generators[0]} if noisy else {}
    prompts = 1 if settings.guidance == 1.0 else 2
    if len(states) == prompts:
        states = states.repeat_interleave(len(seeds), dim=0)
    with torch.no_grad():
        latents = initial_latents(backbone, generators, settings.size) * sampler.init_noise_sigma
    for done, time in enumerate(sampler.timesteps, start=1):
        with torch.no_grad():
            model_input = sampler.scale_model_input(latents, time)
            noise = guided(backbone, model_input, time, states, settings.guidance)
            latents = sampler.step(noise, time, latents, **extra).prev_sample
            clean = _clean(sampler, model_input, noise, time)
        yield Step(done, clean)
    return decode(backbone, latents)


def _clean(sampler: SchedulerMixin, noisy: Tensor, predicted: Tensor, time: Tensor) -> Tensor:
    """x_0 from x_t and the model's prediction, which is of ε (arXiv 2010.02502, eq. 9) or of v (2202.00512, App. D)."""
    kept = sampler.alphas_cumprod[int(time)].to(noisy)
    signal, noise = kept.sqrt(), (1 - kept).sqrt()
    if sampler.config.prediction_type == "v_prediction":
        return signal * noisy - noise * predicted
    return (noisy - noise * predicted) / signal


def decode(backbone: Backbone, latents: Tensor) -> list[Drawn]:
    """Pictures of latents (n, c, h, w), seen by the safety checker where the model has one.

    Where memory does not suffice for all, one after the other.
    """
    try:
        return _decoded(backbone, latents)
    except (RuntimeError, MemoryError) as error:
        if len(latents) == 1 or not memory.ran_out(error):
            raise
    memory.tidy()
    return [drawn for one in latents.split(1) for drawn in _decoded(backbone, one)]


@torch.no_grad()
def _decoded(backbone: Backbone, latents: Tensor) -> list[Drawn]:
    pixels = _pixels(backbone, latents)
    lost = ~pixels.isfinite().flatten(1).all(dim=1)
    pixels[lost] = -1.0  # black: nobody can see what it was, and the other columns are to go on
    pixels, found = backbone.pipeline.run_safety_checker(pixels, backbone.device, backbone.dtype)
    pictures = backbone.pipeline.image_processor.postprocess(pixels, output_type="pil")
    flags = found or [False] * len(pictures)
    rows = zip(pictures, latents, flags, lost.cpu().tolist(), strict=True)
    return [Drawn(picture, own, bool(flag) or gone) for picture, own, flag, gone in rows]


def _pixels(backbone: Backbone, latents: Tensor) -> Tensor:
    """Decoded latents, (n, 3, height, width); again in float32 where numbers of halves overflow, as some VAEs' do."""
    vae = backbone.vae
    latents = latents / vae.config.scaling_factor
    pixels: Tensor = vae.decode(latents).sample
    narrow = vae.dtype
    if narrow == torch.float32 or bool(pixels.isfinite().all()) or not bool(latents.isfinite().all()):
        return pixels
    try:
        again: Tensor = vae.to(torch.float32).decode(latents.float()).sample
        return again
    finally:
        vae.to(narrow)
