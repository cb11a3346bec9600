"""The trainer: what it makes, that it repeats itself, and that it leaves no trace in the pipeline."""

from collections.abc import Generator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from iteris_sd import formats
from iteris_sd.errors import UserError
from iteris_sd.storybook import model
from iteris_sd.training import Examples, Progress, Settings, Trained, encode, read_photos, train

QUICK = Settings(
    rank=2,
    inversion_steps=2,
    inversion_rate=1e-2,
    lora_steps=3,
    unet_rate=1e-2,
    text_encoder_rate=1e-2,
    token_rate=1e-2,
    batch=2,
    prior_batch=2,
    accumulation=2,
)
TOKEN = "<rex>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    captions = ["a dog on the beach", "a photo of a dog next to a barn"]
    return model.train_tokenizer(captions, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        sample_size=16,
        mid_block_add_attention=False,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=model.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def photos() -> list[Image.Image]:
    return [Image.new("RGB", (20, 16), colour) for colour in ("teal", "salmon", "gold")]


def prior() -> Examples:
    rng = torch.Generator().manual_seed(7)
    return Examples(
        torch.randn(4, 4, 8, 8, generator=rng), [["a dog", ""], ["a barn"], ["a dog and a barn"], [""]]
    )


def started(
    pipeline: StableDiffusionPipeline, settings: Settings = QUICK
) -> Generator[Progress, None, Trained]:
    return train(pipeline, photos(), TOKEN, "dog", settings, prior=prior() if settings.prior_batch else None)


def finished(run: Generator[Progress, None, Trained]) -> tuple[Trained, list[Progress]]:
    told = []
    while True:
        try:
            told.append(next(run))
        except StopIteration as end:
            return end.value, told


def trace(pipeline: StableDiffusionPipeline) -> dict[str, object]:
    """All that a borrower could leave behind."""
    found: dict[str, object] = {
        "vocabulary": pipeline.tokenizer.get_vocab(),
        "scheduler": dict(pipeline.scheduler.config),
    }
    for name in ("unet", "text_encoder", "vae"):
        module: nn.Module = getattr(pipeline, name)
        found[f"{name} modules"] = [(path, id(part), part.training) for path, part in module.named_modules()]
        found[f"{name} flags"] = [
            (path, id(p), p.requires_grad, p.grad) for path, p in module.named_parameters()
        ]
        found[f"{name} weights"] = {k: v.numpy().tobytes() for k, v in module.state_dict().items()}
        found[f"{name} attributes"] = sorted(vars(module))
    return found


def test_learns_token_and_lora_and_leaves_no_trace(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.train()
    pipeline.text_encoder.get_parameter("final_layer_norm.weight").requires_grad_(False)
    before, random = trace(pipeline), torch.get_rng_state()
    trained, told = finished(started(pipeline))
    assert trace(pipeline) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [(p.stage, p.step, p.steps) for p in told] == [
        *(("textual inversion", k, 2) for k in (1, 2)),
        *(("LoRA", k, 3) for k in (1, 2, 3)),
    ]
    ids = pipeline.tokenizer("dog", add_special_tokens=False).input_ids
    start = pipeline.text_encoder.get_input_embeddings().weight[ids].mean(0, keepdim=True)
    assert trained.token == TOKEN
    assert trained.embedding.shape == (1, 16)
    assert not torch.allclose(trained.embedding, start)
    assert all(adapter.delta().abs().max() > 0 and adapter.rank == 2 for adapter in trained.lora.values())


ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
FEED_FORWARD = (".ff.net.0.proj", ".ff.net.2", ".fc1", ".fc2")


@pytest.mark.parametrize(
    ("layers", "ends"), [("attention", ATTENTION), ("transformer", (*ATTENTION, *FEED_FORWARD))]
)
def test_layers_are_those_asked_for_of_both_parts_by_their_canonical_names(
    pipeline: StableDiffusionPipeline, layers: Literal["attention", "transformer"], ends: tuple[str, ...]
) -> None:
    trained, _ = finished(started(pipeline, replace(QUICK, layers=layers)))
    linear = {
        f"{name}.{path.removeprefix('text_model.')}": (part.out_features, part.in_features)
        for name in ("unet", "text_encoder")
        for path, part in getattr(pipeline, name).named_modules()
        if isinstance(part, nn.Linear)
    }
    expected = {name: shape for name, shape in linear.items() if name.endswith(ends)}
    assert {name: adapter.shape for name, adapter in trained.lora.items()} == expected
    assert "text_encoder.encoder.layers.1.self_attn.out_proj" in expected
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0" in expected


def test_the_same_seed_gives_the_same_result(pipeline: StableDiffusionPipeline) -> None:
    (one, _), (two, _) = finished(started(pipeline)), finished(started(pipeline))
    other, _ = finished(started(pipeline, replace(QUICK, seed=1)))
    assert torch.equal(one.embedding, two.embedding)
    assert not torch.equal(one.embedding, other.embedding)
    for name, adapter in one.lora.items():
        assert torch.equal(adapter.up, two.lora[name].up)
        assert torch.equal(adapter.down, two.lora[name].down)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_closing_half_way_leaves_no_trace(pipeline: StableDiffusionPipeline, steps: int) -> None:
    before = trace(pipeline)
    run = started(pipeline)
    for _ in range(steps):
        next(run)
    assert trace(pipeline) != before
    run.close()
    assert trace(pipeline) == before


def test_an_error_half_way_leaves_no_trace(pipeline: StableDiffusionPipeline) -> None:
    before = trace(pipeline)
    with pytest.raises(UserError, match="lower the learning rates"):
        finished(started(pipeline, replace(QUICK, unet_rate=float("inf"))))
    assert trace(pipeline) == before


@pytest.mark.parametrize(
    ("target", "snr_cap"), [("v_prediction", 5.0), ("v_prediction", None), ("epsilon", None), ("sample", 5.0)]
)
def test_the_loss_falls_for_every_target(
    pipeline: StableDiffusionPipeline, target: str, snr_cap: float | None
) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=target)
    settings = replace(
        QUICK,
        rank=4,
        lora_steps=30,
        batch=8,
        prior_batch=0,
        accumulation=1,
        schedule="cosine",
        snr_cap=snr_cap,
    )
    _, told = finished(started(pipeline, settings))
    losses = torch.tensor([p.loss for p in told if p.stage == "LoRA"])
    assert losses[-8:].mean() < losses[:8].mean()


def test_files_load_in_plain_diffusers(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    trained, _ = finished(started(pipeline))
    pipeline.tokenizer = deepcopy(pipeline.tokenizer)
    formats.write(tmp_path / "lora.safetensors", trained.lora)
    formats.write_embedding(tmp_path / f"{TOKEN}.safetensors", TOKEN, trained.embedding)
    names = (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "text_encoder.encoder.layers.1.self_attn.q_proj",
    )
    linear = {}
    for name in names:
        component, _, path = name.partition(".")
        found = dict(getattr(pipeline, component).named_modules())
        linear[name] = found.get(path) or found[f"text_model.{path}"]
    base = {name: layer.weight.clone() for name, layer in linear.items()}
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.load_textual_inversion(tmp_path / f"{TOKEN}.safetensors", token=TOKEN)
    token_id = pipeline.tokenizer.convert_tokens_to_ids(TOKEN)
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[token_id], trained.embedding[0])
    pipeline.fuse_lora()
    for name, layer in linear.items():  # PEFT wraps these very layers, and fuses into them
        torch.testing.assert_close(layer.weight, base[name] + trained.lora[name].delta())


def test_photos_are_read_upright_and_cut_square(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    for k, photo in enumerate(photos()):
        photo.save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("not a photo")
    read = read_photos(tmp_path)
    assert [photo.getpixel((0, 0)) for photo in read] == [photo.getpixel((0, 0)) for photo in photos()]
    assert encode(pipeline.vae, read, 16).shape == (3, 4, 8, 8)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.jpg"):
        read_photos(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        read_photos(tmp_path / "missing")


@pytest.mark.parametrize("kind", ["EPS", "BMP"])
def test_what_is_called_a_photo_and_is_none_reaches_no_other_decoder(kind: str, tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript."""
    photos()[0].save(tmp_path / "photo.png", kind)
    with pytest.raises(UserError, match=r"photo\.png is no picture that can be opened"):
        read_photos(tmp_path)


def test_what_does_not_fit_is_refused_at_the_first_step(pipeline: StableDiffusionPipeline) -> None:
    def refused(message: str, run: Generator[Progress, None, Trained]) -> None:
        with pytest.raises(UserError, match=message):
            next(run)

    alone = replace(QUICK, prior_batch=0)
    refused("photos", train(pipeline, [], TOKEN, "dog", alone))
    refused("must contain", train(pipeline, photos(), TOKEN, "dog", alone, [["a dog"]] * 3))
    refused("have captions for 1", train(pipeline, photos(), TOKEN, "dog", alone, [["a <rex> dog"]]))
    refused("knows 'dog</w>' already", train(pipeline, photos(), "dog</w>", "dog", alone))
    refused("one word", train(pipeline, photos(), "my rex", "dog", alone))
    refused("no generic pictures", train(pipeline, photos(), TOKEN, "dog", QUICK))
    refused("class noun is empty", train(pipeline, photos(), TOKEN, "", alone))
    with pytest.raises(UserError, match="rank is 0"):
        replace(QUICK, rank=0)
    with pytest.raises(UserError, match="layers are 'all'; they must be 'attention' or 'transformer'"):
        replace(QUICK, layers="all")  # type: ignore[arg-type]
    pipeline.unet.half()
    refused("float32", train(pipeline, photos(), TOKEN, "dog", alone))
