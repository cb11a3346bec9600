"""What people bring at once: which file is the LoRA, which its tokens, and what a zip of them holds."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from iteris_sd import bringing, formats, limits, zips
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


def test_a_second_name_in_a_zip_leads_nowhere(
    kept: Kept, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12 and later write to the name that Info-ZIP's extra field 0x7075 tells; older ones here do so, too."""
    target = tmp_path / "elsewhere.safetensors"
    entry = zipfile.ZipInfo("token.safetensors")
    told = struct.pack("<BL", 1, zlib.crc32(b"token.safetensors")) + str(target).encode()
    entry.extra = struct.pack("<HH", 0x7075, len(told)) + told
    with zipfile.ZipFile(desk / "slip.zip", "w") as archive:
        archive.write(desk / "dog.safetensors", "dog.safetensors")
        archive.writestr(entry, (desk / "rex.safetensors").read_bytes())
    if sys.version_info < (3, 12):
        listed = zipfile.ZipFile.infolist

        def as_later(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
            for found in listed(archive):
                found.filename = str(target) if found.extra else found.filename
            return listed(archive)

        monkeypatch.setattr(zipfile.ZipFile, "infolist", as_later)
    message = "its entry 'token.safetensors' has another name beside it, '/"
    for bring in (lambda: bringing.keep(kept, [desk / "slip.zip"]), lambda: zips.names(desk / "slip.zip")):
        with pytest.raises(UserError, match=message):
            bring()
    assert not target.exists() and not kept.library().concepts


def test_no_name_leads_out_of_the_folder_though_it_passed(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zips, "_check", lambda entry: None)
    for number, name in enumerate(("../x.safetensors", str(tmp_path / "x.safetensors"))):
        with zipfile.ZipFile(desk / "slip.zip", "w") as archive:
            entry = zipfile.ZipInfo("x")
            entry.filename = name  # as it is: the constructor would mend it
            archive.writestr(entry, b"x")
            archive.writestr("y", b"y")
        with pytest.raises(UserError, match="leads out of its folder; it is no honest zip"):
            zips.unpack(desk / "slip.zip", tmp_path / str(number) / "draft", lambda names: names)
    assert not list(tmp_path.rglob("x.safetensors"))


def test_tokens_of_one_file_name_are_all_kept(kept: Kept, desk: Path) -> None:
    """Diffusers calls every file of a token learned_embeds.safetensors."""

    def learned(token: str, value: float) -> Path:
        place = desk / f"{token.strip('<>')}-{value}" / "learned_embeds.safetensors"
        formats.write_embedding(place, token, torch.full((1, 768), float(value)))
        return place

    tokens = [learned("<one>", 1), learned("<two>", 2), learned("<ONE>", 3)]
    concept = bringing.keep(kept, [desk / "dog.safetensors"], tokens=tokens)
    assert {token: v[0, 0].item() for token, v in concept.load().tokens.items()} == {
        "<one>": 1,
        "<two>": 2,
        "<ONE>": 3,
    }
    names = [path.name.lower() for path in concept.embeddings]
    assert len(set(names)) == 3  # also where a disk does not tell capitals apart
    after = kept.edit(concept.name, tokens=[learned("<two>", 4), desk / "fluffy.safetensors"]).load().tokens
    assert {token: v[0, 0].item() for token, v in after.items()} == {
        "<one>": 1,
        "<two>": 4,
        "<ONE>": 3,
        "fluffy": 1,
    }
    kept.export_zip(concept.name, desk / "all.zip")
    assert bringing.keep(kept, [desk / "all.zip"]).load().tokens.keys() == after.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"<bad>": torch.full((1, 768), float("nan"))}, "bad.safetensors cannot be used: its tensor '<bad>' holds NaN"),
        ({"<bad>": torch.ones(100, 768)}, "bad.safetensors cannot be used: its token has 100 vectors"),
        (
            {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
            "bad.safetensors cannot be used: it is a token for Stable Diffusion XL",
        ),
        ({"<bad>": torch.ones(1, 1024)}, "The token '<bad>' is 1024 wide, and Stable Diffusion v1.5 takes tokens of"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_token_is_told_wherever_it_is_brought(
    kept: Kept, desk: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    bad = desk / "bad.safetensors"
    save_file(tensors, bad)
    assert bringing.are_tokens([bad])
    concept = bringing.keep(kept, [desk / "dog.safetensors"])
    with pytest.raises(UserError, match=message):
        bringing.keep(kept, [desk / "dog.safetensors", bad])
    with pytest.raises(UserError, match=message):
        kept.edit(concept.name, tokens=[bad])
    alone = message if "cannot be used" in message else "bad.safetensors holds learned tokens and no LoRA"
    with pytest.raises(UserError, match=alone):
        bringing.keep(kept, [bad])
    assert list(kept.library().concepts) == [concept.name] and not concept.embeddings


def test_files_in_capitals_are_known_among_several(kept: Kept, desk: Path) -> None:
    loud = [
        Path(shutil.copyfile(desk / f"{n}.safetensors", desk / f"{n}.SAFETENSORS")) for n in ("dog", "rex")
    ]
    assert bringing.keep(kept, loud).load().tokens.keys() == {"<rex>"}
    with zipfile.ZipFile(desk / "loud.ZIP", "w") as archive:
        for file in loud:
            archive.write(file, file.name)
    assert bringing.keep(kept, [desk / "loud.ZIP"]).load().tokens.keys() == {"<rex>"}


def test_a_lora_beside_an_adapter_is_not_left_out_silently(kept: Kept, desk: Path) -> None:
    folder = Path(shutil.copytree(desk / "whole" / "unet", desk / "adapter"))
    assert bringing.keep(kept, [zipped(desk / "one.zip", folder, desk / "rex.safetensors")])
    with pytest.raises(UserError, match="These are several LoRAs, .*cat.safetensors.*; bring one at a time"):
        bringing.keep(kept, [zipped(desk / "two.zip", folder, desk / "cat.safetensors")])


def test_a_zip_is_as_large_as_it_says_at_most(kept: Kept, desk: Path) -> None:
    path = zipped(desk / "wolf.zip", desk / "whole")
    with zipfile.ZipFile(path) as archive:
        files = [one.file_size for one in archive.infolist() if not one.filename.startswith("__MACOSX")]
    assert (
        bringing.size([path, desk / "rex.safetensors"])
        == sum(files) + (desk / "rex.safetensors").stat().st_size
    )
    with pytest.raises(UserError, match="wolf.zip cannot be imported: it unpacks to more than 2,000 bytes"):
        bringing.keep(kept, [path], most=2000)
    concept = bringing.keep(kept, [desk / "dog.safetensors"])
    kept.export_zip(concept.name, desk / "out.zip")
    with pytest.raises(UserError, match="out.zip cannot be imported: it unpacks to more than 2,000 bytes"):
        bringing.keep(kept, [desk / "out.zip"], most=2000)


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
    kept.edit(concept.name, tokens=[desk / "rex.safetensors"])
    after = kept.edit(concept.name, tokens=[desk / "fluffy.safetensors"])
    assert after.load().tokens.keys() == {"<rex>", "fluffy"}
    formats.write_embedding(desk / "rex.safetensors", "<rex>", torch.zeros(1, 768))
    tokens = kept.edit(concept.name, tokens=[desk / "rex.safetensors"]).load().tokens
    assert tokens.keys() == {"<rex>", "fluffy"} and not tokens["<rex>"].any()


def test_tokens_that_are_none_or_too_many_are_not_added(
    kept: Kept, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concept = bringing.keep(kept, [desk / "dog.safetensors"], tokens=[desk / "rex.safetensors"])
    with pytest.raises(UserError, match="cat.safetensors cannot be used"):
        kept.edit(concept.name, tokens=[desk / "fluffy.safetensors", desk / "cat.safetensors"])
    monkeypatch.setattr(limits, "MAX_EMBEDDINGS", 1)
    with pytest.raises(UserError, match="dog-2 has 2 learned tokens; at most 1 are kept: leave some out"):
        kept.edit(concept.name, tokens=[desk / "fluffy.safetensors"])
    with pytest.raises(UserError, match="There is no concept 'wolf'"):
        kept.edit("wolf", tokens=[desk / "fluffy.safetensors"])
    assert kept.library().find("dog-2").load().tokens.keys() == {"<rex>"}
    assert [place.name for place in kept.folder.iterdir()] == ["dog-2"]
