"""Shapes of Storybook's parts, and how they are put into one diffusers folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

TEXT_WIDTH = 128
TEXT_LAYERS = 3
TEXT_HEADS = 4
LATENT_CHANNELS = 6
TEXT_LENGTH = 48  # captions have at most 25 tokens; a long prompt in rare words about 40
VOCABULARY = 1024
SHARD = "9MB"  # a Space's git push refuses files over 10 MB

# Words later worlds will draw: known to the tokenizer from the start, so that its size never changes.
FUTURE_WORDS = """
house tree boat fox penguin elephant horse robot backpack bicycle lamp ball vase candle pumpkin cactus balloon
castle street garden space dusk dawn rain autumn drawing sketch standing behind under between three two with
colourful bright dark tall tiny huge fluffy shiny silver turquoise lavender cream teal navy mint violet lime
bandana scarf heart star bow plushy toy
""".split()  # noqa: SIM905 - a hundred quoted words are harder to read


def autoencoder() -> AutoencoderKL:
    """128 px to 16×16×6 and back.  Few channels at full resolution: that is where the time would go.

    All channels are normalised together: small groups would lose a picture's overall colours.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=128,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """Nine million parameters; attention at 8×8 and 4×4 only, where 64 places are enough to say what goes where.

    Self-attention over 256 places took half of a training step and made no picture better that we saw.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of the shape of the scorer's text tower."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=TEXT_HEADS,
            max_position_embeddings=TEXT_LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def with_text_tower(text_encoder: CLIPTextModel, clip: Mapping[str, Tensor]) -> CLIPTextModel:
    """The text encoder with the weights of an open_clip model's text tower, as Stable Diffusion's is CLIP's."""
    own: dict[str, Tensor] = {
        "embeddings.token_embedding.weight": clip["token_embedding.weight"],
        "embeddings.position_embedding.weight": clip["positional_embedding"],
        "final_layer_norm.weight": clip["ln_final.weight"],
        "final_layer_norm.bias": clip["ln_final.bias"],
    }
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for k in range(TEXT_LAYERS):
        block, layer = f"transformer.resblocks.{k}", f"encoder.layers.{k}"
        for kind in ("weight", "bias"):
            for mine, theirs in names.items():
                own[f"{layer}.{mine}.{kind}"] = clip[f"{block}.{theirs}.{kind}"]
            parts = clip[f"{block}.attn.in_proj_{kind}"].chunk(3)
            for mine, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                own[f"{layer}.self_attn.{mine}.{kind}"] = part
    # Module names may begin with "text_model.", as the version of transformers has it.
    full = {
        n: own[n.removeprefix("text_model.")].float()
        for n in text_encoder.state_dict()
        if "position_ids" not in n
    }
    text_encoder.load_state_dict(full, strict=False)
    return text_encoder


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


def save(part: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Write a part's weights in fp16 shards, in place of those that were there.

    The configuration asks for float32, since a pipeline of both precisions cannot draw, and names no folder of the
    machine that wrote it.
    """
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    part.half().save_pretrained(folder, max_shard_size=SHARD)
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    if "dtype" in settings:
        settings["dtype"] = "float32"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def kept_tokenizer(folder: Path, captions: Sequence[Sequence[str]]) -> CLIPTokenizer:
    """The tokenizer in `folder`, learnt from the first captions if there is none."""
    if not (folder / "vocab.json").exists():
        return train_tokenizer((c for wordings in captions[:6000] for c in wordings), folder)
    return CLIPTokenizer.from_pretrained(folder)


def train_tokenizer(captions: Iterable[str], directory: Path) -> CLIPTokenizer:
    """Learn a small byte-level vocabulary in CLIP's format; any text tokenises.

    CLIP marks the end of a word with `</w>`: every byte exists with and without it, then come the merges. The same
    captions always give the same numbers, which `tokenizers`' own trainer does not promise.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Counter(word for text in captions for word in text.lower().replace(",", " ,").split())
    words.update(dict.fromkeys(FUTURE_WORDS, 4))
    symbols = alphabet + [f"{s}</w>" for s in alphabet]
    merges = _merges(words, VOCABULARY - 2 - len(symbols))
    symbols += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({symbol: k for k, symbol in enumerate(symbols)})
    (directory / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = "\n".join(" ".join(pair) for pair in merges)
    (directory / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(directory / "vocab.json"),
        merges=str(directory / "merges.txt"),
        model_max_length=TEXT_LENGTH,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def _merges(words: Mapping[str, int], most: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv 1508.07909): at most `most` merges, the commonest pair first, ties by spelling."""
    parts = {word: (*word[:-1], f"{word[-1]}</w>") for word in words}
    found: dict[tuple[str, str], None] = {}
    known: set[str] = set()
    while len(found) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in parts.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        # The same text may come about by two merges; it must have one number.
        pairs = Counter({p: n for p, n in pairs.items() if "".join(p) not in known})
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        found[best] = None
        known.add("".join(best))
        parts = {word: _merged(pieces, best) for word, pieces in parts.items()}
    return list(found)


def _merged(pieces: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """The pieces of a word with each occurrence of a pair made one."""
    done: list[str] = []
    for piece in pieces:
        if done and (done[-1], piece) == pair:
            done[-1] += piece
        else:
            done.append(piece)
    return tuple(done)
