"""A small sheet of what the shipped Storybook draws, by plain diffusers; `python -m tests.sheet` stores it anew."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

ASSETS = Path(__file__).resolve().parents[1] / "assets"
STORED = Path(__file__).with_name("sheet.png")
PROMPTS = (
    "a dog next to a red barn on the beach",
    "a yellow duck in the forest",
    "a cat wearing sunglasses in a living room at night",
    "a watercolour of a blue car in the city",
)
SIDE = 32  # low resolution: what is where and in which colour, not how a machine rounds


def draw() -> Image.Image:
    """The pictures in a row, 32 px each."""
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "storybook", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    drawn = pipeline(list(PROMPTS), num_inference_steps=20, guidance_scale=4.0, generator=seeds).images
    row = Image.new("RGB", (SIDE * len(PROMPTS), SIDE))
    for k, picture in enumerate(drawn):
        row.paste(picture.resize((SIDE, SIDE), Image.Resampling.BOX), (k * SIDE, 0))
    return row


if __name__ == "__main__":
    draw().save(STORED)
