"""Shapes of Storybook's parts, and how they are put into one diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 256
TEXT_LENGTH = 77
VOCABULARY = 1024
SHARD = "9MB"  # a Space's git push refuses files over 10 MB

# Words later worlds will draw: known to the tokenizer from the start, so that its size never changes.
FUTURE_WORDS = """
house tree boat rabbit duck fox owl penguin elephant horse robot backpack teapot car bicycle chair lamp ball
vase candle mushroom pumpkin cactus umbrella balloon castle forest desert city street kitchen garden lake space
sunset night morning dusk dawn rain autumn watercolour painting drawing sketch wearing sitting standing behind
on top of under between three two colourful bright dark tall tiny huge fluffy shiny wooden golden silver
turquoise lavender cream teal navy mint violet lime bandana scarf heart star bow photo picture illustration
""".split()  # noqa: SIM905 - a hundred quoted words are harder to read


def autoencoder() -> AutoencoderKL:
    """128 px to 16×16×4 and back.  Eight channels at full resolution: that is where the time would go.

    All channels are normalised together: groups of one or two of the eight would lose a picture's overall colours.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=128,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """Ten million parameters, cross-attention at every level (16×16, 8×8, 4×4)."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(96, 144, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of three layers, trained together with the U-Net."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule, with velocity as the target."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def train_tokenizer(captions: Iterable[str], directory: Path) -> CLIPTokenizer:
    """Learn a small byte-level vocabulary in CLIP's format; any text tokenises.

    CLIP marks the end of a word with `</w>`: every byte exists with and without it, then come the merges.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4 * VOCABULARY,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator([*captions, *FUTURE_WORDS * 4], trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    symbols = sorted(alphabet) + [f"{s}</w>" for s in sorted(alphabet)]
    words: list[str] = list(symbols)
    kept: list[tuple[str, ...]] = []
    for left, right in merges:
        if len(words) >= VOCABULARY - 2:
            break
        if left + right not in words:
            words.append(left + right)
            kept.append((left, right))
    words += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({w: k for k, w in enumerate(words)}), encoding="utf-8")
    lines = "\n".join(" ".join(pair) for pair in kept)
    (directory / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(directory / "vocab.json"),
        merges=str(directory / "merges.txt"),
        model_max_length=TEXT_LENGTH,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer
