"""Stage `unet`: the U-Net and its text encoder, learnt together on latents encoded beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from iteris_sd.storybook import data, model
from iteris_sd.storybook.loop import Plan, fit
from iteris_sd.storybook.pictures import contact_sheet, to_tensor

UNCAPTIONED = 0.1  # share of pictures learnt without their caption, for classifier-free guidance

SHEET = (
    "a dog on the beach",
    "a cat in a living room",
    "a teddybear in the snow",
    "a tortoise plushy in a meadow",
    "a flower in the mountains",
    "a wooden pot in a living room",
    "a barn in the snow",
    "a pair of sunglasses on the beach",
    "a dog next to a barn",
    "a red flower in a wooden pot",
    "a cat to the left of a barn in a meadow",
    "a teddybear and a tortoise plushy",
    "a dog wearing sunglasses on the beach",
    "a small striped cat in front of a red barn in the snow",
    "a blue flower next to a white dog in the mountains",
    "a teddybear in a wooden pot in a living room",
)


def velocity_loss(
    unet: nn.Module, noise: SchedulerMixin, latents: Tensor, states: Tensor, rng: torch.Generator
) -> Tensor:
    """Squared velocity error of each picture, (n,); latents (n, 4, h, w), states (n, tokens, width).

    Unweighted over timesteps: with min-SNR weighting (arXiv 2303.09556) the noisiest steps hardly count, and those
    are the ones where a caption decides what a picture will show; objects then came out much later than places.
    """
    times = torch.randint(len(noise.alphas_cumprod), (len(latents),), generator=rng)
    kept = noise.alphas_cumprod[times].view(-1, 1, 1, 1)
    fresh = torch.randn(latents.shape, generator=rng)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * fresh
    target = kept.sqrt() * fresh - (1 - kept).sqrt() * latents
    error = F.mse_loss(unet(noisy, times, states).sample, target, reduction="none")
    return error.mean(dim=(1, 2, 3))


def encoded(runs: Path, vae: AutoencoderKL, scenes: data.Scenes) -> Tensor:
    """Scaled latents of all scenes, (n, 4, 16, 16) float16, computed once."""
    path = runs / "scenes" / f"latents_{scenes.first}_{len(scenes)}.npy"
    if not path.exists():
        with torch.inference_mode():
            blocks = [
                vae.encode(to_tensor(scenes.pixels[k : k + 32]).contiguous(memory_format=torch.channels_last))
                .latent_dist.mean.mul(vae.config.scaling_factor)
                .half()
                for k in range(0, len(scenes), 32)
            ]
        np.save(path, torch.cat(blocks).numpy())
    return torch.from_numpy(np.load(path))


def tokenised(tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]]) -> Tensor:
    """All wordings of all scenes as (scenes, wordings, 77) int16."""
    flat = [wording for wordings in captions for wording in wordings]
    ids = tokenizer(flat, padding="max_length", truncation=True, return_tensors="np").input_ids
    return torch.from_numpy(ids.astype(np.int16)).view(len(captions), -1, model.TEXT_LENGTH)


def denoising_loss(
    latents: Tensor, ids: Tensor, empty: Tensor, batch: int
) -> Callable[[nn.ModuleDict, torch.Generator], Tensor]:
    """The loss of `fit`: random scenes, a random wording of each, some without any."""
    noise = model.scheduler()

    def loss(module: nn.ModuleDict, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=rng)
        wording = torch.randint(ids.shape[1], (batch,), generator=rng)
        tokens = ids[rows, wording].long()
        tokens[torch.rand(batch, generator=rng) < UNCAPTIONED] = empty
        states = module["text_encoder"](tokens).last_hidden_state
        clean = latents[rows].float().contiguous(memory_format=torch.channels_last)
        return velocity_loss(module["unet"], noise, clean, states, rng).mean()

    return loss


def assembled(module: nn.ModuleDict, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The parts as one diffusers pipeline."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=module["text_encoder"],
        tokenizer=tokenizer,
        unet=module["unet"],
        scheduler=model.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(runs: Path, assets: Path, scenes: int, steps: int = 3200) -> None:
    """Train and write everything under `assets/storybook` but the autoencoder, which must be there already."""
    folder = assets / "storybook"
    drawn = data.drawn(runs / "scenes", scenes)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae.to(memory_format=torch.channels_last).requires_grad_(False)
    captions = drawn.captions()
    if not (folder / "tokenizer").exists():
        model.train_tokenizer((c for wordings in captions[:6000] for c in wordings), folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids, empty = tokenised(tokenizer, captions), tokenised(tokenizer, [[""]])[0, 0].long()
    latents = encoded(runs, vae, drawn)
    plan = Plan("unet", steps, batch=32, peak=8e-4, seed=2, sample_every=400, save_every=200)

    def sample(module: nn.ModuleDict, step: int) -> None:
        pipeline = assembled(module, vae, tokenizer)
        pictures = pipeline(
            list(SHEET),
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
        ).images
        contact_sheet(pictures, 4, runs / "unet" / f"sample_{step:06}.png")

    torch.manual_seed(plan.seed)
    module = nn.ModuleDict(
        {
            "unet": model.unet().to(memory_format=torch.channels_last),
            "text_encoder": model.text_encoder(tokenizer),
        }
    )
    average = fit(plan, module, denoising_loss(latents, ids, empty, plan.batch), runs / "unet", sample)
    whole = assembled(average.half(), vae.half(), tokenizer)
    for part in ("unet", "text_encoder", "scheduler"):  # the others lie there already
        getattr(whole, part).save_pretrained(folder / part, max_shard_size=model.SHARD)
    whole.save_config(folder)
    _load_in_float32(folder / "text_encoder" / "config.json")


def _load_in_float32(config: Path) -> None:
    """Have transformers load fp16 weights as float32, as diffusers does: a pipeline of both cannot draw."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
