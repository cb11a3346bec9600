"""Calibration samples of a diffusion model: prompts about a concept, and latents from its own trajectories.

For each prompt one pair (x_t, t) is taken from a short trajectory of the base model with that concept's LoRA,
timesteps stratified over the prompts. Base, single LoRA and merged model then all see the same x_t and t.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product

import torch
from torch import Tensor

from iteris_sd import calibration, rendering
from iteris_sd.backbone import Backbone
from iteris_sd.bases import Base
from iteris_sd.concepts import Concept, Loaded
from iteris_sd.errors import UserError
from iteris_sd.lora import TARGETS, LoRA
from iteris_sd.recipe import Calibration, Recipe

ALONE = ("a {}", "a photo of a {}", "a picture of a {}", "an illustration of a {}")
BESIDE = ("a {} next to a {}", "a {} and a {}", "a {} in front of a {}", "a {} to the left of a {}")
_BATCH = 10  # prompts per forward of a trajectory; fixed, since it decides the order of summation


@dataclass(frozen=True, eq=False)
class Inputs:
    """Calibration samples of one concept: `ids` (m, positions), `latents` (m, c, h, w), `times` (m,).

    Without latents and times they serve the layers that see nothing but text.
    """

    ids: Tensor
    latents: Tensor | None = None
    times: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Inputs:
        """The same samples on another device."""
        latents, times = (None if t is None else t.to(device) for t in (self.latents, self.times))
        return Inputs(self.ids.to(device), latents, times)

    def pictured(self) -> tuple[Tensor, Tensor]:
        """Latents and times; ValueError when there are none."""
        if self.latents is None or self.times is None:
            raise ValueError(
                "these samples have no latents: they were gathered for layers that see only text"
            )
        return self.latents, self.times


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


def gather(
    backbone: Backbone,
    loaded: Loaded,
    lora: LoRA,
    recipe: Recipe,
    *,
    text_only: bool = False,
    parts: int = 1,
) -> Generator[int, None, Inputs]:
    """Samples of one concept under its own `lora`; yield at each denoising step how many are ready.

    `text_only`: what sees nothing but text needs no latents, and thus no trajectories. `parts`: batches so many times
    smaller than usual, where memory is short. The backbone must know the concept's tokens already.
    """
    chosen = recipe.calibration
    texts = prompts(loaded.concept, backbone.base, chosen.samples)
    ids = backbone.tokenise([*texts, *[""] * chosen.unconditional])
    if text_only:
        return Inputs(ids)
    generator = torch.Generator().manual_seed(chosen.seed)
    stops = _stops(chosen.samples, chosen.steps)[torch.randperm(chosen.samples, generator=generator)]
    start = rendering.initial_latents(backbone, [generator], recipe.size, each=chosen.samples)
    latents, times = [], []
    with backbone.prepared({}, lora):
        batch = max(1, _BATCH // parts)
        for k in range(0, chosen.samples, batch):
            part = slice(k, min(k + batch, chosen.samples))
            work = _stopped(backbone, ids[part], start[part], stops[part], recipe.guidance, chosen, k)
            x, t = yield from work
            latents.append(x)
            times.append(t)
            yield part.stop
    return Inputs(ids, _extended(latents, chosen.unconditional), _extended(times, chosen.unconditional))


def _stops(samples: int, steps: int) -> Tensor:
    """The steps that trajectories are stopped at, (samples,): all equally often, or so many evenly spread ones."""
    different = min(samples, steps)
    spread = (torch.arange(different) * steps + steps // 2) // different
    return spread[torch.arange(samples).remainder(different)]


def _extended(parts: Sequence[Tensor], more: int) -> Tensor:
    """All rows, and the first ones again for the samples without a prompt."""
    rows = torch.cat(list(parts))
    return torch.cat([rows, rows[:more]])


@torch.no_grad()
def _stopped(
    backbone: Backbone,
    ids: Tensor,
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
    states, nothing = backbone.states(ids), backbone.states(backbone.tokenise([""]))
    latents = start * sampler.init_noise_sigma
    for step, time in enumerate(sampler.timesteps[: int(stops.max())]):
        on = (stops > step).nonzero().flatten()
        both = states[on] if guidance == 1.0 else torch.cat([nothing.expand(len(on), -1, -1), states[on]])
        noise = rendering.guided(backbone, latents[on], time, both, guidance)
        latents[on] = sampler.step(noise, time, latents[on]).prev_sample
        yield ready
    return latents, sampler.timesteps.to(start.device)[stops]


def for_merging(
    backbone: Backbone,
    inputs: Sequence[Inputs],
    wanted: Collection[str],
    positions: int | None = None,
    parts: int = 1,
) -> calibration.Samples:
    """The samples as the calibration engine feeds them: text encoder, then U-Net, in micro-batches.

    Where all layers `wanted` see nothing but text, the U-Net does not run: its K and V get the states. `positions`: as
    `Samples` has it. `parts`: micro-batches so many times smaller than usual, where memory is short.
    """
    rows = tuple(len(i) for i in inputs)
    if text_only(wanted):
        readers = [name for name in backbone.layers if name in wanted and name.startswith("unet.")]

        def read(parts: Sequence[calibration.Part]) -> Mapping[str, Tensor]:
            states = backbone.states(torch.cat([inputs[n].ids[part] for n, part in parts]))
            return dict.fromkeys(readers, states)

        return calibration.Samples(rows, read, max(1, micro_batch(1) // parts), positions)
    pictured = [i.pictured() for i in inputs]

    def feed(parts: Sequence[calibration.Part]) -> None:
        states = backbone.states(torch.cat([inputs[n].ids[part] for n, part in parts]))
        x, t = (torch.cat([pictured[n][which][part] for n, part in parts]) for which in (0, 1))
        backbone.unet(x, t, states)

    places = pictured[0][0].shape[-2:].numel()
    return calibration.Samples(rows, feed, max(1, micro_batch(places) // parts), positions)


def of_words(
    backbone: Backbone,
    picked: Sequence[Loaded],
    wanted: Collection[str],
    parts: int = 1,
    captions: int = 200,
) -> calibration.Samples:
    """Samples for methods that look at each concept's own words, and at generic captions of nobody's.

    Of a concept's captions only the words of its trigger count, of the others all positions. Serves layers that see
    nothing but text. `parts`: as `for_merging` has it. Raises UserError when a trigger cannot be found among its
    caption's tokens.
    """
    texts = [[t.format(one.concept.trigger) for t in ALONE] for one in picked]
    ids = [backbone.tokenise(some) for some in texts]
    kept = [
        _places(rows, _bare(backbone, one.concept.trigger)) for rows, one in zip(ids, picked, strict=True)
    ]
    ids.append(backbone.tokenise(list(islice(_generic(backbone.base), captions))))
    kept.append(torch.ones_like(ids[-1], dtype=torch.bool))
    readers = [name for name in backbone.layers if name in wanted]

    def read(parts: Sequence[calibration.Part]) -> Mapping[str, Tensor]:
        states = backbone.states(torch.cat([ids[n][part] for n, part in parts]))
        return dict.fromkeys(readers, states)

    rows = tuple(map(len, ids))
    return calibration.Samples(rows, read, max(1, micro_batch(1) // parts), kept=kept)


def _generic(base: Base) -> Iterator[str]:
    """Captions of the base model's own things, places in turn."""
    pairs = ((a, b) for a, b in product(base.objects, base.objects) if a != b)
    for (a, b), template, place in zip(pairs, cycle(BESIDE), cycle(("", *base.places)), strict=False):
        yield f"{template.format(a, b)} {place}".strip()


def _bare(backbone: Backbone, words: str) -> list[int]:
    """The ids of words without the tokens that begin and end a text."""
    found: list[int] = backbone.tokenizer(backbone.spell(words), add_special_tokens=False).input_ids
    return found


def _places(ids: Tensor, words: Sequence[int]) -> Tensor:
    """Where in each row of ids (n, positions) these words stand one after the other: (n, positions) bool."""
    there = torch.zeros_like(ids, dtype=torch.bool)
    wanted = torch.tensor(words, device=ids.device)
    for start in range(ids.shape[1] - len(words) + 1):
        span = slice(start, start + len(words))
        there[:, span] |= (ids[:, span] == wanted).all(dim=1, keepdim=True)
    if not words or not bool(there.any(dim=1).all()):
        raise UserError("A trigger does not come through the tokenizer as it is; choose a plainer one.")
    return there


def text_only(names: Collection[str]) -> bool:
    """Whether all these layers see nothing but text."""
    return all(TARGETS["text"].fullmatch(name) for name in names)


def micro_batch(places: int) -> int:
    """How many samples of `places` latent pixels go through the U-Net at once: 64 at 16 x 16, 4 at 64 x 64.

    Fixed by shapes alone, since it decides the order of summation.
    """
    return min(64, max(1, 16_384 // places))
