"""A base model of Storybook's shape but tiny and random, with concepts to match, written as its assets are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from iteris_sd import backbone as backbones
from iteris_sd import bases, formats, scoring
from iteris_sd.backbone import Backbone
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.storybook import model

WIDTH = 16  # of the text states
SIDE = 16  # of a picture, in pixels
CAPTIONS = ("a dog on the beach", "a photo of a dog next to a barn", "a cat in a meadow")
CONCEPTS = {"dog": "<rex>", "barn": "<lucky>", "cat": "<pepper>"}


def write(assets: Path) -> None:
    """Write `storybook/` and `concepts/` into the folder."""
    pipeline = make(model.train_tokenizer(CAPTIONS, assets / "tokenizer"))
    pipeline.save_pretrained(assets / "storybook")
    for number, (name, token) in enumerate(CONCEPTS.items()):
        write_concept(assets / "concepts" / name, pipeline, name, token, seed=number)


def make(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline: 16 px pictures, 8×8×4 latents, text states of width 16."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=model.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _vivid(made)


def _vivid(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Weights of unit gain: as libraries initialise them, the text would hardly reach the picture."""
    rng = torch.Generator().manual_seed(1)
    for part in (pipeline.unet, pipeline.text_encoder):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                shape = module.weight.shape
                gain = shape[1] ** -0.5 if isinstance(module, nn.Linear) else 1.0
                module.weight.data = gain * torch.randn(shape, generator=rng)
    return pipeline


def write_concept(
    folder: Path, pipeline: StableDiffusionPipeline, name: str, token: str, seed: int, noun: str | None = None
) -> None:
    """A concept folder with a random LoRA on all attention layers, a random token and two references."""
    rng = torch.Generator().manual_seed(seed)
    noun = noun or name
    formats.write(folder / "lora.safetensors", random_lora(pipeline, rank=2 + seed, rng=rng))
    file = folder / "embeddings" / f"{token.strip('<>')}.safetensors"
    formats.write_embedding(file, token, torch.randn(1, WIDTH, generator=rng))
    (folder / "references").mkdir()
    for k, colour in enumerate(("teal", "salmon")):
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / "references" / f"{k}.png")
    told = {"name": name, "title": f"Our {noun}", "trigger": f"{token} {noun}", "class_noun": noun}
    (folder / "concept.json").write_text(json.dumps(told))


def random_lora(pipeline: StableDiffusionPipeline, rank: int, rng: torch.Generator) -> LoRA:
    """‖ΔW x‖ is about half of ‖x‖ in every attention layer."""
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
    layers = {}
    for component in ("unet", "text_encoder"):
        for path, part in getattr(pipeline, component).named_modules():
            if isinstance(part, nn.Linear) and path.endswith(ends):
                down = torch.randn(rank, part.in_features, generator=rng)
                up = torch.randn(part.out_features, rank, generator=rng)
                adapter = LowRank(down, up * 0.5 / (rank * part.in_features) ** 0.5)
                layers[f"{component}.{path.removeprefix('text_model.')}"] = adapter
    return LoRA(layers)


def trace(backbone: Backbone) -> dict[str, object]:
    """Everything that drawing could leave behind in a model."""
    pipeline = backbone.pipeline
    found: dict[str, object] = {
        "tokenizer": (id(backbone.tokenizer), id(pipeline.tokenizer), pipeline.tokenizer.get_vocab()),
        "embeddings": id(backbone.text_encoder.get_input_embeddings()),
        "sampler": dict(pipeline.scheduler.config),
    }
    for name in ("unet", "text_encoder", "vae"):
        module: nn.Module = getattr(pipeline, name)
        found[f"{name} modules"] = [
            (path, id(m), len(m._forward_hooks)) for path, m in module.named_modules()
        ]
        found[f"{name} weights"] = {key: t.numpy().tobytes() for key, t in module.state_dict().items()}
    return found


def install(assets: Path, patch: pytest.MonkeyPatch) -> None:
    """Put the toy base model, its concepts and a toy scorer in place of what ships."""
    base = replace(bases.BASES["storybook"], source=str(assets / "storybook"), size=SIDE, steps=3)
    patch.setitem(bases.BASES, "storybook", base)
    patch.setattr(bases, "ASSETS", assets)
    patch.setattr(scoring, "load", lambda name: ToyScorer())
    backbones.forget()


class ToyScorer:
    """Scores by mean colours and the prompt's length: quick, and different for different pictures and prompts."""

    name = "toy scorer"

    def reference(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self._embed(picture) for picture in pictures])

    def score(
        self, pictures: Sequence[Image.Image], prompt: str, references: Mapping[str, Tensor]
    ) -> list[scoring.Score]:
        return [
            scoring.Score.of(
                float(self._embed(picture)[0]) * len(prompt) / 100,
                {name: float((own @ self._embed(picture)).mean()) for name, own in references.items()},
            )
            for picture in pictures
        ]

    def _embed(self, picture: Image.Image) -> Tensor:
        colour = torch.from_numpy(np.asarray(picture, dtype=np.float32)).mean(dim=(0, 1))
        return colour / colour.norm()
