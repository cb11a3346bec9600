"""Stable Diffusion v1.5's shapes and tokenizer, against what is known of the real model."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from iteris_sd import sd15


def test_it_has_the_real_models_numbers_of_parameters() -> None:
    with torch.device("meta"):
        pipeline = sd15.random_pipeline()
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [859_520_964, 123_060_480, 83_653_863]


@pytest.mark.parametrize(
    "text", ["a photo of a <v> dog, next to a red barn!", "naïve café 123 (word:1.2)", ""]
)
def test_its_tokenizer_is_clips(text: str) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()(text)[0].tolist()
    ours = sd15.tokenizer()(text).input_ids
    assert ours == theirs[: len(ours)]
    assert ours[0] == 49406 and ours[-1] == 49407


def test_its_configuration_is_written_as_diffusers_reads_it(tmp_path: Path) -> None:
    sd15.write_configuration(tmp_path)
    config = StableDiffusionPipeline.load_config(tmp_path)
    assert {name for name in config if not name.startswith("_")} >= {
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
    }
    for part in ("unet", "vae", "text_encoder"):
        assert (tmp_path / part / "config.json").is_file()
