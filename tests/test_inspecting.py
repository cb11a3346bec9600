"""What `inspect` says of a LoRA file: parts, blocks, family, and how much two of them overlap."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from iteris_sd import formats, inspecting
from iteris_sd.cli import app
from iteris_sd.lora import LoRA, LowRank
from tests.toys import random_adapter

Q = "text_encoder.encoder.layers.3.self_attn.q_proj"
K = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def adapter(out: int, width: int, rank: int, seed: int) -> LowRank:
    return random_adapter(out, width, rank, torch.Generator().manual_seed(seed))


@pytest.fixture
def lora() -> LoRA:
    return LoRA({Q: adapter(768, 768, 4, 0), K: adapter(32, 768, 2, 1), MID: adapter(64, 64, 4, 2)})


def test_parts_blocks_and_family(lora: LoRA, tmp_path: Path) -> None:
    formats.write(
        tmp_path / "one.safetensors", LoRA({n: a for n, a in lora.items() if n != MID}), {"made_by": "us"}
    )
    found = inspecting.describe(tmp_path / "one.safetensors")
    assert (found.file, found.format, found.family) == ("one.safetensors", "diffusers", "Stable Diffusion 1")
    assert found.parts == {"text_encoder": inspecting.Part(1, (4,)), "unet": inspecting.Part(1, (2,))}
    assert found.blocks["unet.down_blocks.0"] == pytest.approx(float(lora[K].delta().norm()), rel=1e-6)
    assert found.metadata["made_by"] == "us"
    assert list(inspecting.blocks(lora)) == ["text_encoder.layers.3", "unet.down_blocks.0", "unet.mid_block"]


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1"), (2048, "Stable Diffusion XL"), (77, "unknown")]
)
def test_the_family_is_told_by_the_text_states(width: int, family: str) -> None:
    assert inspecting.family(LoRA({K: adapter(8, width, 2, 0)})) == family


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "Stable Diffusion 1"),
        ({"ss_base_model_version": "storybook"}, "Storybook"),
        ({"ss_base_model_version": "my own"}, "unknown"),
    ],
)
def test_metadata_name_the_family_where_shapes_do_not(
    lora: LoRA, tmp_path: Path, metadata: dict[str, str], family: str
) -> None:
    formats.write(tmp_path / "one.safetensors", LoRA({MID: lora[MID]}), metadata)
    assert inspecting.describe(tmp_path / "one.safetensors").family == family
    formats.write(tmp_path / "one.safetensors", lora, {"ss_base_model_version": "storybook"})
    assert inspecting.describe(tmp_path / "one.safetensors").family == "Stable Diffusion 1"


def test_overlap_runs_from_never_meeting_to_holding_one_another(lora: LoRA) -> None:
    same = inspecting.overlap(lora, lora)
    assert same is not None and same.layers == 3
    assert (same.inputs, same.outputs, same.nearest, same.cosine) == pytest.approx((1.0, 1.0, 1.0, 1.0))
    against = inspecting.overlap(lora, lora.scaled(-2.0))
    assert against is not None and against.cosine == pytest.approx(-1.0)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    apart = [LoRA({MID: LowRank(basis[k : k + 3], basis[:, k : k + 3])}) for k in (0, 3)]
    met = inspecting.overlap(*apart)
    assert met is not None
    assert (met.inputs, met.outputs, met.nearest, met.cosine) == pytest.approx(
        (0.0, 0.0, 0.0, 0.0), abs=1e-12
    )


def test_random_loras_overlap_by_chance() -> None:
    pairs = [[LoRA({MID: adapter(64, 64, rank, seed + 50 * rank)}) for rank in (4, 8)] for seed in range(40)]
    found = [inspecting.overlap(*pair) for pair in pairs]
    mean = sum(met.inputs for met in found if met is not None) / len(found)
    assert mean == pytest.approx(8 / 64, abs=0.02)
    assert found[0] is not None and found[0].chance == 8 / 64


def test_loras_that_share_no_layer_do_not_meet(lora: LoRA) -> None:
    assert inspecting.overlap(lora, LoRA({"unet.elsewhere": adapter(8, 8, 2, 0)})) is None
    assert inspecting.overlap(lora, LoRA({K: adapter(32, 1024, 2, 0)})) is None
    assert inspecting.overlap(lora, LoRA({K: lora[K].scaled(0.0)})) is None


def test_the_command(lora: LoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    formats.write(one, lora)
    formats.write(two, lora.scaled(0.5))
    told = CliRunner().invoke(app, ["inspect", str(one), str(two)])
    assert told.exit_code == 0, told.output
    for words in ("Stable Diffusion 1", "1 layers, rank 4", "‖ΔW‖ unet.mid_block", "+1.000", "by chance 0."):
        assert words in told.output
    plain = json.loads(CliRunner().invoke(app, ["inspect", str(one), "--json"]).output)
    assert plain["parts"]["unet"] == {"layers": 2, "ranks": [4]} and plain["overlap"] is None
    missing = CliRunner().invoke(app, ["inspect", str(tmp_path / "none.safetensors")])
    assert missing.exit_code == 2 and "none.safetensors" in missing.output
