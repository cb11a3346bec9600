"""Calibration samples of a diffusion model: prompts about a concept, and latents from its own trajectories.

For each prompt one pair (x_t, t) is taken from a short trajectory of the base model with that concept's LoRA,
timesteps stratified over the prompts. Base, single LoRA and merged model then all see the same x_t and t.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product

import torch
from torch import Tensor

from iteris_sd import calibration, rendering
from iteris_sd.backbone import Backbone
from iteris_sd.bases import Base
from iteris_sd.concepts import Concept, Loaded
from iteris_sd.lora import LoRA
from iteris_sd.recipe import Calibration, Recipe

ALONE = ("a {}", "a photo of a {}", "a picture of a {}", "an illustration of a {}")
BESIDE = ("a {} next to a {}", "a {} and a {}", "a {} in front of a {}", "a {} to the left of a {}")
_BATCH = 10  # prompts per forward of a trajectory; fixed, since it decides the order of summation


@dataclass(frozen=True, eq=False)
class Inputs:
    """Calibration samples of one concept: `ids` (m, positions), `latents` (m, c, h, w), `times` (m,)."""

    ids: Tensor
    latents: Tensor
    times: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def prompts(concept: Concept, base: Base, count: int) -> list[str]:
    """`count` prompts with the concept's trigger, in turn alone and beside a generic object of another class."""
    others = [o for o in base.objects if not o.endswith(concept.class_noun)]
    places = ("", *base.places)
    alone = [f"{t.format(concept.trigger)} {p}".strip() for p, t in product(places, ALONE)]
    beside = [
        f"{template.format(concept.trigger, other)} {places[k % len(places)]}".strip()
        for k, (other, template) in enumerate(product(others, BESIDE))
    ]
    turns = (p for pair in zip(cycle(alone), cycle(beside or alone), strict=False) for p in pair)
    return list(islice(turns, count))


def gather(backbone: Backbone, loaded: Loaded, lora: LoRA, recipe: Recipe) -> Generator[int, None, Inputs]:
    """Samples of one concept under its own `lora`; yield at each denoising step how many are ready.

    The backbone must know the concept's tokens already.
    """
    chosen = recipe.calibration
    texts = prompts(loaded.concept, backbone.base, chosen.samples)
    generator = torch.Generator().manual_seed(chosen.seed)
    # The step each prompt is stopped at: all steps equally often, in random order.
    stops = torch.arange(chosen.samples).remainder(chosen.steps)[
        torch.randperm(chosen.samples, generator=generator)
    ]
    start = rendering.initial_latents(backbone, generator, chosen.samples)
    latents, times = [], []
    with backbone.prepared({}, lora):
        for k in range(0, chosen.samples, _BATCH):
            part = slice(k, k + _BATCH)
            work = _stopped(backbone, texts[part], start[part], stops[part], recipe.guidance, chosen, k)
            x, t = yield from work
            latents.append(x)
            times.append(t)
            yield min(k + _BATCH, chosen.samples)
    return Inputs(backbone.tokenise(texts), torch.cat(latents), torch.cat(times))


@torch.no_grad()
def _stopped(
    backbone: Backbone,
    texts: Sequence[str],
    start: Tensor,
    stops: Tensor,
    guidance: float,
    chosen: Calibration,
    ready: int,
) -> Generator[int, None, tuple[Tensor, Tensor]]:
    """Denoise (m, c, h, w) and stop each row at its step: the latents and the times they were stopped at.

    Yields `ready`, how many samples there were before, after each denoising step, so that it can be stopped there.
    """
    sampler = rendering.scheduler(backbone, rendering.Settings("ddim", chosen.steps))
    states, nothing = backbone.encode(texts), backbone.encode([""])
    latents = start * sampler.init_noise_sigma
    for step, time in enumerate(sampler.timesteps[: int(stops.max())]):
        on = (stops > step).nonzero().flatten()
        both = states[on] if guidance == 1.0 else torch.cat([nothing.expand(len(on), -1, -1), states[on]])
        noise = rendering.guided(backbone, latents[on], time, both, guidance)
        latents[on] = sampler.step(noise, time, latents[on]).prev_sample
        yield ready
    return latents, sampler.timesteps.to(start.device)[stops]


def for_merging(backbone: Backbone, inputs: Sequence[Inputs]) -> calibration.Samples:
    """The samples as the calibration engine feeds them: text encoder, then U-Net, in micro-batches."""

    def feed(parts: Sequence[calibration.Part]) -> None:
        chosen = [(inputs[n], part) for n, part in parts]
        states = backbone.states(torch.cat([one.ids[part] for one, part in chosen]))
        latents = torch.cat([one.latents[part] for one, part in chosen])
        backbone.unet(latents, torch.cat([one.times[part] for one, part in chosen]), states)

    _, height, width = backbone.latent_shape
    return calibration.Samples(tuple(len(i) for i in inputs), feed, micro_batch(height * width))


def micro_batch(places: int) -> int:
    """How many samples of `places` latent pixels go through the U-Net at once: 64 at 16 x 16, 4 at 64 x 64.

    Fixed by shapes alone, since it decides the order of summation.
    """
    return min(64, max(1, 16_384 // places))
