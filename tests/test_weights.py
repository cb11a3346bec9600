"""Base models from elsewhere: in a folder, in one file, in the Hub's cache; refused when they are something else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import save_file

from iteris_sd import backbone as backbones
from iteris_sd import bases, checkpoints, composer, formats, memory, sd15, weights
from iteris_sd.benchmarks.problems import random_lora
from iteris_sd.calibration import finish
from iteris_sd.concepts import Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe

SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 4,
}
SMALL_VAE = {"block_out_channels": (32,), "sample_size": 8}
SMALL_TEXT = {**sd15.TEXT, "num_hidden_layers": 1, "intermediate_size": 32}
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow model that reads text as Stable Diffusion v1.5 does, as a folder of halves."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    pipeline = sd15.random_pipeline(SMALL_UNET, SMALL_VAE, SMALL_TEXT).to(torch.float16)
    pipeline.save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test makes known is forgotten after it."""
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))
    yield
    backbones.forget()


def test_a_diffusers_folder_is_a_base_of_its_family(small: Path) -> None:
    base = checkpoints.opened(str(small))
    assert (base.name, base.title, base.family, base.size) == (str(small), "mine", "sd15", 512)
    assert bases.find(str(small)) == base and weights.located(base) == small
    assert weights.variant(small) == "fp16"
    backbone = backbones.load(str(small))
    assert backbone.dtype == torch.float32 and backbone.unet.config.cross_attention_dim == 768
    assert backbone.encode(["a dog"]).shape == (1, 77, 768)
    assert backbone.pipeline.safety_checker is None


def test_precision_can_be_told(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = checkpoints.opened(str(small)).name
    monkeypatch.setenv("ITERIS_SD_DTYPE", "bf16")
    assert backbones.load(name).dtype == torch.bfloat16
    backbones.forget()
    monkeypatch.setenv("ITERIS_SD_DTYPE", "int4")
    with pytest.raises(UserError, match="ITERIS_SD_DTYPE is 'int4'; choose one of fp32, fp16, bf16"):
        backbones.load(name)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_whole_road_in_either_precision(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("ITERIS_SD_DTYPE", precision)
    base = checkpoints.opened(str(small)).name
    backbone = backbones.load(base)
    touched = {name: layer for name, layer in backbone.layers.items() if "attn" in name}
    concepts = {}
    for seed, name in enumerate(("dog", "barn")):
        path = tmp_path / f"{name}.safetensors"
        formats.write(path, random_lora(touched, 2, seed), {})
        concepts[name] = Concept(name, name, f"sks{seed} {name}", name, path, base="sd15")
    asked = Recipe.of(
        {
            "base": base,
            "concepts": [{"name": "dog"}, {"name": "barn"}],
            "prompt": "a ({0}:1.2) next to a {1}",
            "methods": [{"name": "iteris"}, {"name": "linear"}],
            "seeds": [0],
            "sampler": "dpm++",
            "steps": 2,
            "size": 64,
            "scorer": "none",
            "calibration": {"samples": 4, "steps": 2, "unconditional": 1},
        }
    )
    made = finish(composer.compose(asked, Library(concepts)))
    assert [picture.image.size for picture in made.pictures] == [(64, 64)] * 2
    reports = made.merged["iteris"].reports
    assert all(r.method == "iteris" and r.residual is not None for r in reports)
    assert all(bool(a.up.isfinite().all()) for a in made.merged["iteris"].lora.values())


def test_a_damaged_folder_is_told_of(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in small.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(small)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(small)).write_bytes(file.read_bytes())
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="The weights of broken at .* cannot be loaded"):
        backbones.load(checkpoints.opened(str(copy)).name)


@pytest.mark.parametrize(
    ("index", "unet", "message"),
    [
        (None, None, "no base model in diffusers' layout: model_index.json cannot be read"),
        ("StableDiffusionXLPipeline", 2048, "holds a StableDiffusionXLPipeline"),
        ("StableDiffusionPipeline", 1024, "is Stable Diffusion 2; this project composes with"),
        ("StableDiffusionPipeline", 32, "a model whose text states are 32 wide"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, index: str | None, unet: int | None, message: str
) -> None:
    if index is not None:
        (tmp_path / "unet").mkdir()
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": index}))
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": unet}))
    with pytest.raises(UserError, match=message):
        checkpoints.opened(str(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({TO_K: (320, 768)}, r"has no text encoder \(cond_stage_model.transformer.…\)"),
        ({TO_K: (320, 1024)}, "is Stable Diffusion 2"),
        ({"conditioner.embedders.0.x": (2, 2)}, "is Stable Diffusion XL"),
        ({"lora_unet_x.lora_down.weight": (2, 2)}, "If it is a LoRA, pick it as a concept"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, tensors: dict[str, tuple[int, int]], message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in tensors.items()}, path)
    with pytest.raises(UserError, match=message):
        checkpoints.opened(str(path))


def test_a_pickle_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "v1-5.ckpt").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(UserError, match="v1-5.ckpt cannot be the base model: .* pickle"):
        checkpoints.opened(str(tmp_path / "v1-5.ckpt"))
    with pytest.raises(UserError, match="There is no base model '/no/where'; choose one of storybook, sd15"):
        checkpoints.opened("/no/where")


def test_ids_on_the_hub_are_allowed_or_not() -> None:
    assert bases.find("stable-diffusion-v1-5/stable-diffusion-v1-5").name == "sd15"
    assert bases.find("Lykon/dreamshaper-8").family == "sd15"
    with pytest.raises(UserError, match="There is no base model 'someone/model'"):
        bases.find("someone/model")


def test_what_is_fetched_of_a_repository() -> None:
    plain = {
        "model_index.json": 1,
        "README.md": 1,
        "v1-5-pruned.ckpt": 9,
        "scheduler/scheduler_config.json": 1,
        "tokenizer/vocab.json": 1,
        "tokenizer/merges.txt": 1,
        "feature_extractor/preprocessor_config.json": 1,
        **{f"{part}/config.json": 1 for part in ("unet", "vae", "text_encoder", "safety_checker")},
        **{f"{part}/diffusion_pytorch_model.safetensors": 5 for part in ("unet", "vae")},
        **{f"{part}/model.safetensors": 5 for part in ("text_encoder", "safety_checker")},
        **{f"{part}/diffusion_pytorch_model.bin": 5 for part in ("unet", "vae")},
    }
    needed = weights.needed(plain)
    assert "v1-5-pruned.ckpt" not in needed and "README.md" not in needed and len(needed) == 13
    assert not any(name.endswith(".bin") for name in needed)
    halves = {n.replace(".safetensors", ".fp16.safetensors"): 3 for n in plain if n.endswith(".safetensors")}
    both = weights.needed({**plain, **halves})
    assert sum(name.endswith(".fp16.safetensors") for name in both) == 4 and len(both) == 13
    with pytest.raises(UserError, match="no weights as safetensors"):
        weights.needed({"model_index.json": 1, "unet/diffusion_pytorch_model.bin": 5})


WHOLE = (
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
    "text_encoder/model.safetensors",
)
EXTRACTOR = "feature_extractor/preprocessor_config.json"
CHECKER = ("safety_checker/config.json", "safety_checker/model.safetensors", EXTRACTOR)
NEW, FORMER = "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ITERIS_SD_SAFETY", raising=False)
    return tmp_path / "cache"


def snapshot(cache: Path, repo: str, commit: str, names: Iterable[str], main: bool = False) -> Path:
    """A cached snapshot of empty files."""
    home = cache / f"models--{repo.replace('/', '--')}"
    for name in names:
        (home / "snapshots" / commit / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "snapshots" / commit / name).touch()
    if main:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(commit)
    return home / "snapshots" / commit


@pytest.mark.parametrize("lacks", WHOLE)
def test_a_newer_snapshot_that_is_not_whole_does_not_hide_an_older_one(cache: Path, lacks: str) -> None:
    base = bases.find("sd15")
    assert weights.located(base) is None
    part = [name for name in WHOLE if name != lacks]
    snapshot(cache, NEW, "new", part, main=True)
    assert weights.located(base) is None
    old = snapshot(cache, NEW, "old", WHOLE)
    assert weights.located(base) == old


def test_halves_with_a_tokenizer_of_one_file_are_whole(cache: Path) -> None:
    halves = [name.replace(".safetensors", ".fp16.safetensors") for name in WHOLE if "tokenizer" not in name]
    place = snapshot(cache, NEW, "abc", [*halves, "tokenizer/tokenizer.json"])
    assert weights.located(bases.find("sd15")) == place


def test_a_model_is_found_under_its_former_name(cache: Path) -> None:
    former = snapshot(cache, FORMER, "abc", WHOLE)
    assert weights.located(bases.find("sd15")) == former
    assert weights.located(bases.find("Lykon/dreamshaper-8")) is None
    present = snapshot(cache, NEW, "def", WHOLE)
    assert weights.located(bases.find("sd15")) == present


def test_where_strangers_draw_a_model_is_whole_with_its_checker_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.find("sd15")
    place = snapshot(cache, NEW, "abc", WHOLE)
    assert weights.located(base) == place and weights.safety(base) == "off"
    monkeypatch.setenv("SPACE_ID", "us/space")
    assert weights.located(base) is None  # so it is fetched, with what it lacks
    assert weights.safety(base) == "on"
    snapshot(cache, NEW, "abc", CHECKER)
    assert weights.located(base) == place and weights.safety(base) == "on"
    monkeypatch.setenv("ITERIS_SD_SAFETY", "off")
    assert weights.safety(base) == "off"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (WHOLE, None),
        ((*WHOLE, *CHECKER), ""),
        ((*WHOLE, "safety_checker/model.safetensors", EXTRACTOR), None),
        ((*WHOLE, *CHECKER[:2]), None),
        ((*WHOLE, CHECKER[0], EXTRACTOR, "safety_checker/model.fp16.safetensors"), "fp16"),
        ((*WHOLE, *CHECKER, "safety_checker/model.fp16.safetensors"), ""),
    ],
)
def test_a_checker_may_be_of_another_variant(
    cache: Path, names: tuple[str, ...], expected: str | None
) -> None:
    place = snapshot(cache, NEW, "abc", names)
    assert weights.checker(place) == expected


def test_a_model_at_a_path_without_a_checker_is_told_of_and_refused_to_strangers(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoints.opened(str(small))
    assert weights.safety(base) == "off"
    weights.check_safe(base)
    monkeypatch.setenv("SPACE_ID", "us/space")
    assert weights.safety(base) == "off, this model has none"
    with pytest.raises(
        UserError, match="mine has no safety checker, which a public page needs; choose another"
    ):
        weights.check_safe(base)
    weights.check_safe(bases.find("storybook"))
    monkeypatch.setenv("ITERIS_SD_SAFETY", "off")
    weights.check_safe(base)


def test_a_checker_is_fetched_in_whichever_variant_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = [name.replace(".safetensors", ".fp16.safetensors") for name in WHOLE]
    found = weights.needed(dict.fromkeys([*halves, *CHECKER], 1))
    assert set(CHECKER) <= set(found)
    found = weights.needed(dict.fromkeys([*WHOLE, CHECKER[0], "safety_checker/model.fp16.safetensors"], 1))
    assert "safety_checker/model.fp16.safetensors" in found
    assert set(weights.needed(dict.fromkeys(WHOLE, 1))) == set(WHOLE)
    monkeypatch.setenv("SPACE_ID", "us/space")
    with pytest.raises(UserError, match="no safety checker as safetensors, and one is wanted here"):
        weights.needed(dict.fromkeys(WHOLE, 1))
    with pytest.raises(UserError, match="no safety checker"):
        weights.needed(dict.fromkeys([*WHOLE, *CHECKER[:2]], 1))


@pytest.mark.parametrize(
    ("told", "wanted"),
    [(word, True) for word in ("on", "1", "true", "YES")]
    + [(word, False) for word in ("off", "0", "False", "no", "")],
)
def test_the_checker_is_switched_in_any_usual_word(
    monkeypatch: pytest.MonkeyPatch, told: str, wanted: bool
) -> None:
    monkeypatch.setenv("ITERIS_SD_SAFETY", told)
    assert weights.safety_wanted() == wanted
    monkeypatch.setenv("ITERIS_SD_SAFETY", "of")
    with pytest.raises(UserError, match="ITERIS_SD_SAFETY is 'of'; choose one of on, off"):
        weights.safety_wanted()


def test_the_usual_base_is_the_one_that_ships(toy: Path) -> None:
    assert weights.usual(Library.shipped()) == "storybook"


def test_the_skeleton_has_the_shapes_without_weights() -> None:
    layers = backbones.skeleton("sd15")
    to_k = layers["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert to_k.weight.shape == (320, 768) and to_k.weight.device.type == "meta"
    assert "text_encoder.encoder.layers.11.self_attn.q_proj" in layers


@pytest.mark.parametrize(
    ("free", "size", "plan"),
    [
        (16, 3, memory.Plan()),
        (4.5, 3, memory.Plan(pieces=True)),
        (3.5, 3, memory.Plan(offload=True, pieces=True)),
    ],
)
def test_memory_decides_what_waits_and_what_is_cut(free: float, size: float, plan: memory.Plan) -> None:
    assert memory.plan(int(free * 2**30), int(size * 2**30)) == plan


def test_want_of_memory_is_told_from_other_errors() -> None:
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not memory.ran_out(RuntimeError("shape mismatch"))


@pytest.mark.slow
def test_a_single_file_is_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    from tests.single_file import write

    pipeline = sd15.random_pipeline().to(torch.float16)
    path = write(pipeline, tmp_path / "model.safetensors")
    wanted = {
        part: {
            name: tensor.float().sum().item() for name, tensor in getattr(pipeline, part).state_dict().items()
        }
        for part in ("unet", "vae", "text_encoder")
    }
    del pipeline
    backbone = backbones.load(checkpoints.opened(str(path)).name)
    for part, sums in wanted.items():
        found = getattr(backbone.pipeline, part).state_dict()
        assert found.keys() == sums.keys()
        for name, total in sums.items():
            assert found[name].sum().item() == pytest.approx(total, rel=1e-3, abs=1e-2), name
    assert isinstance(backbone.pipeline, StableDiffusionPipeline)
