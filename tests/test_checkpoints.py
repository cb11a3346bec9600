"""Checkpoints as people have them: other names, other targets, parts that are missing, and models of another kind."""

from __future__ import annotations

import json
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from iteris_sd import backbone as backbones
from iteris_sd import bases, checkpoints, hub, memory, rendering, sd15, weights
from iteris_sd.backbone import Backbone
from iteris_sd.calibration import finish
from iteris_sd.errors import UserError
from iteris_sd.rendering import Settings
from tests.fake_hub import FakeHub
from tests.single_file import write

UNET = {**sd15.UNET, "block_out_channels": (32,) * 4, "layers_per_block": 2}
VAE = {**sd15.VAE, "block_out_channels": (32,) * 4, "layers_per_block": 1}
TEXT = {**sd15.TEXT, "num_hidden_layers": 1, "intermediate_size": 32}
TEXT_KEYS = "cond_stage_model.transformer."
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# What the model's own repository has for its scheduler.
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """A narrow model of v1.5's build, in halves."""
    return sd15.random_pipeline(UNET, VAE, TEXT).to(torch.float16)


@pytest.fixture(scope="module")
def tensors(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The same, as a single file names it."""
    return load_file(write(pipeline, tmp_path_factory.mktemp("files") / "whole.safetensors"))


@pytest.fixture(scope="module")
def published(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a folder with the scheduler's settings as they were published."""
    folder = tmp_path_factory.mktemp("folders") / "v1.5"
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED))
    return folder


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The narrow build in place of v1.5's; what a test makes known is forgotten after it."""
    monkeypatch.setattr(sd15.random_pipeline, "__defaults__", (UNET, VAE, TEXT, 0))
    monkeypatch.setattr(sd15, "TEXT", TEXT)
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))
    backbones.forget()
    yield
    backbones.forget()


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A folder of one's own; its files are linked, so write new ones and change none."""
    return Path(
        shutil.copytree(published, tmp_path / "mine", copy_function=lambda a, b: Path(b).hardlink_to(a))
    )


def loaded(path: Path) -> Backbone:
    return backbones.load(checkpoints.opened(str(path)).name)


def saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def rewritten(path: Path, change: Callable[[dict], object]) -> None:
    """Settings in a folder, changed."""
    data = json.loads(path.read_text())
    change(data)
    path.unlink()
    path.write_text(json.dumps(data))


def without(path: Path, name: str) -> None:
    """A file of weights in a folder, without one of them."""
    data = load_file(path)
    (key,) = (key for key in data if key.endswith(name))
    del data[key]
    path.unlink()
    save_file(data, path, {"format": "pt"})


def test_a_file_draws_what_the_folder_draws(
    published: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    one, other = loaded(published), loaded(saved(tensors, tmp_path / "file.safetensors"))
    assert torch.equal(one.encode(["a dog"]), other.encode(["a dog"]))
    for sampler in rendering.SAMPLERS:
        settings = Settings(sampler, 3, 7.5, 64)
        made = [finish(rendering.render(b, "a dog", "", [1], settings))[0] for b in (one, other)]
        assert torch.allclose(made[0].latents, made[1].latents, rtol=1e-3, atol=1e-2), sampler
        assert np.abs(np.subtract(*(np.asarray(m.image, dtype=int) for m in made))).max() <= 1, sampler
        assert float(made[0].latents.abs().max()) > 1  # a sampler that bounds them would be seen


@pytest.mark.parametrize("used", [False, True])
def test_a_large_model_is_let_go_before_the_next_is_loaded(
    used: bool, toy: Path, published: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever still uses it keeps it; the built-in one stays, since it is small."""
    small, first = backbones.load("storybook"), loaded(published)
    states = first.encode(["a dog"])
    kept, gone = (first if used else None), weakref.ref(first)
    del first
    there: list[bool] = []
    place = memory.place

    def told(*args: Any) -> None:
        there.append(gone() is not None)
        place(*args)

    monkeypatch.setattr(memory, "place", told)
    second = loaded(folder)
    assert there == [used] and backbones.load("storybook") is small and loaded(folder) is second
    if kept is not None:
        assert torch.equal(kept.encode(["a dog"]), states)


def test_a_model_that_is_not_there_takes_no_other_s_place(toy: Path, published: Path, folder: Path) -> None:
    first = loaded(published)
    name = checkpoints.opened(str(folder)).name
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no longer at"):
        backbones.load(name)
    assert loaded(published) is first


def test_the_settings_of_a_file_s_scheduler_are_those_that_were_published(tmp_path: Path) -> None:
    sd15.write_configuration(tmp_path)
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert written == {name: value for name, value in PUBLISHED.items() if name != "_diffusers_version"}


def test_a_text_encoder_s_keys_may_lack_a_level(
    pipeline: StableDiffusionPipeline, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    renamed = {key.replace("transformer.text_model.", "transformer."): t for key, t in tensors.items()}
    renamed[f"{TEXT_KEYS}embeddings.position_ids"] = torch.arange(77)[None]
    found = loaded(saved(renamed, tmp_path / "novel.safetensors")).text_encoder.state_dict()
    wanted = pipeline.text_encoder.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].float()) for name in wanted)


@pytest.mark.parametrize(
    ("lacks", "sentence"),
    [
        (
            f"{TEXT_KEYS}text_model.encoder.layers.0.mlp.fc1.weight",
            "its text encoder has no .*mlp.fc1.weight",
        ),
        ("model.diffusion_model.output_blocks.3.1.proj_in.weight", "it lacks weights; download it again"),
        ("first_stage_model.decoder.conv_out.bias", "it lacks weights; download it again"),
    ],
)
def test_a_file_that_lacks_a_weight_is_refused(
    tensors: dict[str, Tensor], tmp_path: Path, lacks: str, sentence: str
) -> None:
    path = saved({key: t for key, t in tensors.items() if key != lacks}, tmp_path / "cut.safetensors")
    assert lacks in tensors
    with pytest.raises(UserError, match=f"The weights of cut at .* cannot be loaded: {sentence}"):
        loaded(path)


@pytest.mark.parametrize(
    ("part", "file", "lacks", "sentence"),
    [
        ("text_encoder", "model", "layers.0.mlp.fc1.weight", "its text encoder has no .*mlp.fc1.weight"),
        ("unet", "diffusion_pytorch_model", "conv_in.weight", "it has no unet.conv_in.weight"),
    ],
)
def test_a_folder_that_lacks_a_weight_is_refused(
    folder: Path, part: str, file: str, lacks: str, sentence: str
) -> None:
    without(folder / part / f"{file}.safetensors", lacks)
    with pytest.raises(UserError, match=f"The weights of mine at .* cannot be loaded: {sentence}"):
        loaded(folder)


def test_a_tokenizer_without_settings_ends_where_the_text_encoder_does(published: Path, folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    mine = loaded(folder)
    assert mine.tokenizer.model_max_length == sd15.POSITIONS
    assert torch.equal(mine.encode(["a (dog:1.2)", ""]), loaded(published).encode(["a (dog:1.2)", ""]))


@pytest.mark.parametrize(
    "lacks",
    [
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "text_encoder/config.json",
    ],
)
def test_a_folder_without_a_part_is_refused(folder: Path, lacks: str) -> None:
    (folder / lacks).unlink()
    with pytest.raises(
        UserError, match=f"has no {lacks}, which a base model needs; download the whole folder"
    ):
        checkpoints.opened(str(folder))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("diffusion_pytorch_model.bin", "there is .*bin: a pickle can run any code .*use_safetensors=False"),
        (
            "diffusion_pytorch_model.non_ema.safetensors",
            "there is .*non_ema.safetensors: rename what is meant",
        ),
        ("README.md", "there are no weights: rename what is meant, or download the whole folder again"),
    ],
)
def test_weights_that_are_not_read_are_named(folder: Path, name: str, sentence: str) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / name)
    with pytest.raises(UserError, match=f"unet has no diffusion_pytorch_model.safetensors or .*{sentence}"):
        checkpoints.opened(str(folder))


def test_a_folder_of_mixed_variants_is_refused_before_it_is_loaded(folder: Path) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match="weights of some parts as fp16 only and of others not"):
        checkpoints.opened(str(folder))


@pytest.mark.parametrize("checker", [True, False])
def test_a_folder_without_what_prepares_pictures_loads_without_a_checker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checker: bool
) -> None:
    """Its index names both all the same."""
    named = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    rewritten(folder / "model_index.json", lambda data: data.update(named))
    if checker:
        (folder / "safety_checker").mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / "safety_checker" / name).touch()
    assert loaded(folder).pipeline.safety_checker is None
    monkeypatch.setenv("ITERIS_SD_SAFETY", "on")
    assert weights.safety(bases.find(str(folder))) == "off, this model has none"


@pytest.mark.parametrize(
    ("channels", "kind"), [(9, "for inpainting"), (8, "InstructPix2Pix"), ([4], "another kind")]
)
def test_a_model_that_reads_more_than_latents_is_named(
    tmp_path: Path, folder: Path, channels: object, kind: str
) -> None:
    rewritten(folder / "unet" / "config.json", lambda data: data.update(in_channels=channels))
    with pytest.raises(UserError, match=rf"mine is .*{kind}.*: its U-Net reads .* channels; choose a model"):
        checkpoints.opened(str(folder))
    if isinstance(channels, int):
        shapes = {TO_K: (32, 768), FIRST: (32, channels, 3, 3)}
        path = saved({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=f"x.safetensors is .*{kind}"):
            checkpoints.opened(str(path))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["model.diffusion_model.joint_blocks.0.x"], "is Stable Diffusion 3; this project"),
        (["model.diffusion_model.double_blocks.0.x"], "is Flux; this project"),
        (["model.diffusion_model.label_emb.0.0.weight"], "is Stable Diffusion XL; this project"),
        ([TO_K, f"{TEXT_KEYS}x"], r"has no VAE \(first_stage_model.…\); choose a whole checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, keys: list[str], sentence: str) -> None:
    path = saved({key: torch.zeros(1, 768) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=sentence):
        checkpoints.opened(str(path))


VELOCITY = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("metadata", "more", "settings", "schedule"),
    [
        ({}, [], None, {}),
        ({"modelspec.prediction_type": "epsilon"}, ["ztsnr"], "model: {}", {}),
        ({"modelspec.prediction_type": "v"}, [], None, VELOCITY),
        ({}, ["v_pred"], None, VELOCITY),
        ({}, ["v_pred", "ztsnr"], None, VELOCITY | ZERO),
        ({}, [], 'model: {params: {parameterization: "v"}}', VELOCITY),
        ({}, [], "model: {params: {parameterization: eps}}", {}),
        ({}, [], "[1, 2]", {}),
    ],
)
def test_a_file_says_what_its_u_net_predicts(
    tmp_path: Path,
    metadata: dict[str, str],
    more: list[str],
    settings: str | None,
    schedule: dict[str, object],
) -> None:
    keys = dict.fromkeys((TO_K, f"{TEXT_KEYS}x", "first_stage_model.x"), torch.zeros(1, 768))
    path = saved(
        {k: t.clone() for k, t in (keys | dict.fromkeys(more, torch.zeros(0))).items()},
        tmp_path / "v.safetensors",
        metadata,
    )
    if settings is not None:
        path.with_suffix(".yaml").write_text(settings)
    assert checkpoints.noise_schedule(path) == schedule
    assert checkpoints.opened(str(path)).prediction == ("v" if schedule else "epsilon")


@pytest.mark.parametrize("settings", ["a: [", "!!python/object/apply:os.getcwd []", "[" * 5000, "\x00"])
def test_settings_that_cannot_be_read_are_told_of(tmp_path: Path, settings: str) -> None:
    path = saved({"x": torch.zeros(1)}, tmp_path / "v.safetensors")
    path.with_suffix(".yaml").write_text(settings)
    with pytest.raises(
        UserError, match="v.yaml, the settings of the checkpoint, cannot be read; mend or remove"
    ):
        checkpoints.noise_schedule(path)


def test_every_sampler_draws_by_velocity_up_to_pure_noise(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    mine = loaded(saved({**tensors, **marks}, tmp_path / "v.safetensors"))
    assert mine.base.prediction == "v"
    for name in rendering.SAMPLERS:
        sampler = rendering.scheduler(mine, Settings(name, 4))
        assert sampler.config.prediction_type == "v_prediction" and sampler.config.rescale_betas_zero_snr
        assert finish(rendering.render(mine, "a dog", "", [1], Settings(name, 3, 4.0, 64)))


def test_a_folder_s_target_is_what_loras_for_it_say(folder: Path) -> None:
    assert checkpoints.opened(str(folder)).prediction == "epsilon"
    bases.BASES.pop(str(folder))
    rewritten(folder / "scheduler" / "scheduler_config.json", lambda data: data.update(VELOCITY))
    assert checkpoints.opened(str(folder)).prediction == "v"


def test_a_folder_is_called_by_its_whole_name(published: Path) -> None:
    assert checkpoints.opened(str(published)).title == "v1.5"


def test_a_base_that_was_moved_is_told_of(folder: Path) -> None:
    name = checkpoints.opened(str(folder)).name
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="The base model mine is no longer at .*mine; put it back, or choose"):
        backbones.load(name)


def test_a_path_that_is_not_there_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(
        UserError, match=r"There is no file or folder my\.safetensors\. There is no base model"
    ):
        checkpoints.opened("my.safetensors")
    with pytest.raises(UserError) as told:
        checkpoints.opened("~/my.safetensors")
    assert str(told.value).startswith(f"There is no file or folder {tmp_path / 'my.safetensors'}. ")
    with pytest.raises(UserError, match="^There is no base model 'sdxl'"):
        checkpoints.opened("sdxl")


def test_a_path_may_begin_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder.parent))
    assert checkpoints.opened("~/mine").name == str(folder)


def test_the_libraries_are_quiet_while_a_file_is_loaded(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [caplog.handler])
    loaded(saved(tensors, tmp_path / "file.safetensors"))
    assert not caplog.records
    assert before == [logger.level for logger in loggers] and logging.CRITICAL not in before


def test_too_many_requests_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub({"us/model": {}}).running() as fake:
        fake.stand_in(monkeypatch, tmp_path / "cache")
        fake.down = 429
        with pytest.raises(
            UserError, match="too many requests .* to give us/model now; .*log in with `hf auth"
        ):
            hub.listing("us/model")
