"""Every layout of LoRA files that people have: how its keys are read, what others make of ours, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from iteris_sd import formats, sd15
from iteris_sd.errors import UserError
from iteris_sd.formats import naming, peft_files
from iteris_sd.lora import LoRA, LowRank
from tests.toys import random_adapter

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Q, OUT = f"unet.{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn1.to_out.0"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT_Q = "text_encoder.encoder.layers.1.self_attn.q_proj"
REAL = Path(__file__).resolve().parents[2] / "shared" / "loras"


def adapter(out: int = 6, width: int = 4, rank: int = 2, seed: int = 0) -> LowRank:
    return random_adapter(out, width, rank, torch.Generator().manual_seed(seed)).to(dtype=torch.float32)


def sd15_layers() -> dict[str, nn.Module]:
    """Every linear and convolutional layer of Stable Diffusion v1.5's U-Net, without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sd15.UNET)
    return {f"unet.{n}": m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


# Reading

SPELLINGS = {
    "PEFT": (f"unet.{BLOCK}.attn1.to_q.lora_A.weight", f"unet.{BLOCK}.attn1.to_q.lora_B.weight", Q),
    "PEFT, adapter named": (
        f"unet.{BLOCK}.attn1.to_q.lora_A.default.weight",
        f"unet.{BLOCK}.attn1.to_q.lora_B.default.weight",
        Q,
    ),
    "PEFT, adapter of a name": (
        f"unet.{BLOCK}.attn1.to_q.lora_A.my_dog.weight",
        f"unet.{BLOCK}.attn1.to_q.lora_B.my_dog.weight",
        Q,
    ),
    "PEFT, bare": (f"{BLOCK}.attn1.to_q.lora_A.weight", f"{BLOCK}.attn1.to_q.lora_B.weight", Q),
    "PEFT, bare text": (
        "text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight",
        "text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight",
        TEXT_Q,
    ),
    "PEFT, its model inside": (
        f"unet.base_model.model.{BLOCK}.attn1.to_q.lora_A.weight",
        f"unet.base_model.model.{BLOCK}.attn1.to_q.lora_B.weight",
        Q,
    ),
    "PEFT, its component twice": (
        f"unet.unet.{BLOCK}.attn1.to_q.lora_A.weight",
        f"unet.unet.{BLOCK}.attn1.to_q.lora_B.weight",
        Q,
    ),
    "PEFT, compiled": (
        f"unet._orig_mod.{BLOCK}.attn1.to_q.lora_A.weight",
        f"unet._orig_mod.{BLOCK}.attn1.to_q.lora_B.weight",
        Q,
    ),
    "older, its component twice": (
        f"unet.unet.{BLOCK}.attn1.processor.to_q_lora.down.weight",
        f"unet.unet.{BLOCK}.attn1.processor.to_q_lora.up.weight",
        Q,
    ),
    "older text, its component twice": (
        "text_encoder.text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight",
        TEXT_Q,
    ),
    "older, compiled, bare": (
        f"_orig_mod.{BLOCK}.attn1.to_q.lora.down.weight",
        f"_orig_mod.{BLOCK}.attn1.to_q.lora.up.weight",
        Q,
    ),
    "kohya, compiled": (
        "lora_unet__orig_mod_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet__orig_mod_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        Q,
    ),
    "PEFT, original names": (
        "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_B.weight",
        Q,
    ),
    "ComfyUI": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight",
        Q,
    ),
    "ComfyUI, ours": (
        f"diffusion_model.{BLOCK}.attn1.to_q.lora_A.weight",
        f"diffusion_model.{BLOCK}.attn1.to_q.lora_B.weight",
        Q,
    ),
    "ComfyUI text": (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.lora_down.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.lora_up.weight",
        TEXT_Q,
    ),
    "OMI": (
        "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.lora_down.weight",
        "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight",
        OUT,
    ),
    "OMI text": (
        "clip_l.text_model.encoder.layers.1.self_attn.q_proj.lora_down.weight",
        "clip_l.text_model.encoder.layers.1.self_attn.q_proj.lora_up.weight",
        TEXT_Q,
    ),
    "older": (f"unet.{BLOCK}.attn1.to_q.lora.down.weight", f"unet.{BLOCK}.attn1.to_q.lora.up.weight", Q),
    "older, bare": (
        f"{BLOCK}.attn1.to_out.0.lora.down.weight",
        f"{BLOCK}.attn1.to_out.0.lora.up.weight",
        OUT,
    ),
    "older text": (
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight",
        TEXT_Q,
    ),
    "oldest": (
        f"unet.{BLOCK}.attn1.processor.to_q_lora.down.weight",
        f"unet.{BLOCK}.attn1.processor.to_q_lora.up.weight",
        Q,
    ),
    "oldest, bare": (
        f"{BLOCK}.attn1.processor.to_out_lora.down.weight",
        f"{BLOCK}.attn1.processor.to_out_lora.up.weight",
        OUT,
    ),
    "oldest text": (
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.down.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.up.weight",
        TEXT_Q,
    ),
    "kohya": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        Q,
    ),
    "kohya, to_out": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
        OUT,
    ),
    "kohya, prefix twice": (
        "lora_unet_lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        Q,
    ),
    "kohya, PEFT factors": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_A.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_B.weight",
        Q,
    ),
    "LyCORIS": (
        "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        Q,
    ),
    "LyCORIS text": (
        "lycoris_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight",
        "lycoris_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight",
        TEXT_Q,
    ),
    "LyCORIS, component told": (
        "lycoris_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lycoris_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        Q,
    ),
    "kohya, PEFT's model": (
        "lora_unet_base_model_model_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_base_model_model_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        Q,
    ),
    "kohya text": (
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight",
        TEXT_Q,
    ),
    "kohya, original names": (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
        Q,
    ),
    "pivotal": ("unet:0:down", "unet:0:up", Q),
    "pivotal text": ("text_encoder:6:down", "text_encoder:6:up", TEXT_Q),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer_is_understood(tmp_path: Path, spelling: str) -> None:
    down, up, name = SPELLINGS[spelling]
    save_file({down: adapter().down, up: adapter().up}, tmp_path / "some.safetensors")
    found = formats.read(tmp_path / "some.safetensors")
    assert list(found.lora) == [name]
    assert torch.equal(found.lora[name].delta(), adapter().delta())
    assert found.dialect in (*(d.NAME for d in formats.reader.DIALECTS), "pivotal tuning")


def test_a_file_may_mix_layouts(tmp_path: Path) -> None:
    keys = [SPELLINGS[k] for k in ("kohya", "older text", "oldest, bare")]
    tensors = {k: t.clone() for down, up, _ in keys for k, t in ((down, adapter().down), (up, adapter().up))}
    tensors["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "some.safetensors")
    found = formats.read(tmp_path / "some.safetensors")
    assert set(found.lora) == {Q, TEXT_Q, OUT}
    torch.testing.assert_close(found.lora[Q].delta(), adapter().delta() / 2)
    torch.testing.assert_close(found.lora[OUT].delta(), adapter().delta())
    assert found.dialect == "older diffusers"  # most of its keys


def test_no_scale_is_guessed_where_peft_is_mixed_with_others(tmp_path: Path) -> None:
    formats.write(tmp_path / "merged", some_lora([2]), layout="peft")
    file = tmp_path / "merged" / "unet" / "adapter_model.safetensors"
    down, up, _ = SPELLINGS["kohya text"]
    save_file(load_file(file) | {down: adapter().down, up: adapter().up}, file)
    with pytest.raises(UserError, match="mixes the layouts .*PEFT"):
        formats.read(file)


def test_underscores_and_dots_name_the_same_layers() -> None:
    for name in sd15_layers():
        component, path = naming.underscored(name)
        assert naming.dotted(path) == name.removeprefix("unet.")
        assert naming.component_of(naming.dotted(path) or "") == component == "unet"
    assert naming.dotted("text_model_encoder_layers_11_mlp_fc1") == "text_model.encoder.layers.11.mlp.fc1"
    assert naming.dotted("something_else") is None
    assert naming.dotted("down_blocks_0_nonsense") is None
    for wrong in ("input_blocks_1_2_proj_in", "output_blocks_3_2_proj_in", "input_blocks_0_1_proj_in"):
        assert naming.dotted(wrong) is None


def test_names_of_the_original_code_are_those_that_diffusers_converts() -> None:
    """All layers of the original U-Net, through diffusers' own converter of checkpoints."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    inner = ("in_layers.2", "out_layers.3", "emb_layers.1", "skip_connection")
    attention = [f"transformer_blocks.0.attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")]
    attention += [
        "proj_in",
        "proj_out",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff.net.2",
    ]
    names = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"]
    for k in range(1, 12):
        if k % 3 == 0:
            names.append(f"input_blocks.{k}.0.op")
        else:
            names += [f"input_blocks.{k}.0.{x}" for x in inner]
            names += [f"input_blocks.{k}.1.{x}" for x in attention] if k < 9 else []
    for k in range(12):
        names += [f"output_blocks.{k}.0.{x}" for x in inner]
        names += [f"output_blocks.{k}.1.{x}" for x in attention] if k > 2 else []
        names += [f"output_blocks.{k}.{1 if k < 3 else 2}.conv"] if k in (2, 5, 8) else []
    names += [f"middle_block.{k}.{x}" for k in (0, 2) for x in inner[:3]]
    names += [f"middle_block.1.{x}" for x in attention]
    tagged = {f"model.diffusion_model.{name}.weight": torch.tensor(float(i)) for i, name in enumerate(names)}
    # The converter asks for biases of these.
    tagged |= {key.replace(".weight", ".bias"): -tag for key, tag in tagged.items()}
    for name in ("out.0",):
        tagged |= {f"model.diffusion_model.{name}.{kind}": torch.tensor(-1.0) for kind in ("weight", "bias")}
    config = {**UNet2DConditionModel.from_config({}).config, "layers_per_block": 2, "class_embed_type": None}
    config |= {"addition_embed_type": None}
    converted = convert_ldm_unet_checkpoint(dict(tagged), config)
    theirs = {
        int(v): k.removesuffix(".weight") for k, v in converted.items() if k.endswith(".weight") and v >= 0
    }
    assert len(theirs) == len(names)
    for number, name in enumerate(names):
        assert naming.dotted(name.replace(".", "_")) == theirs[number], name


def test_a_tucker_core_makes_the_same_convolution(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    down, mid = torch.randn(2, 4, 1, 1, generator=rng), torch.randn(3, 2, 3, 3, generator=rng)
    up, x = torch.randn(6, 3, 1, 1, generator=rng), torch.randn(1, 4, 5, 5, generator=rng)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        "lora_down.weight": down,
        "lora_mid.weight": mid,
        "lora_up.weight": up,
        "alpha": torch.tensor(6.0),
    }
    save_file({f"{stem}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "some.safetensors")
    found = formats.read(tmp_path / "some.safetensors").lora
    assert found.kernels == {CONV: (3, 3)}
    wanted = 2.0 * F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    made = F.conv2d(x, found[CONV].delta().unflatten(1, (4, 3, 3)), padding=1)
    torch.testing.assert_close(made, wanted)


def test_small_tucker_cores_do_not_unfold_to_all_memory(tmp_path: Path) -> None:
    shapes = {"lora_down": (1, 65_536, 1, 1), "lora_mid": (1024, 1, 1, 1), "lora_up": (1, 1024, 1, 1)}
    tensors = {
        f"lora_unet_up_blocks_{block}_resnets_{number}_conv1.{key}.weight": torch.zeros(shape).half()
        for block in range(2)
        for number in range(3)
        for key, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "some.safetensors")
    assert (tmp_path / "some.safetensors").stat().st_size < 1024**2
    with pytest.raises(UserError, match="unfold to 402,653,184 numbers, and at most 268,435,456 are read"):
        formats.read(tmp_path / "some.safetensors")


@pytest.mark.parametrize("wide", ["lora_down", "lora_mid", "lora_up"])
def test_factors_of_several_types_come_in_the_widest(tmp_path: Path, wide: str) -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {"lora_down": (2, 4, 1, 1), "lora_mid": (3, 2, 3, 3), "lora_up": (6, 3, 1, 1)}
    dtypes = dict.fromkeys(shapes, torch.float16) | {wide: torch.float64}
    save_file(
        {f"{stem}.{key}.weight": torch.ones(shape, dtype=dtypes[key]) for key, shape in shapes.items()},
        tmp_path / "some.safetensors",
    )
    adapter = formats.read(tmp_path / "some.safetensors").lora[CONV]
    assert torch.equal(adapter.delta(), torch.full((6, 36), 6.0, dtype=torch.float64))


@pytest.mark.parametrize(("kernel", "fits"), [((1, 1), True), ((3, 3), False)])
def test_factors_of_one_pixel_and_of_none_are_one(
    tmp_path: Path, kernel: tuple[int, int], fits: bool
) -> None:
    down = adapter().down[:, :, None, None].expand(2, 4, *kernel).contiguous()
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": adapter().up}, tmp_path / "a.safetensors"
    )
    if fits:
        (found,) = formats.read(tmp_path / "a.safetensors").lora.values()
        torch.testing.assert_close(found.delta(), adapter().delta())
    else:
        with pytest.raises(UserError, match="only LoRA on linear layers and convolutions is read"):
            formats.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["style.alpha", "unet.v1", "x.bias", "clip_g", "emb_params"])
def test_a_token_called_like_a_part_of_a_model_is_refused_before_it_is_kept(
    tmp_path: Path, name: str
) -> None:
    save_file({"emb_params": torch.ones(1, 4)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"its token would be called '{name}'.*another name"):
        formats.read_embeddings(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("end", ["diff", "w_norm", "lora_up.weight"])
def test_what_lycoris_writes_is_not_taken_for_tokens(tmp_path: Path, end: str) -> None:
    save_file({f"lycoris_down_blocks_0_attentions_0_norm.{end}": torch.ones(4)}, tmp_path / "a.safetensors")
    assert not formats.holds_tokens(tmp_path / "a.safetensors")


def test_tokens_inside_a_file_come_with_it(tmp_path: Path) -> None:
    vectors = torch.randn(2, 4)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": adapter().down, f"{stem}.lora_up.weight": adapter().up}
    save_file(tensors | {"bundle_emb.biscuit.string_to_param.*": vectors}, tmp_path / "bundle.safetensors")
    assert torch.equal(formats.read(tmp_path / "bundle.safetensors").tokens["biscuit"], vectors)
    pivotal = {"unet:0:down": adapter().down, "unet:0:up": adapter().up, "<s1>": vectors[0].clone()}
    save_file(pivotal, tmp_path / "pivotal.safetensors")
    assert torch.equal(formats.read(tmp_path / "pivotal.safetensors").tokens["<s1>"], vectors[:1])


@pytest.mark.parametrize("key", ["string_to_param.*", "clip_l", "emb_params", "emp_params", "<other>"])
def test_bundled_tokens_are_read_alone_too(tmp_path: Path, key: str) -> None:
    vectors = torch.randn(2, 4)
    save_file({f"bundle_emb.my dog.{key}": vectors}, tmp_path / "token.safetensors")
    assert torch.equal(formats.read_embeddings(tmp_path / "token.safetensors")["my dog"], vectors)
    tensors = {"unet:0:down": adapter().down, "unet:0:up": adapter().up, f"bundle_emb.<rex>.{key}": vectors}
    save_file(tensors, tmp_path / "bundle.safetensors")
    assert torch.equal(formats.read(tmp_path / "bundle.safetensors").tokens["<rex>"], vectors)


def pivotal_order(extended: bool, later: bool) -> list[str]:
    """The layers that the first modules of Stable Diffusion v1.5's U-Net have, as diffusers lists them now or then."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sd15.UNET)
    classes = ("Attention", "GEGLU", "ResnetBlock2D") if extended else ("Attention", "GEGLU")
    layers = [
        f"unet.{place}.{name}"
        for place, found in unet.named_modules()
        if type(found).__name__ in classes
        for name, module in found.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d) if extended else nn.Linear)
    ]
    for k in [k for k, name in enumerate(layers) if name.endswith("attn2.to_q") and not later]:
        layers.insert(k, layers.pop(k + 4))  # ff stood before attn2
    return layers


@pytest.mark.parametrize("later", [False, True], ids=["then", "later diffusers"])
@pytest.mark.parametrize("extended", [False, True], ids=["plain", "extended"])
def test_the_numbers_of_pivotal_tuning_are_those_of_its_modules(
    tmp_path: Path, later: bool, extended: bool
) -> None:
    layers, modules = pivotal_order(extended, later), sd15_layers()
    assert len(layers) == (224 if extended else 144)
    tensors = {"krk": torch.ones(4)}
    for number, name in enumerate(layers):
        out, *rest = modules[name].get_parameter("weight").shape
        tensors[f"unet:{number}:down"] = torch.full((1, *rest), float(number))
        tensors[f"unet:{number}:up"] = torch.ones(out, 1, *(1 for _ in rest[1:]))
    told = {"unet": json.dumps(["ResnetBlock2D"] if extended else ["Attention"]), "krk": "<embed>"}
    save_file(tensors, tmp_path / "some.safetensors", told)
    found = formats.read(tmp_path / "some.safetensors")
    assert {name: int(one.down[0, 0]) for name, one in found.lora.items()} == {
        name: number for number, name in enumerate(layers)
    }
    assert set(found.tokens) == {"krk"}


def test_embeddings_of_other_tools_are_read(tmp_path: Path) -> None:
    vectors = torch.randn(2, 4)
    keys = "emb_params emp_params string_to_param.* string_to_param * clip_l text_encoders_0"
    for key in keys.split():
        save_file({key: vectors}, tmp_path / "biscuit.safetensors")
        assert torch.equal(formats.read_embeddings(tmp_path / "biscuit.safetensors")["biscuit"], vectors)
    save_file({"<s0>": vectors[0].clone(), "<s1>": vectors[1].clone()}, tmp_path / "two.safetensors")
    assert set(formats.read_embeddings(tmp_path / "two.safetensors")) == {"<s0>", "<s1>"}


@pytest.mark.parametrize(
    ("file", "layers", "dialect"),
    [
        ("analog_svd_rank4.safetensors", {"unet": 144, "text_encoder": 48}, "pivotal tuning"),
        ("weapons_attn_procs.safetensors", {"unet": 128}, "older diffusers"),
    ],
)
def test_real_files_fit_stable_diffusion(file: str, layers: dict[str, int], dialect: str) -> None:
    if not (REAL / file).exists():
        pytest.skip("the LoRA files of others are not here")
    found = formats.read(REAL / file)
    assert {component: len(part) for component, part in found.lora.parts().items()} == layers
    assert found.dialect == dialect
    modules = sd15_layers()
    for name, one in found.lora.parts()["unet"].items():
        assert one.shape == tuple(modules[name].get_parameter("weight").flatten(1).shape)
    for name, one in found.lora.parts().get("text_encoder", LoRA({})).items():
        assert one.shape == (768, 768), name


# Writing


def some_lora(ranks: list[int], seed: int = 0) -> LoRA:
    rng = torch.Generator().manual_seed(seed)
    names = (Q, TEXT_Q, CONV, OUT, "unet.down_blocks.0.attentions.0.proj_in")
    kernels = {CONV: (3, 3), "unet.down_blocks.0.attentions.0.proj_in": (1, 1)}
    layers = {
        name: random_adapter(6, 9 if name == CONV else 4, rank, rng).to(dtype=torch.float32)
        for name, rank in zip(names, ranks, strict=False)
    }
    return LoRA(layers, kernels)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(formats.LAYOUTS))
def test_every_layout_is_read_back_as_written(tmp_path_factory, ranks: list[int], layout) -> None:
    lora, path = some_lora(ranks), tmp_path_factory.mktemp("lora") / "some.safetensors"
    written = formats.write(path, lora, {"base": "storybook"}, layout=layout)
    assert all(file.is_file() for file in written)
    found = formats.read(path)
    assert set(found.lora) == set(lora) and found.lora.kernels == lora.kernels
    for name in lora:
        torch.testing.assert_close(found.lora[name].delta(), lora[name].delta(), rtol=1e-6, atol=1e-7)
    assert found.dialect == {"peft": "PEFT"}.get(layout, layout)
    assert found.metadata["base"] == "storybook"
    assert len(found.sha256) == 64


def test_only_kohyas_layout_takes_tokens(tmp_path: Path) -> None:
    tokens = {"<dog>": torch.randn(2, 4)}
    formats.write(tmp_path / "some.safetensors", some_lora([2]), layout="kohya", tokens=tokens)
    found = formats.read(tmp_path / "some.safetensors")
    assert torch.equal(found.tokens["<dog>"], tokens["<dog>"])
    with pytest.raises(UserError, match="have no room for learned tokens"):
        formats.write(tmp_path / "other.safetensors", some_lora([2]), tokens=tokens)


def model_lora(pipe, spread: int = 3) -> LoRA:
    """A random LoRA on attention and convolutions of a whole pipeline, of different ranks."""
    rng = torch.Generator().manual_seed(1)
    layers: dict[str, LowRank] = {}
    kernels: dict[str, tuple[int, int]] = {}
    for component in ("unet", "text_encoder"):
        for path, module in getattr(pipe, component).named_modules():
            if not path.endswith(
                ("to_q", "to_out.0", "q_proj", "out_proj", "fc1", "resnets.0.conv1", "proj_in")
            ):
                continue
            name = naming.canonical(component, path)
            out, width = module.weight.shape[0], module.weight[0].numel()
            layers[name] = random_adapter(out, width, 1 + len(layers) % spread, rng).to(dtype=torch.float32)
            if isinstance(module, nn.Conv2d):
                kernels[name] = (module.kernel_size[0], module.kernel_size[1])
    return LoRA(layers, kernels)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_makes_the_same_of_our_files(tiny_sd, tmp_path: Path, layout) -> None:
    lora = model_lora(tiny_sd)
    modules = {
        naming.canonical(c, path): m
        for c in ("unet", "text_encoder")
        for path, m in getattr(tiny_sd, c).named_modules()
    }
    before = {name: modules[name].weight.detach().clone() for name in lora}
    formats.write(tmp_path / "some.safetensors", lora, layout=layout)
    tiny_sd.load_lora_weights(tmp_path / "some.safetensors")
    injected = [m for c in (tiny_sd.unet, tiny_sd.text_encoder) for m in c.modules() if hasattr(m, "lora_A")]
    assert len(injected) == len(lora)
    tiny_sd.fuse_lora(components=["unet", "text_encoder"])
    for name in lora:
        delta = (modules[name].weight - before[name]).flatten(1)
        torch.testing.assert_close(delta, lora[name].delta(), rtol=1e-4, atol=1e-5)


def test_peft_makes_the_same_of_our_folders(tiny_sd, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = model_lora(tiny_sd)
    formats.write(tmp_path / "merged", lora, layout="peft")
    for component in ("unet", "text_encoder"):
        model = getattr(tiny_sd, component)
        loaded = PeftModel.from_pretrained(model, tmp_path / "merged" / component)
        tuned = {n: m for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert {naming.canonical(component, n) for n in tuned} == set(lora.parts()[component])
        for n, module in tuned.items():
            delta = module.get_delta_weight("default").flatten(1)
            torch.testing.assert_close(
                delta, lora[naming.canonical(component, n)].delta(), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"attn1.to_q": 2}},
        {"alpha_pattern": {".*attn1.*": 3, r"up_blocks\.\d+\..*attn[12]\.to_(q|v)": 2}},
        {"rank_pattern": {"attn1.to_q": 3}},
    ],
)
def test_what_peft_saves_is_read(tiny_sd, tmp_path: Path, options) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False, **options
    )
    model = get_peft_model(tiny_sd.unet, config)
    model.save_pretrained(tmp_path / "unet")
    for place in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "adapter_model.safetensors"):
        found = formats.read(place).lora
        tuned = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert set(found) == {f"unet.{n}" for n in tuned}
        for n, module in tuned.items():
            torch.testing.assert_close(found[f"unet.{n}"].delta(), module.get_delta_weight("default"))
    (tmp_path / "unet" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="its scale stands in adapter_config.json"):
        formats.read(tmp_path / "unet" / "adapter_model.safetensors")


# Refusals

KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(4, 2)}, "a LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(4, 2)}, "a LoKr"),
    "DoRA": ({f"{KOHYA}.dora_scale": torch.ones(4, 1)}, "a DoRA"),
    "IA3": ({f"{KOHYA}.on_input": torch.ones(1)}, "an IA³"),
    "OFT": ({f"{KOHYA}.oft_blocks": torch.ones(4, 2, 2)}, "an OFT"),
    "GLoRA": ({f"{KOHYA}.a1.weight": torch.ones(4, 2)}, "a GLoRA"),
    "full": ({f"{KOHYA}.diff": torch.ones(4, 2)}, "carries full weights"),
    "bias": ({f"unet.{BLOCK}.attn1.to_q.lora_B.bias": torch.ones(4)}, "a LoRA with biases"),
    "SDXL": (
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)},
        "made for Stable Diffusion XL",
    ),
    "SDXL by shape": (
        {
            f"unet.{BLOCK}.attn2.to_k.lora_A.weight": torch.ones(2, 2048),
            f"unet.{BLOCK}.attn2.to_k.lora_B.weight": torch.ones(640, 2),
        },
        "made for Stable Diffusion XL, whose text states are 2048 wide",
    ),
    "SD 2": (
        {
            KOHYA.replace("attn1_to_q", "attn2_to_k") + ".lora_down.weight": torch.ones(2, 1024),
            KOHYA.replace("attn1_to_q", "attn2_to_k") + ".lora_up.weight": torch.ones(320, 2),
        },
        "made for Stable Diffusion 2",
    ),
    "SD 2, text": (
        {
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 1024),
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(1024, 2),
        },
        "made for Stable Diffusion 2",
    ),
    "SDXL by its depth": (
        {f"unet.{BLOCK[:-1]}9.attn1.to_q.lora_A.weight": torch.ones(2, 640)},
        "made for Stable Diffusion XL",
    ),
    "SD 2 by its depth": (
        {"lora_te_text_model_encoder_layers_22_mlp_fc1.lora_down.weight": torch.ones(2, 4)},
        "made for Stable Diffusion 2",
    ),
    "videos": (
        {
            "unet.down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(
                2, 4
            )
        },
        "made for a model of videos",
    ),
    "embeddings": (
        {"text_encoders.clip_l.transformer.text_projection.lora_down.weight": torch.ones(2, 4)},
        "changes the text encoder's embeddings or projection",
    ),
    "PEFT with biases": ({f"unet.{BLOCK}.attn1.to_out.0.bias": torch.ones(4)}, "with whole layers or biases"),
    "PEFT with layers": (
        {"unet.conv_in.modules_to_save.weight": torch.ones(4, 4, 3, 3)},
        "with whole layers or biases",
    ),
    "whole numbers": ({f"{KOHYA}.hada_w1_a": torch.ones(4, 2), f"{KOHYA}.alpha": torch.tensor(4)}, "a LoHa"),
    "sparse biases": ({f"{KOHYA}.bias_indices": torch.zeros(2, 5, dtype=torch.int64)}, "a LoRA with biases"),
    "ComfyUI with biases": (
        {"diffusion_model.input_blocks.1.1.proj_in.diff_b": torch.ones(4)},
        "save it again with bias_diff off",
    ),
    "VeRA": ({f"base_model.model.{BLOCK}.attn1.to_q.vera_lambda_b": torch.ones(4)}, "a VeRA"),
    "Custom Diffusion": (
        {f"{BLOCK}.attn2.processor.to_k_custom_diffusion.weight": torch.ones(4, 4)},
        "of Custom Diffusion",
    ),
    "AnimateDiff": (
        {
            "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(
                2, 4
            )
        },
        "made for AnimateDiff",
    ),
    "output embedding": ({"bundle_emb.<rex>.clip_l_out": torch.ones(1, 4)}, "an output embedding"),
    "SDXL embedding": ({"bundle_emb.<rex>.clip_g": torch.ones(1, 4)}, "a token for Stable Diffusion XL"),
    "ControlNet": (
        {
            "controlnet_down_blocks.0.weight": torch.ones(4, 4, 1, 1),
            "down_blocks.0.resnets.0.conv1.weight": torch.ones(4, 4, 3, 3),
        },
        "a ControlNet, not a LoRA",
    ),
    "IP-Adapter": ({"image_proj.proj.weight": torch.ones(4, 4)}, "an IP-Adapter, not a LoRA"),
    "T2I-Adapter": ({"adapter.body.0.in_conv.weight": torch.ones(4, 4, 1, 1)}, "a T2I-Adapter, not a LoRA"),
    "ESRGAN": ({"model.1.sub.0.RDB1.conv1.0.weight": torch.ones(4, 4, 3, 3)}, "an upscaler"),
    "Real-ESRGAN": ({"body.0.rdb1.conv1.weight": torch.ones(4, 4, 3, 3)}, "an upscaler"),
    "hypernetwork": ({"768.0.linear.0.weight": torch.ones(4, 4)}, "a hypernetwork"),
    "language model": (
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)},
        "made for a language model",
    ),
    "SDXL checkpoint": (
        {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]},
        "a whole checkpoint of Stable Diffusion XL",
    ),
    "text encoder": (
        {"text_model.embeddings.position_ids": torch.arange(77)[None]},
        "a part of a whole model",
    ),
    "U-Net": ({"diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}, "a part of a whole model"),
    "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(2)}, "a whole checkpoint"),
    "part": ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2, 2, 3, 3)}, "a part of a whole model"),
    "token": ({"emb_params": torch.ones(1, 4)}, "a learned token"),
    "token of OneTrainer": ({"emp_params": torch.ones(1, 4)}, "a learned token"),
    "only tokens": ({"<s1>": torch.ones(1, 4)}, "learned tokens and no LoRA"),
    "unknown layer": (
        {"lora_unet_down_blocks_0_new_thing.lora_down.weight": torch.ones(2, 4)},
        "no part of a plain",
    ),
    "beyond": ({"unet:144:down": torch.ones(2, 4)}, "no part of a plain LoRA"),
    "core": (
        {
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(2, 4, 1, 1),
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": torch.ones(3, 3, 3, 3),
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(4, 3, 1, 1),
        },
        "do not fit each other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_with_its_reason(tmp_path: Path, case: str) -> None:
    tensors, message = REFUSED[case]
    save_file(tensors, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        formats.read(tmp_path / "some.safetensors")
    assert str(caught.value).startswith("some.safetensors cannot be used: ")


@pytest.mark.parametrize(
    "key",
    [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",  # Flux, HunyuanVideo
        "transformer.double_blocks.0.img_attn_qkv.lora_A.weight",  # HunyuanVideo
        "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight",  # Flux, Stable Diffusion 3
        "transformer_blocks.0.attn.add_k_proj.lora_A.weight",  # Qwen-Image
        "transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight",  # AuraFlow
        "transformer.transformer_blocks.0.attn2.to_k.lora_A.weight",  # LTX-Video, PixArt
        "base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight",  # PixArt
        "diffusion_model.blocks.0.cross_attn.k.lora_A.weight",  # Wan
        "diffusion_model.layers.0.attention.to_q.lora_A.weight",  # Z-Image
        "diffusion_model.double_stream_blocks.0.block.attn1.to_k.lora_A.weight",  # HiDream
        "lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight",  # T5, of Stable Diffusion 3
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",  # Flux
        "lora_unet_transformer_blocks_0_attn_add_k_proj.lora_down.weight",  # Qwen-Image
        "lora_unet_blocks_0_cross_attn_k.lora_down.weight",  # Wan
        "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight",  # Flux
    ],
)
def test_loras_of_transformer_models_are_told_as_such(tmp_path: Path, key: str) -> None:
    save_file({key: torch.ones(2, 2048)}, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match="made for a transformer model .Flux, Stable Diffusion 3, Qwen-Image"):
        formats.read(tmp_path / "some.safetensors")


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "Stable Diffusion 2"),
        ({"ss_base_model_version": "sd_v2_v", "modelspec.architecture": "nonsense"}, "Stable Diffusion 2"),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "Flux"),
        ({"ss_base_model_version": "sdxl", "modelspec.architecture": "stable-diffusion-v1/lora"}, ""),
        ({"ss_base_model_version": "sd_v1"}, ""),
        ({"ss_base_model_version": "my own"}, ""),
        ({"ss_v2": "True"}, "Stable Diffusion 2"),
        ({"ss_v2": "False"}, ""),
    ],
)
def test_metadata_tell_the_family_where_shapes_do_not(
    tmp_path: Path, metadata: dict[str, str], told: str
) -> None:
    path = tmp_path / "some.safetensors"
    formats.write(path, LoRA({Q: adapter()}), metadata)
    if told:
        with pytest.raises(UserError, match=f"made for {told}, as its metadata say"):
            formats.read(path)
    else:
        assert list(formats.read(path).lora) == [Q]
    reads_text = Q.replace("attn1.to_q", "attn2.to_k")
    formats.write(path, LoRA({Q: adapter(), reads_text: adapter(320, 768)}), metadata)
    assert reads_text in formats.read(path).lora  # shapes are believed before metadata


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_the_scale_of_a_model_saved_alone_is_told_without_prefix(tmp_path: Path, prefix: str) -> None:
    stem = f"{prefix}{BLOCK}.attn1.to_q"
    told = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 1}, "rank_pattern": {"attn1.to_q": 2}}
    save_file(
        {f"{stem}.lora_A.weight": adapter().down, f"{stem}.lora_B.weight": adapter().up},
        tmp_path / "some.safetensors",
        {"lora_adapter_metadata": json.dumps(told)},
    )
    found = formats.read(tmp_path / "some.safetensors").lora[Q]
    torch.testing.assert_close(found.delta(), 4.0 * adapter().delta())  # 8 / 2, the rank that it has


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "my_dog.safetensors"])
def test_a_folder_with_one_file_is_that_file(tmp_path: Path, name: str) -> None:
    formats.write(tmp_path / name, LoRA({Q: adapter()}))
    assert formats.located(tmp_path) == tmp_path / name
    assert formats.read(tmp_path).sha256 == formats.read(tmp_path / name).sha256
    (tmp_path / name).rename(tmp_path / name.replace(".safetensors", ".SAFETENSORS"))
    assert list(formats.read(tmp_path).lora) == [Q]
    formats.write(tmp_path / name, LoRA({Q: adapter()}))
    (tmp_path / name.replace(".safetensors", ".SAFETENSORS")).unlink()
    formats.write(tmp_path / "other.safetensors", LoRA({OUT: adapter()}))
    if name.startswith("pytorch"):
        assert list(formats.read(tmp_path).lora) == [Q]
        return
    with pytest.raises(UserError, match="several .safetensors files .my_dog.safetensors, other.safetensors."):
        formats.read(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin"])
def test_a_folder_of_pickles_is_told_as_such(tmp_path: Path, name: str) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / name)
    if name.startswith("adapter"):
        (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{name}, a PyTorch pickle.*safetensors.torch.save_file"):
        formats.read(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a table"),
        (json.dumps({"peft_type": "IA3"}), "PEFT's kind 'IA3'"),
        (json.dumps({"use_dora": True}), "is a DoRA"),
        (json.dumps({"lora_alpha": "x"}), "which is no number"),
        (json.dumps({"lora_alpha": None}), "which is no number"),
    ],
)
def test_bad_settings_of_a_folder_are_told(tmp_path: Path, config: str, message: str) -> None:
    formats.write(tmp_path / "merged", some_lora([2]), layout="peft")
    (tmp_path / "merged" / "unet" / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        formats.read(tmp_path / "merged")


@pytest.mark.parametrize("start", [True, "eva", "orthogonal", "pissa", "olora"])
def test_what_changes_the_base_model_is_no_plain_lora(tmp_path: Path, start: bool | str) -> None:
    """PEFT's own starts: ΔW is what the whole layer has gained since before the adapter, or is refused."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    model = nn.ModuleDict({"down_blocks": nn.ModuleList([nn.ModuleDict({"to_q": layer})])})
    before = layer.weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=start)
    tuned = get_peft_model(model, config)
    module = tuned.get_submodule("base_model.model.down_blocks.0.to_q")
    module.lora_B["default"].weight.data += 0.01  # as if trained
    tuned.save_pretrained(tmp_path)
    gained = module.get_base_layer().weight + module.get_delta_weight("default") - before
    if start in ("pissa", "olora"):
        with pytest.raises(UserError, match=f"{start}.*path_initial_model_for_weight_conversion"):
            formats.read(tmp_path)
        return
    (found,) = formats.read(tmp_path).lora.values()
    torch.testing.assert_close(found.delta(), gained.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa_niter_16", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize("kept", ["folder", "metadata"])
def test_a_start_that_changes_the_base_model_is_refused(tmp_path: Path, start: str, kept: str) -> None:
    told = {"lora_alpha": 8, "init_lora_weights": start}
    path = tmp_path / "some.safetensors"
    if kept == "folder":
        path = tmp_path / "merged"
        formats.write(path, LoRA({Q: adapter()}), layout="peft")
        (path / "unet" / peft_files.CONFIG).write_text(json.dumps(told))
    else:
        formats.write(path, LoRA({Q: adapter()}), {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(UserError, match=f"init_lora_weights='{start}', which .* fits no other base"):
        formats.read(path)


def test_peft_says_which_alpha_settings_mean_that_tell_none(tmp_path: Path) -> None:
    from peft import LoraConfig

    formats.write(tmp_path / "merged", LoRA({Q: adapter()}), layout="peft")
    (tmp_path / "merged" / "unet" / peft_files.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    path = tmp_path / "some.safetensors"
    formats.write(path, LoRA({Q: adapter()}), {"lora_adapter_metadata": json.dumps({"unet.r": 2})})
    for found in (formats.read(tmp_path / "merged"), formats.read(path)):
        torch.testing.assert_close(found.lora[Q].delta(), LoraConfig().lora_alpha / 2 * adapter().delta())


def test_peft_calls_its_files_so() -> None:
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    assert (peft_files.CONFIG, peft_files.WEIGHTS, peft_files.PICKLED) == (
        CONFIG_NAME,
        SAFETENSORS_WEIGHTS_NAME,
        WEIGHTS_NAME,
    )


def test_a_folder_without_an_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no adapter_config.json in it"):
        formats.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config.json and no adapter_model.safetensors beside it"):
        formats.read(tmp_path)


def test_files_of_kohya_carry_an_alpha(tmp_path: Path) -> None:
    formats.write(tmp_path / "some.safetensors", some_lora([2, 3]), layout="kohya")
    tensors = load_file(tmp_path / "some.safetensors")
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert alphas == {2.0, 3.0}  # of the two components
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" in tensors
