"""Stable Diffusion v1.5's exact shapes and its tokenizer, without a download.

They configure single-file checkpoints, which hold weights alone, and make models of random weights for tests and
benchmarks. The tokenizer's vocabulary is CLIP's, as open_clip brings it along.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 49_408
POSITIONS = 77

UNET: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
)
VAE: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    }
)
TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": 1,
    }
)
SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
)  # as it was published: what it leaves open, such as how timesteps are spaced, each sampler decides


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level vocabulary and merges: bytes, bytes at a word's end, merged pairs, and two marks."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    letters = list(bytes_to_unicode().values())
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    count = VOCABULARY - 2 * len(letters) - 2
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : 1 + count])]
    words = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges), START, END]
    return {word: k for k, word in enumerate(words)}, merges


def tokenizer() -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion v1.5: CLIP's, of 77 positions."""
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)


def random_pipeline(
    unet: Mapping[str, Any] = UNET,
    vae: Mapping[str, Any] = VAE,
    text: Mapping[str, Any] = TEXT,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """The whole model with random weights; other configurations make a smaller one of the same build."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionPipeline(
            vae=AutoencoderKL(**vae),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            tokenizer=tokenizer(),
            unet=UNet2DConditionModel(**unet),
            scheduler=PNDMScheduler.from_config(dict(SCHEDULER)),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def write_configuration(folder: Path, schedule: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write into `folder` what diffusers needs to know to make a pipeline of a single-file checkpoint.

    `schedule`: settings of its noise schedule that differ from v1.5's.
    """
    with torch.device("meta"):
        pipeline = random_pipeline()
    pipeline.save_config(folder)
    for name in ("unet", "vae"):
        getattr(pipeline, name).save_config(folder / name)
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    told = json.dumps({**SCHEDULER, **schedule})  # the scheduler itself would write its defaults, too
    (folder / "scheduler" / "scheduler_config.json").write_text(told, encoding="utf-8")
