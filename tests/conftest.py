"""What several test files need: the toy base model in place of the shipped one."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may look for a model on the network
os.environ["ITERIS_SD_DATA"] = tempfile.mkdtemp(prefix="iteris-sd-tests-")  # nor at what a person keeps

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from iteris_sd import backbone as backbones
from iteris_sd import merger
from iteris_sd.backbone import Backbone
from tests import toybook


@pytest.fixture(scope="session")
def toy_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `assets/`, with a tiny random base model and three concepts."""
    assets = tmp_path_factory.mktemp("assets")
    toybook.write(assets)
    return assets


@pytest.fixture
def toy(toy_assets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy assets in place of the shipped ones, for whoever asks by name."""
    toybook.install(toy_assets, monkeypatch)
    merger.forget()
    yield toy_assets
    backbones.forget()
    merger.forget()


@pytest.fixture
def backbone(toy: Path) -> Backbone:
    """The toy base model."""
    return backbones.load("storybook")


@pytest.fixture
def tiny_sd() -> StableDiffusionPipeline:
    """A random Stable Diffusion of a few thousand parameters, built in memory."""
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz<>", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz<>")]
    vocabulary = {t: i for i, t in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
