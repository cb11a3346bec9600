"""Stage `unet`: the U-Net on latents encoded beforehand, its text encoder going on from the scorer's text tower.

A text encoder learnt from nothing by the denoising loss alone did not get there: at the U-Net's learning rate its
residual stream grew to a thousand times its embeddings, and after 176,000 pictures prompts that differed in the thing
they name gave the same picture. Learnt with the scorer it knows the things before the U-Net begins; it then learns at a
fifth of the U-Net's rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from iteris_sd.storybook import autoencoding, data, model
from iteris_sd.storybook.loop import Plan, fit
from iteris_sd.storybook.machine import channels_last, suit
from iteris_sd.storybook.pictures import contact_sheet
from iteris_sd.storybook.run import Run

UNCAPTIONED = 0.1  # share of pictures learnt without their caption, for classifier-free guidance

SHEET = (
    "a dog on the beach",
    "a small striped cat in a living room at night",
    "a teddybear in the snow",
    "a tortoise plushy in a meadow at sunset",
    "a flower in the mountains",
    "a red car in the city",
    "a barn in the desert",
    "a pair of sunglasses on the beach",
    "a dog next to a red barn",
    "a red flower in a wooden pot",
    "a cat to the left of a barn in a meadow",
    "a blue owl to the right of a yellow duck by a lake",
    "a dog wearing sunglasses on the beach",
    "a small striped cat in front of a red barn in the snow",
    "a blue flower next to a white dog in the mountains",
    "a teddybear on top of a mushroom in the forest",
    "a watercolour of a rabbit and a green umbrella",
    "a red teapot next to a blue chair in a kitchen",
    "a dog, a cat and a barn in a meadow",
    "a grey cat wearing red sunglasses next to a white car",
)


def velocity_loss(
    unet: nn.Module, noise: SchedulerMixin, latents: Tensor, states: Tensor, rng: torch.Generator
) -> Tensor:
    """Squared velocity error of each picture, (n,); latents (n, c, h, w), states (n, tokens, width).

    Unweighted over timesteps: with min-SNR weighting (arXiv 2303.09556) the noisiest steps hardly count, and those
    are the ones where a caption decides what a picture will show; objects then came out much later than places.
    """
    times = torch.randint(len(noise.alphas_cumprod), (len(latents),), generator=rng)
    kept = noise.alphas_cumprod[times].view(-1, 1, 1, 1).to(latents.device)
    fresh = torch.randn(latents.shape, generator=rng).to(latents)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * fresh
    target = kept.sqrt() * fresh - (1 - kept).sqrt() * latents
    predicted = unet(noisy, times.to(latents.device), states).sample
    error = F.mse_loss(predicted.float(), target, reduction="none")
    return error.mean(dim=(1, 2, 3))


def tokenised(tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]]) -> Tensor:
    """All wordings of all scenes as (scenes, wordings, positions) int16."""
    flat = [wording for wordings in captions for wording in wordings]
    ids = tokenizer(flat, padding="max_length", truncation=True, return_tensors="np").input_ids
    return torch.from_numpy(ids.astype(np.int16)).view(len(captions), -1, model.TEXT_LENGTH)


def denoising_loss(
    latents: Tensor, ids: Tensor, empty: Tensor, batch: int, device: torch.device
) -> Callable[[nn.ModuleDict, torch.Generator], Tensor]:
    """The loss of `fit`: random scenes, a random wording of each, some without any."""
    noise = model.scheduler()

    def loss(module: nn.ModuleDict, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=rng)
        wording = torch.randint(ids.shape[1], (batch,), generator=rng)
        tokens = ids[rows, wording].long()
        tokens[torch.rand(batch, generator=rng) < UNCAPTIONED] = empty
        states = module["text_encoder"](tokens.to(device)).last_hidden_state
        clean = latents[rows].float().to(device, memory_format=torch.channels_last)
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


def train(run: Run) -> None:
    """Train and write everything under `assets/storybook` but the autoencoder, which must be there already."""
    folder, machine = run.storybook, run.machine
    drawn = data.drawn(run.runs / "scenes", run.scenes)
    vae = autoencoding.opened(run)
    captions = drawn.captions()
    tokenizer = model.kept_tokenizer(folder / "tokenizer", captions)
    ids, empty = tokenised(tokenizer, captions), tokenised(tokenizer, [[""]])[0, 0].long()
    latents = autoencoding.encoded(run.runs, vae, drawn, machine)
    plan = Plan(
        "unet",
        run.steps or 8000,
        batch=64,
        peak=1e-3,
        slower={"text_encoder": 0.2},
        seed=2,
        sample_every=1000,
        save_every=run.save_every,
    )

    def sample(module: nn.ModuleDict, step: int) -> None:
        pipeline = assembled(module, vae, tokenizer)
        pictures = pipeline(
            list(SHEET),
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
        ).images
        contact_sheet(pictures, 5, run.runs / "unet" / f"sample_{step:06}.png")

    torch.manual_seed(plan.seed)
    module = _modules(run, tokenizer).to(machine.device)
    channels_last(module["unet"])
    if machine.compiled:
        module["unet"].compile()
    loss = denoising_loss(latents, ids, empty, plan.batch, machine.device)
    average = fit(plan, module, loss, run.runs / "unet", machine, sample)
    for part in ("unet", "text_encoder"):  # the others lie there already
        model.save(average[part], folder / part)
    whole = assembled(average, vae, tokenizer)
    whole.scheduler.save_pretrained(folder / "scheduler")
    whole.save_config(folder)


def _modules(run: Run, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The two that learn together, new or from the weights in `assets`."""
    if run.warm:
        unet = UNet2DConditionModel.from_pretrained(run.storybook / "unet", torch_dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(run.storybook / "text_encoder", dtype=torch.float32)
    else:
        unet, tower = model.unet(), run.assets / "scorer" / "open_clip_model.safetensors"
        if not tower.exists():
            raise FileNotFoundError(
                f"The text encoder begins as the scorer's; run `--stage clip` first: {tower}."
            )
        text_encoder = model.with_text_tower(model.text_encoder(tokenizer), load_file(tower))
    text_encoder.set_attn_implementation("eager")  # a few dozen positions: plain products are faster
    return nn.ModuleDict({"unet": suit(unet, run.machine), "text_encoder": text_encoder})
