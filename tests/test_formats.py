"""LoRA and embedding files: round trips, diffusers' loaders, and one clear sentence per bad file."""

import gzip
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iteris_sd import formats, limits
from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA, LowRank
from tests.toys import random_adapter

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_Q = "text_encoder.encoder.layers.0.self_attn.q_proj"
FILE_TEXT_Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def adapter(out: int = 6, width: int = 4, rank: int = 2, seed: int = 0) -> LowRank:
    return random_adapter(out, width, rank, torch.Generator().manual_seed(seed)).to(dtype=torch.float32)


def peft(path: Path, metadata: dict[str, str] | None = None, **changes: Tensor | None) -> Path:
    """A one-layer LoRA file by hand; ``changes`` replace its tensors, or with None remove them."""
    tensors = {"down": adapter().down, "up": adapter().up, **changes}
    keys = {"down": f"{Q}.lora_A.weight", "up": f"{Q}.lora_B.weight", "alpha": f"{Q}.alpha"}
    save_file({keys.get(k, k): t for k, t in tensors.items() if t is not None}, path, metadata)
    return path


# Round trips


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_a_lora_is_read_back_as_written(tmp_path_factory, ranks: list[int], dtype: torch.dtype) -> None:
    path = tmp_path_factory.mktemp("lora") / "some.safetensors"
    rng = torch.Generator().manual_seed(sum(ranks))
    names = (Q, TEXT_Q, Q.replace("to_q", "to_out.0"), TEXT_Q.replace("q_proj", "out_proj"))
    lora = LoRA({n: random_adapter(6, 4, r, rng).to(dtype=dtype) for n, r in zip(names, ranks, strict=False)})
    formats.write(path, lora, metadata={"made by": "tests"})
    found = formats.read(path)
    assert set(found.lora) == set(lora)
    for name in lora:
        assert found.lora[name].up.dtype == dtype
        assert torch.equal(found.lora[name].delta(), lora[name].delta())
    assert found.metadata["made by"] == "tests"
    assert found.dialect == "diffusers"
    assert not found.tokens


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    formats.write(tmp_path / "half.safetensors", LoRA({Q: adapter()}), dtype=torch.float16)
    assert load_file(tmp_path / "half.safetensors")[f"{Q}.lora_A.weight"].dtype == torch.float16
    found = formats.read(tmp_path / "half.safetensors").lora[Q]
    assert found.down.dtype == torch.float32
    torch.testing.assert_close(found.delta(), adapter().delta(), rtol=2e-3, atol=2e-3)


def test_files_carry_text_model_and_names_do_not(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    formats.write(path, LoRA({TEXT_Q: adapter()}))
    assert set(load_file(path)) == {f"{FILE_TEXT_Q}.lora_A.weight", f"{FILE_TEXT_Q}.lora_B.weight"}
    save_file({k.replace("text_model.", ""): t for k, t in load_file(path).items()}, path)
    assert list(formats.read(path).lora) == [TEXT_Q]


def test_a_rank_stabilised_alpha_tensor_is_applied(tmp_path: Path) -> None:
    told = {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True})}
    path = peft(tmp_path / "alpha.safetensors", told, alpha=torch.tensor(3.0))
    torch.testing.assert_close(formats.read(path).lora[Q].delta(), 3 / 2**0.5 * adapter().delta())


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.lora_alpha": 8, "unet.r": 2}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"attn2.to_q": 1, "n1.to_q": 5}}, 1.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {".*attn1.*": 6, "to_q": 2}}, 3.0),
        (
            {"unet.lora_alpha": 2, "unet.alpha_pattern": {r"up_blocks\.\d+\..*": 6, "attn[12].to_(q|v)": 4}},
            2.0,
        ),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 1}}, 4.0),
    ],
)
def test_the_scale_in_peft_metadata_is_applied(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    path = peft(tmp_path / "scaled.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    torch.testing.assert_close(formats.read(path).lora[Q].delta(), scale * adapter().delta())


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(1.0), torch.tensor(1), torch.tensor([1], dtype=torch.int32), torch.tensor(1.0).half()],
)
def test_an_alpha_tensor_is_applied(tmp_path: Path, alpha: Tensor) -> None:
    path = peft(tmp_path / "alpha.safetensors", alpha=alpha)
    torch.testing.assert_close(formats.read(path).lora[Q].delta(), adapter().delta() / 2)


def test_a_token_is_read_back_as_written(tmp_path: Path) -> None:
    vectors = torch.randn(3, 8)
    formats.write_embedding(tmp_path / "dog.safetensors", "<dog>", vectors)
    ((token, found),) = formats.read_embeddings(tmp_path / "dog.safetensors").items()
    assert token == "<dog>"
    assert torch.equal(found, vectors)
    save_file({"<cat>": vectors[0].clone()}, tmp_path / "cat.safetensors")
    assert formats.read_embeddings(tmp_path / "cat.safetensors")["<cat>"].shape == (1, 8)


def test_writing_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "some.safetensors"
    formats.write(path, LoRA({Q: adapter()}))
    before = path.read_bytes()
    with pytest.raises(UserError, match="does not fit torch.float16"):
        formats.write(path, LoRA({Q: adapter().scaled(1e9)}), dtype=torch.float16)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("iteris_sd.formats.writer.os.replace", fail)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        formats.write(path, LoRA({Q: adapter(seed=1)}))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# Bad files


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def headed(path: Path, table: Any, data: bytes = b"") -> Path:
    head = json.dumps(table).encode()
    return raw(path, struct.pack("<Q", len(head)) + head + data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def truncated(path: Path) -> Path:
    return raw(path, peft(path).read_bytes()[:-8])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: None, "cannot be read .No such file"),
    "folder": (lambda p: p.mkdir(), "there is no adapter_config.json in it"),
    "empty": (lambda p: raw(p, b""), "empty or cut off"),
    "text": (lambda p: raw(p, b"just some words, no tensors at all"), "a text, .* says 'just some words"),
    "lfs pointer": (
        lambda p: raw(p, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "Git LFS pointer",
    ),
    "web page": (lambda p: raw(p, b"\n<!DOCTYPE html><html><body>404</body></html>"), "a web page"),
    "page with a mark": (lambda p: raw(p, b"\xef\xbb\xbf<!DOCTYPE html><html>"), "a web page"),
    "page with a comment": (lambda p: raw(p, b"<!-- x --><html><body>login</body></html>"), "a web page"),
    "XML": (
        lambda p: raw(p, b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
        "answer in XML",
    ),
    "JSON": (lambda p: raw(p, b'{"error":"Unauthorized","message":"log in"}'), "a text, .*Unauthorized"),
    "no entry": (lambda p: raw(p, b"Entry not found"), "a text, .* says 'Entry not found'"),
    "zip": (lambda p: raw(p, b"PK\x03\x04" + bytes(60)), "a zip archive, .* unpack it"),
    "gzip": (lambda p: raw(p, gzip.compress(b"x" * 99)), "an archive; unpack it"),
    "7z": (lambda p: raw(p, b"7z\xbc\xaf\x27\x1c" + bytes(60)), "an archive; unpack it"),
    "tar": (lambda p: raw(p, b"lora.safetensors".ljust(257, b"\0") + b"ustar" + bytes(99)), "an archive"),
    "GGUF": (lambda p: raw(p, b"GGUF\x03\0\0\0" + bytes(60)), "a GGUF file"),
    "picture": (lambda p: raw(p, b"\x89PNG\r\n\x1a\n" + bytes(60)), "a picture, not the model"),
    "zeros": (lambda p: raw(p, bytes(9000)), "nothing but zeros"),
    "pickle": (lambda p: torch.save({"x": torch.ones(1)}, p), "a PyTorch pickle"),
    "old pickle": (
        lambda p: torch.save({"x": torch.ones(1)}, p, _use_new_zipfile_serialization=False),
        "a PyTorch pickle",
    ),
    "absurd length": (
        lambda p: raw(p, struct.pack("<Q", 2**63) + b"{}" * 50),
        "header length makes no sense",
    ),
    "cut header": (lambda p: raw(p, peft(p).read_bytes()[:40]), "cut off inside its header"),
    "truncated": (truncated, "cut off inside the tensor"),
    "no JSON": (lambda p: raw(p, struct.pack("<Q", 8) + b"{broken}" * 3), "header is not JSON"),
    "deep JSON": (lambda p: raw(p, struct.pack("<Q", 200_000) + b"[" * 200_000), "header is not JSON"),
    "list": (lambda p: headed(p, [1, 2]), "header is not a table"),
    "no tensors": (lambda p: headed(p, {}), "holds 0 tensors"),
    "metadata": (
        lambda p: headed(p, {"__metadata__": {"a": 1}, **entry()}, bytes(8)),
        "metadata is not a table",
    ),
    "negative": (lambda p: headed(p, entry(shape=[-2]), bytes(8)), "describes the tensor 'x' badly"),
    "no shape": (lambda p: headed(p, {"x": {"dtype": "F32"}}), "describes the tensor 'x' badly"),
    "overlap": (lambda p: headed(p, entry(shape=[9]), bytes(8)), "describes the tensor 'x' badly"),
    "forged": (
        lambda p: headed(p, entry(shape=[2**40], data_offsets=[0, 2**42]), bytes(8)),
        "cut off inside",
    ),
    "type": (lambda p: headed(p, entry(dtype=["F32"]), bytes(8)), "describes the tensor 'x' badly"),
    "no type": (lambda p: headed(p, entry(dtype="F31"), bytes(8)), "of type 'F31', which safetensors"),
    "dimensions": (
        lambda p: headed(p, entry(shape=[2] + [1] * 8), bytes(8)),
        "describes the tensor 'x' badly",
    ),
    "long name": (
        lambda p: headed(p, {"x" * 60_000: entry()["x"]}, bytes(8)),
        "whose name has 60,000 characters, 'x{40}…'; at most",
    ),
    "integers": (lambda p: peft(p, up=torch.ones(6, 2, dtype=torch.int32)), "of type I32; F64, F32"),
    "flag": (lambda p: peft(p, alpha=torch.tensor(True)), "of type BOOL"),
    "no LoRA": (
        lambda p: save_file({"model.weight": torch.ones(2, 2)}, p),
        "no part of a plain LoRA in any known layout",
    ),
    "no up": (lambda p: peft(p, up=None), "without the up factor"),
    "no down": (lambda p: peft(p, down=None), "without the down factor"),
    "mismatch": (lambda p: peft(p, up=torch.ones(6, 3)), "do not fit each other"),
    "convolution": (lambda p: peft(p, down=torch.ones(2, 4, 3, 3)), "only LoRA on linear layers"),
    "rank": (
        lambda p: peft(p, down=torch.ones(limits.MAX_RANK + 1, 1), up=torch.ones(1, limits.MAX_RANK + 1)),
        f"has rank {limits.MAX_RANK + 1}",
    ),
    "no rank": (lambda p: peft(p, down=torch.ones(0, 4), up=torch.ones(6, 0)), "has rank 0"),
    "NaN": (lambda p: peft(p, up=torch.full((6, 2), float("nan"))), "NaN or infinity"),
    "infinity": (lambda p: peft(p, down=torch.full((2, 4), float("inf"))), "NaN or infinity"),
    "DoRA": (
        lambda p: peft(p, None, **{f"{Q}.lora_magnitude_vector": torch.ones(6)}),
        "only plain LoRA can be merged",
    ),
    "alpha": (lambda p: peft(p, alpha=torch.ones(2)), "should be one number"),
    "config": (lambda p: peft(p, {"lora_adapter_metadata": "{"}), "is not JSON"),
    "config list": (lambda p: peft(p, {"lora_adapter_metadata": "[]"}), "is not a table"),
    "config huge alpha": (
        lambda p: peft(p, {"lora_adapter_metadata": '{"unet.lora_alpha": 1e999}'}),
        "which is no number",
    ),
    "config infinite scale": (
        lambda p: peft(p, {"lora_adapter_metadata": '{"unet.lora_alpha": 1e300}'}),
        r"too large for float32 .its alpha is 1e\+300",
    ),
    "infinite product": (
        lambda p: peft(p, down=torch.full((2, 4), 1e30), up=torch.full((6, 2), 1e30)),
        "too large for float32 .its alpha is none",
    ),
    "config pattern": (
        lambda p: peft(p, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(a+)+b": 1}}'}),
        "the pattern .* of which not all is understood",
    ),
    "config patterns": (
        lambda p: peft(
            p,
            {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {f"x{k}": 1 for k in range(9999)}})},
        ),
        "9,999 patterns of alpha",
    ),
    "config list of patterns": (
        lambda p: peft(p, {"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'}),
        "alpha_pattern that is not a table",
    ),
    "config alpha": (
        lambda p: peft(p, {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}),
        "which is no number",
    ),
    "twice": (
        lambda p: save_file({f"{stem}.lora_A.weight": torch.ones(2, 4) for stem in (TEXT_Q, FILE_TEXT_Q)}, p),
        "holds the down of text_encoder.* twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_one_clear_sentence(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    path = tmp_path / "some.safetensors"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        formats.read(path)
    said = str(caught.value)
    assert said.startswith("some.safetensors cannot be used: ")
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("mark", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b"])
def test_a_header_as_long_as_others_begin_is_a_header(tmp_path: Path, mark: bytes) -> None:
    content = peft(tmp_path / "some.safetensors").read_bytes()
    length, wanted = struct.unpack("<Q", content[:8])[0], int.from_bytes(mark, "little")
    padded = content[8 : 8 + length].ljust(wanted) + content[8 + length :]
    raw(tmp_path / "some.safetensors", struct.pack("<Q", wanted) + padded)
    assert (tmp_path / "some.safetensors").read_bytes().startswith(mark)
    assert list(formats.read(tmp_path / "some.safetensors").lora) == [Q]


def test_what_a_file_is_says_more_than_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100)
    ids = torch.arange(77)[None]  # whole numbers, as every checkpoint has
    save_file(
        {"cond_stage_model.transformer.text_model.embeddings.position_ids": ids}, tmp_path / "sd.safetensors"
    )
    with pytest.raises(UserError, match="a whole checkpoint, not a LoRA"):
        formats.read(tmp_path / "sd.safetensors")
    monkeypatch.setattr(limits, "MAX_EMBEDDING_BYTES", 100)
    with pytest.raises(UserError, match="a LoRA, not a learned token"):
        formats.read_embeddings(peft(tmp_path / "lora.safetensors"))


def test_a_file_over_the_size_limit_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100)
    with pytest.raises(UserError, match="at most 100 are read"):
        formats.read(peft(tmp_path / "big.safetensors"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"<{k}>": torch.ones(4) for k in range(limits.MAX_TOKENS + 1)}, "tokens are read"),
        ({"clip_g": torch.ones(4), "clip_l": torch.ones(4)}, "Stable Diffusion XL"),
        ({"<a>": torch.ones(2, 2, 2)}, r"\(vectors, width\) is expected"),
        ({"emb_params": torch.ones(75, 2)}, "has 75 vectors; from 1 to 64 are read"),
        ({"emb_params": torch.ones(2, 4, dtype=torch.int32)}, "of type I32"),
        ({"emb_params": torch.ones(4), "clip_l": torch.ones(4)}, "the token 'token' twice"),
        ({"emp_params": torch.ones(4), "emp_params_out": torch.ones(4)}, "an output embedding"),
        ({"clip_l": torch.ones(4), "t5": torch.ones(4)}, "another text encoder"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 4)}, "a LoRA, not a learned token"),
        ({"lora_te_x.lora_down.weight": torch.ones(2, 4)}, "a LoRA, not a learned token"),
        ({"unet:0:up": torch.ones(2, 4)}, "a LoRA, not a learned token"),
        ({"text_projection.weight": torch.ones(4, 4)}, "a part of a model, not a learned token"),
        ({"<a>": torch.full((4,), float("nan"))}, "NaN or infinity"),
        ({"a\nb": torch.ones(4)}, "cannot be used in a prompt"),
        ({" a": torch.ones(4)}, "cannot be used in a prompt"),
        ({"a" * 200: torch.ones(4)}, "cannot be used in a prompt"),
    ],
)
def test_a_bad_embedding_gets_one_clear_sentence(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "token.safetensors")
    with pytest.raises(UserError, match=message):
        formats.read_embeddings(tmp_path / "token.safetensors")


@pytest.mark.parametrize(
    ("tensors", "meant"),
    [
        ({"<a>": torch.ones(4), "my cat v1.5": torch.ones(4)}, True),
        ({"emb_params": torch.ones(2, 4)}, True),
        ({"bundle_emb.<a>.clip_l": torch.ones(2, 4)}, True),
        ({"<a>": torch.full((4,), float("nan"))}, True),
        ({"emb_params": torch.ones(100, 4)}, True),
        ({"clip_g": torch.ones(4), "clip_l": torch.ones(4)}, True),
        ({"t5": torch.ones(4)}, True),
        ({f"<{k}>": torch.ones(4) for k in range(limits.MAX_TOKENS + 1)}, True),
        ({"<a>": torch.ones(4), f"{Q}.lora_A.weight": torch.ones(2, 4)}, False),
        ({"bundle_emb.<a>.clip_l": torch.ones(4), "lora_te_x.lora_up.weight": torch.ones(2, 4)}, False),
        ({"<a>": torch.ones(4), "unet:0:up": torch.ones(2, 4)}, False),
        ({"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(2, 4)}, False),
        ({"unet.mid_block.attentions.0.proj_in.hada_w1_a": torch.ones(2, 4)}, False),
        ({"text_projection.weight": torch.ones(4, 4)}, False),
    ],
)
def test_keys_tell_what_is_meant_as_tokens(tmp_path: Path, tensors: dict[str, Tensor], meant: bool) -> None:
    path = tmp_path / "some.safetensors"
    save_file(tensors, path)
    assert formats.holds_tokens(path) == meant
    if not meant:
        with pytest.raises(UserError, match="not a learned token"):
            formats.read_embeddings(path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: raw(p, b"words")])
def test_what_is_no_file_of_tensors_holds_no_tokens(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "some.safetensors")
    assert not formats.holds_tokens(tmp_path / "some.safetensors")


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    lora, token = peft(tmp_path / "lora.safetensors"), tmp_path / "token.safetensors"
    formats.write_embedding(token, "<dog>", torch.ones(1, 4))
    one, learned = formats.read(lora).lora[Q], formats.read_embeddings(token)["<dog>"]
    for path in (lora, token):
        with path.open("r+b") as file:  # in place: what is mapped would change, too
            file.write(bytes(path.stat().st_size))
    assert torch.equal(one.down, adapter().down) and torch.equal(one.up, adapter().up)
    assert torch.equal(learned, torch.ones(1, 4))


def test_the_names_of_files_are_known_without_torch() -> None:
    code = "import sys, iteris_sd.formats.peft_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What diffusers makes of our files


def attention_layers(pipeline: StableDiffusionPipeline) -> dict[str, nn.Linear]:
    """Every attention projection of the pipeline under its canonical name."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    return {
        f"{component}.{path.removeprefix('text_model.')}": module
        for component in ("unet", "text_encoder")
        for path, module in getattr(pipeline, component).named_modules()
        if path.endswith(ends) and isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("spread", [0, 3], ids=["equal ranks", "unequal ranks"])
def test_diffusers_injects_every_layer_with_the_same_delta(tiny_sd, tmp_path: Path, spread: int) -> None:
    layers = attention_layers(tiny_sd)
    rng = torch.Generator().manual_seed(1)
    lora = LoRA(
        {
            name: random_adapter(module.out_features, module.in_features, 2 + i % (spread + 1), rng).to(
                dtype=torch.float32
            )
            for i, (name, module) in enumerate(layers.items())
        }
    )
    assert len(lora.parts()["unet"]) > 20
    assert len(lora.parts()["text_encoder"]) == 8
    before = {name: module.weight.detach().clone() for name, module in layers.items()}
    formats.write(tmp_path / "merged.safetensors", lora)
    tiny_sd.load_lora_weights(tmp_path / "merged.safetensors")
    injected = [m for c in (tiny_sd.unet, tiny_sd.text_encoder) for m in c.modules() if hasattr(m, "lora_A")]
    assert len(injected) == len(lora)
    tiny_sd.fuse_lora(components=["unet", "text_encoder"])
    for name, module in layers.items():
        torch.testing.assert_close(module.weight - before[name], lora[name].delta(), rtol=1e-4, atol=1e-5)


def test_what_diffusers_saves_is_read(tiny_sd, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    tiny_sd.unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(tiny_sd.unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    found = formats.read(tmp_path / "pytorch_lora_weights.safetensors").lora
    layers = {n: m for n, m in tiny_sd.unet.named_modules() if hasattr(m, "lora_A")}
    assert set(found) == {f"unet.{name}" for name in layers}
    for name, module in layers.items():
        torch.testing.assert_close(found[f"unet.{name}"].delta(), module.get_delta_weight("default"))


@pytest.mark.parametrize("vectors", [1, 2])
def test_diffusers_loads_our_token(tiny_sd, tmp_path: Path, vectors: int) -> None:
    learned = torch.randn(vectors, 8)
    formats.write_embedding(tmp_path / "dog.safetensors", "<dog>", learned)
    tiny_sd.load_textual_inversion(tmp_path / "dog.safetensors")
    prompt = tiny_sd.maybe_convert_prompt("<dog>", tiny_sd.tokenizer)
    ids = tiny_sd.tokenizer(prompt).input_ids[1:-1]
    assert len(ids) == vectors
    assert torch.equal(tiny_sd.text_encoder.get_input_embeddings().weight[ids], learned)
