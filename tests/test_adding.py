"""Concepts that people bring: told apart by their shapes, guessed, kept, and fetched from the Hub."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from iteris_sd import adding, formats, hub
from iteris_sd.calibration import finish
from iteris_sd.cli import app
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.kept import Kept
from iteris_sd.lora import LoRA, LowRank
from tests.fake_hub import FakeHub

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def file_for(width: int, out: int, path: Path, **metadata: str) -> Path:
    """A LoRA of one layer that reads text states of some width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    adapter = LowRank(torch.randn(2, width, generator=rng), torch.randn(out, 2, generator=rng))
    formats.write(path, LoRA({TO_K: adapter}), metadata)
    return path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """A shelf of one's own, for the terminal too."""
    monkeypatch.setenv("ITERIS_SD_DATA", str(tmp_path / "data"))
    return Kept.usual()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one LoRA and its learned token."""
    lora = file_for(768, 320, tmp_path / "hub" / "lora.safetensors", instance_prompt="a photo of sks dog")
    token = tmp_path / "hub" / "sks_emb.safetensors"
    formats.write_embedding(token, "<sks>", torch.ones(2, 768))
    files = {"pytorch_lora_weights.safetensors": lora.read_bytes(), token.name: token.read_bytes()}
    with FakeHub({"us/dog": files}).running() as fake:
        fake.stand_in(monkeypatch, tmp_path / "cache")
        yield fake


def terminal(*words: str) -> str:
    """What a command prints; it must succeed."""
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return str(done.output)


def test_the_family_is_told_by_shapes(toy: Path, tmp_path: Path) -> None:
    real = adding.opened(file_for(768, 320, tmp_path / "my_dog.safetensors"))
    assert (real.base, real.name, real.class_noun) == ("sd15", "my_dog", "my dog")
    with pytest.raises(UserError, match="Stable Diffusion 2"):
        adding.opened(file_for(1024, 320, tmp_path / "two.safetensors"))
    with pytest.raises(UserError, match=r"The LoRA wide.safetensors does not fit .*: it is 99 × 768"):
        adding.opened(file_for(768, 99, tmp_path / "wide.safetensors"))


def test_what_fits_nothing_is_compared_with_stable_diffusion(toy: Path) -> None:
    adapter = LowRank(torch.ones(1, 320), torch.ones(999, 1))
    with pytest.raises(UserError, match=r"it is 999 × 320 and the layer 320 × 320"):
        adding.family(LoRA({TO_K.replace("attn2.to_k", "attn1.to_k"): adapter}), "The LoRA x")


def test_a_folder_of_diffusers_output_is_kept_as_its_file(toy: Path, kept: Kept, tmp_path: Path) -> None:
    folder = file_for(768, 320, tmp_path / "my_dog" / "pytorch_lora_weights.safetensors").parent
    (folder / "checkpoint-500").mkdir()
    assert adding.opened(folder).name == "my_dog"
    concept = adding.keep(kept, folder)
    assert (concept.name, concept.lora.name) == ("my-dog", "lora.safetensors")
    assert set(concept.load().lora) == {TO_K}


def test_paths_and_names_are_opened(toy: Path, tmp_path: Path) -> None:
    path = file_for(768, 320, tmp_path / "tent" / "lora.safetensors")
    library = finish(adding.opening(Library.shipped(), ["dog", str(path)]))
    assert library.find(str(path)).name == "tent" and library.find("dog").base == "storybook"
    with pytest.raises(UserError, match="There is no concept and no file"):
        finish(adding.opening(Library.shipped(), [str(tmp_path / "gone.safetensors")]))
    with pytest.raises(UserError, match="There is no concept 'wolf'"):
        finish(adding.opening(Library.shipped(), ["wolf"]))


def test_a_concept_comes_from_the_hub_with_its_tokens(toy: Path, fake: FakeHub, kept: Kept) -> None:
    id = hub.parse("us/dog")
    assert id is not None
    got = finish(hub.fetch_lora(id))
    assert re.fullmatch("[0-9a-f]{40}", got.revision)
    concept = adding.keep(kept, got.file, origin="us/dog", revision=got.revision, tokens=got.tokens)
    assert (concept.name, concept.trigger, concept.class_noun) == ("dog-2", "sks dog", "dog")
    assert (concept.source, concept.revision, concept.base) == ("us/dog", got.revision, "sd15")
    assert {token: v.shape[0] for token, v in concept.load().tokens.items()} == {"<sks>": 2}
    opened = finish(adding.opening(Library.shipped(), ["us/dog"])).find("us/dog")
    assert opened.revision == got.revision and opened.load().tokens.keys() == {"<sks>"}


def test_a_visitor_of_a_public_page_looks_with_nobodys_eyes(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.listing("us/dog")
    assert any("hf_secret" in str(asked) for asked in fake.asked)
    fake.asked.clear()
    monkeypatch.setenv("SPACE_ID", "us/space")
    id = hub.parse("us/dog")
    assert id is not None
    finish(hub.fetch_lora(id))
    assert fake.asked and not any("hf_secret" in str(asked) for asked in fake.asked)


def test_a_zip_that_fits_no_base_is_not_kept(toy: Path, kept: Kept, tmp_path: Path) -> None:
    other = Kept(tmp_path / "other")
    other.add(file_for(768, 99, tmp_path / "wide.safetensors"))
    other.export_zip("wide", tmp_path / "wide.zip")
    with pytest.raises(UserError, match="does not fit"):
        adding.unpack(kept, tmp_path / "wide.zip")
    assert not kept.library().concepts


@pytest.mark.parametrize(
    ("said", "told"),
    [("sd15", "is for Stable Diffusion v1.5, and by its shapes it is for Storybook"), ("storybook", None)],
)
def test_a_zip_must_tell_its_base_truly(
    toy: Path, kept: Kept, tmp_path: Path, said: str, told: str | None
) -> None:
    words = json.loads((toy / "concepts" / "dog" / "concept.json").read_text())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(toy / "concepts" / "dog" / "lora.safetensors", "lora.safetensors")
        archive.writestr("concept.json", json.dumps({**words, "base": said}))
    if told is None:
        assert adding.unpack(kept, tmp_path / "x.zip").base == "storybook"
        return
    with pytest.raises(UserError, match=f'x.zip says that its LoRA {told}; write "base": "storybook"'):
        adding.unpack(kept, tmp_path / "x.zip")
    assert not kept.library().concepts


def test_the_terminal_keeps_changes_takes_away_and_removes(toy: Path, kept: Kept, tmp_path: Path) -> None:
    file = file_for(768, 320, tmp_path / "my_dog.safetensors", instance_prompt="a photo of sks dog")
    picture = next((toy / "concepts" / "dog" / "references").glob("*.png"))
    said = terminal("concepts", "add", str(file), "--title", "My dog", "--picture", str(picture))
    assert said == "Kept my-dog: trigger 'sks dog', class noun 'dog', for Stable Diffusion v1.5.\n"
    assert "for Stable Diffusion" in terminal(
        "concepts", "edit", "my-dog", "--trigger", "rex", "--weight", "0.8"
    )
    listed = {one["name"]: one for one in json.loads(terminal("concepts", "--json"))}
    mine = listed["my-dog"]
    assert (mine["trigger"], mine["weight"], mine["references"]) == ("rex", 0.8, 1) and "barn" in listed
    terminal("concepts", "export", "my-dog", str(tmp_path / "dog.zip"))
    terminal("concepts", "remove", "my-dog")
    assert not kept.library().concepts
    assert "trigger 'rex'" in terminal("concepts", "add", str(tmp_path / "dog.zip"))
    assert "my-dog" in terminal("concepts")


def test_a_broken_folder_is_told_of_and_the_rest_listed(toy: Path, kept: Kept) -> None:
    shutil.copytree(toy / "concepts" / "dog", kept.folder / "good")
    (kept.folder / "bad").mkdir()
    done = CliRunner().invoke(app, ["concepts"])
    assert done.exit_code == 0 and "bad is left out" in done.output and "good" in done.output


def test_a_concept_is_as_strong_as_it_was_kept_unless_told(toy: Path, kept: Kept, tmp_path: Path) -> None:
    folder = shutil.copytree(toy / "concepts" / "cat", tmp_path / "cat")
    terminal("concepts", "add", str(folder), "--title", "My cat", "--weight", "0.5")
    few = [
        "--steps",
        "1",
        "--seeds",
        "0",
        "--methods",
        "linear",
        "--samples",
        "2",
        "--prompt",
        "a {0} by a {1}",
    ]
    out = tmp_path / "out"
    terminal("compose", "my-cat", "dog", *few, "--output", str(out))
    told = json.loads((out / "recipe.json").read_text())
    assert [(one["name"], one["weight"]) for one in told["concepts"]] == [("my-cat", 0.5), ("dog", 1.0)]
    terminal("compose", "my-cat", "dog", *few, "--weights", "1,2", "--output", str(out))
    told = json.loads((out / "recipe.json").read_text())
    assert [one["weight"] for one in told["concepts"]] == [1.0, 2.0]
