"""What people bring at once: which file is the LoRA, which its tokens, and what a zip of them holds."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from iteris_sd import bringing, formats, limits
from iteris_sd.errors import UserError
from iteris_sd.kept import Kept
from iteris_sd.lora import LoRA, LowRank

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT_Q = "text_encoder.encoder.layers.0.self_attn.q_proj"
CONFIG = "adapter_config.json"


@pytest.fixture
def kept(tmp_path: Path, toy: Path) -> Kept:
    return Kept(tmp_path / "data" / "concepts")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with everything that one may bring."""
    desk = tmp_path / "desk"
    desk.mkdir()
    for number, name in enumerate(("dog", "cat")):
        formats.write(desk / f"{name}.safetensors", small(TO_K, seed=number), {})
    formats.write_embedding(desk / "rex.safetensors", "<rex>", torch.ones(1, 768))
    save_file({"emb_params": torch.ones(2, 768)}, desk / "fluffy.safetensors")
    for name, layers in (("whole", (TO_K,)), ("parts", (TO_K, TEXT_Q))):
        formats.write(desk / name, small(*layers), layout="peft")
        for config in (desk / name).rglob(CONFIG):  # with a scale that only the settings tell
            config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 8}))
    (desk / "notes.txt").touch()
    return desk


def small(*layers: str, seed: int = 0) -> LoRA:
    rng = torch.Generator().manual_seed(seed)
    shapes = {TO_K: (768, 320), TEXT_Q: (768, 768)}
    return LoRA(
        {
            name: LowRank(torch.randn(2, width, generator=rng), torch.randn(out, 2, generator=rng))
            for name, (width, out) in ((name, shapes[name]) for name in layers)
        }
    )


def scattered(desk: Path, *names: str) -> list[Path]:
    """Files as a browser sends them: each in a folder of its own."""
    found = []
    for number, name in enumerate(names):
        place = desk.parent / "sent" / str(number) / Path(name).name
        place.parent.mkdir(parents=True, exist_ok=True)
        found.append(Path(shutil.copyfile(desk / name, place)))
    return found


def zipped(path: Path, folder: Path, *more: Path, top: str = "") -> Path:
    """A zip of a folder and of other files."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{top}{file.relative_to(folder)}")
        for file in more:
            archive.write(file, f"{top}{file.name}")
        archive.writestr(f"{top}README.md", "a model card")
        archive.writestr(f"{top}images/sample.png", "no picture")
        archive.writestr(f"__MACOSX/{top}._x.safetensors", "resource fork")
    return path


def same(one: LoRA, other: LoRA) -> bool:
    return set(one) == set(other) and all(torch.equal(one[n].delta(), other[n].delta()) for n in one)


def test_a_lora_comes_with_its_tokens(kept: Kept, desk: Path) -> None:
    concept = bringing.keep(
        kept, scattered(desk, "rex.safetensors", "dog.safetensors", "fluffy.safetensors"), trigger="<rex> dog"
    )
    loaded = concept.load()
    assert (concept.name, concept.trigger, concept.base) == ("dog-2", "<rex> dog", "sd15")
    assert {token: len(v) for token, v in loaded.tokens.items()} == {"<rex>": 1, "fluffy": 2}
    assert same(loaded.lora, small(TO_K))


def test_an_adapter_of_peft_comes_as_two_files(kept: Kept, desk: Path) -> None:
    files = scattered(desk, f"whole/unet/{CONFIG}", "whole/unet/adapter_model.safetensors", "rex.safetensors")
    concept = bringing.keep(kept, files)
    assert same(concept.load().lora, formats.read(desk / "whole").lora)
    assert concept.load().tokens.keys() == {"<rex>"} and concept.title == "rex"
    assert [place.name for place in kept.folder.iterdir()] == [concept.name]


@pytest.mark.parametrize("top", ["", "my-wolf/"])
@pytest.mark.parametrize("name", ["whole", "parts"])
def test_a_zip_of_peft_s_folder_keeps_its_scale(kept: Kept, desk: Path, name: str, top: str) -> None:
    path = zipped(desk / "wolf.zip", desk / name, desk / "rex.safetensors", top=top)
    concept = bringing.keep(kept, [path], weight=0.5)
    assert same(concept.load().lora, formats.read(desk / name).lora)
    assert (concept.name, concept.weight, list(concept.load().tokens)) == ("wolf", 0.5, ["<rex>"])


def test_a_zip_of_a_plain_lora_is_called_as_its_file_or_as_the_zip(kept: Kept, desk: Path) -> None:
    inside = desk / "inside"
    inside.mkdir()
    for name, expected in (("dog", "dog-2"), ("pytorch_lora_weights", "wolf")):
        shutil.copyfile(desk / "dog.safetensors", inside / f"{name}.safetensors")
        assert bringing.keep(kept, [zipped(desk / "wolf.zip", inside)]).name == expected
        (inside / f"{name}.safetensors").unlink()


def test_an_exported_concept_comes_back_with_its_own_words_and_tokens_more(kept: Kept, desk: Path) -> None:
    before = bringing.keep(kept, [desk / "dog.safetensors"], title="Rex", trigger="sks")
    kept.export_zip(before.name, desk / "rex.zip")
    after = bringing.keep(kept, [desk / "rex.zip"], tokens=[desk / "rex.safetensors"], trigger="unheard")
    assert (after.name, after.trigger, list(after.load().tokens)) == ("rex-2", "sks", ["<rex>"])
    with pytest.raises(UserError, match="rex.zip is a whole concept; add it alone"):
        bringing.keep(kept, [desk / "rex.zip", desk / "rex.safetensors"])
    with pytest.raises(UserError, match="dog.safetensors cannot be used"):
        bringing.keep(kept, [desk / "rex.zip"], tokens=[desk / "dog.safetensors"])
    assert list(kept.library().concepts) == ["rex", "rex-2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["rex.safetensors"],
            "rex.safetensors holds learned tokens and no LoRA; add it together with its LoRA",
        ),
        (
            ["rex.safetensors", "fluffy.safetensors"],
            "rex.safetensors, fluffy.safetensors holds learned tokens",
        ),
        (
            ["dog.safetensors", "cat.safetensors"],
            "several LoRAs, dog.safetensors, cat.safetensors; bring one at",
        ),
        (["dog.safetensors", "notes.txt"], "notes.txt is of no use here; choose .safetensors files"),
        (
            [f"whole/unet/{CONFIG}", "rex.safetensors"],
            f"There are 1 {CONFIG} and 0 LoRAs, and one of each belongs",
        ),
        (["dog.safetensors", "broken.safetensors"], "broken.safetensors cannot be used"),
        (["broken.zip"], "broken.zip cannot be imported: it is damaged, or no zip"),
        (["empty.zip"], "empty.zip holds no .safetensors file; choose a zip with a LoRA"),
        (
            ["escaping.zip"],
            "escaping.zip cannot be imported: its entry '../x.safetensors' has an unsafe name",
        ),
        (["empty.zip", "empty.zip"], "These are several zips; bring one at a time"),
        (
            ["notes.txt"] * (limits.MAX_BROUGHT + 1),
            f"These are 41 files; a concept has at most {limits.MAX_BROUGHT}",
        ),
    ],
)
def test_what_is_no_one_lora_is_told_and_not_kept(
    kept: Kept, desk: Path, names: list[str], message: str
) -> None:
    (desk / "broken.safetensors").write_bytes(b"nothing")
    (desk / "broken.zip").write_bytes(b"nothing")
    zipped(desk / "empty.zip", desk / "nowhere")
    zipped(desk / "escaping.zip", desk / "nowhere")
    with zipfile.ZipFile(desk / "escaping.zip", "a") as archive:
        archive.writestr("../x.safetensors", "x")
    with pytest.raises(UserError, match=message):
        bringing.keep(kept, scattered(desk, *names))
    assert not kept.library().concepts and not list(kept.folder.glob("*"))


def test_a_zip_may_not_unpack_to_more_than_a_file_may_have(
    kept: Kept, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(desk / "wolf.zip", desk / "whole")
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="wolf.zip cannot be imported: it unpacks to more than 1,000 bytes"):
        bringing.keep(kept, [path])


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda desk: [desk / "rex.safetensors", desk / "fluffy.safetensors"], True),
        (lambda desk: [desk / "rex.safetensors", desk / "dog.safetensors"], False),
        (lambda desk: [desk / "notes.txt"], False),
        (lambda desk: [], True),
    ],
)
def test_tokens_are_told_from_loras(
    desk: Path, choose: Callable[[Path], Sequence[Path]], expected: bool
) -> None:
    assert bringing.are_tokens(choose(desk)) is expected


def test_a_lora_of_a_narrow_model_is_no_token(tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"  # its factors have the shapes of tokens
    formats.write(path, LoRA({TO_K: LowRank(torch.ones(2, 4), torch.ones(6, 2))}), {})
    assert not bringing.are_tokens([path])


def test_tokens_are_added_to_a_concept_later(kept: Kept, desk: Path) -> None:
    concept = bringing.keep(kept, [desk / "dog.safetensors"])
    kept.add_tokens(concept.name, [desk / "rex.safetensors"])
    after = kept.add_tokens(concept.name, [desk / "fluffy.safetensors"])
    assert after.load().tokens.keys() == {"<rex>", "fluffy"}
    formats.write_embedding(desk / "rex.safetensors", "<rex>", torch.zeros(1, 768))
    tokens = kept.add_tokens(concept.name, [desk / "rex.safetensors"]).load().tokens
    assert tokens.keys() == {"<rex>", "fluffy"} and not tokens["<rex>"].any()


def test_tokens_that_are_none_or_too_many_are_not_added(
    kept: Kept, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concept = bringing.keep(kept, [desk / "dog.safetensors"], tokens=[desk / "rex.safetensors"])
    with pytest.raises(UserError, match="cat.safetensors cannot be used"):
        kept.add_tokens(concept.name, [desk / "fluffy.safetensors", desk / "cat.safetensors"])
    monkeypatch.setattr(limits, "MAX_EMBEDDINGS", 1)
    with pytest.raises(UserError, match="dog-2 has 2 files of learned tokens; at most 1 are kept"):
        kept.add_tokens(concept.name, [desk / "fluffy.safetensors"])
    with pytest.raises(UserError, match="There is no concept 'wolf'"):
        kept.add_tokens("wolf", [desk / "fluffy.safetensors"])
    assert kept.library().find("dog-2").load().tokens.keys() == {"<rex>"}
    assert [place.name for place in kept.folder.iterdir()] == ["dog-2"]
