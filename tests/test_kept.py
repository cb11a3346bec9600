"""Concepts that a person keeps: copied whole or not at all, changed, and taken from one machine to another."""

import io
import json
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from iteris_sd import formats, limits
from iteris_sd.concepts import Concept, Library, read_concept
from iteris_sd.errors import UserError
from iteris_sd.kept import UNFINISHED, Kept
from iteris_sd.lora import LoRA
from tests.toys import random_adapter

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_Q = "text_encoder.encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def kept(tmp_path: Path, toy: Path) -> Kept:
    return Kept(tmp_path / "data" / "concepts")


@pytest.fixture
def dog(toy: Path) -> Path:
    """A shipped concept's folder."""
    return toy / "concepts" / "dog"


def small_lora(*names: str) -> LoRA:
    rng = torch.Generator().manual_seed(len(names))
    return LoRA({name: random_adapter(6, 4, 2, rng).to(dtype=torch.float32) for name in names or (Q,)})


def lora_file(path: Path, **metadata: str) -> Path:
    formats.write(path, small_lora(), metadata)
    return path


def peft_folder(path: Path, *names: str, alpha: float = 8) -> Path:
    """An adapter as PEFT saves it, with a scale that only its settings tell."""
    formats.write(path, small_lora(*names), layout="peft")
    for config in path.rglob("adapter_config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": alpha}))
    return path


def same(one: LoRA, other: LoRA) -> bool:
    return set(one) == set(other) and all(torch.equal(one[n].delta(), other[n].delta()) for n in one)


def left(kept: Kept) -> list[str]:
    """All that is in the folder, hidden things too."""
    return sorted(p.name for p in kept.folder.iterdir()) if kept.folder.exists() else []


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


# Adding


def test_a_file_is_copied_and_its_words_are_guessed(kept: Kept, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "my_dog-v2.safetensors", instance_prompt="a photo of sks dog")
    added = kept.add(file, revision="abc")
    assert added == Concept(
        name="my-dog-v2",
        title="my dog v2",
        trigger="sks dog",
        class_noun="dog",
        lora=kept.folder / "my-dog-v2" / "lora.safetensors",
        base="sd15",
        source="my_dog-v2.safetensors",
        revision="abc",
    )
    assert added.lora.read_bytes() == file.read_bytes()
    assert kept.library().concepts == {added.name: added}
    assert left(kept) == [added.name]


def test_what_is_said_is_kept(kept: Kept, tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "title": "Unser Hund\n 🐕",
        "trigger": "<rex> dog",
        "class_noun": "dog",
        "weight": 0.5,
    }
    added = kept.add(lora_file(tmp_path / "x.safetensors"), **said, base="storybook", origin="some/dog@main")
    words = json.loads((kept.folder / added.name / "concept.json").read_text())
    assert words == {
        **said,
        "title": "Unser Hund 🐕",
        "name": "unser-hund",
        "base": "storybook",
        "source": "some/dog@main",
        "revision": "",
        "description": "",
        "licence": "",
    }
    assert (
        added.described().items()
        >= {"title": "Unser Hund 🐕", "weight": 0.5, "source": "some/dog@main"}.items()
    )


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("../../Etc/passwd", "etc-passwd"),
        ("..", "concept"),
        ("Łódź & Co.", "łódź-co"),
        ("🐕", "concept"),
        ("N" * 64, "n" * 60),
    ],
)
def test_names_are_made_fit_for_folders(kept: Kept, tmp_path: Path, name: str, slug: str) -> None:
    assert kept.add(lora_file(tmp_path / "x.safetensors"), name=name).name == slug
    assert left(kept) == [slug]


def test_a_file_s_long_name_is_cut(kept: Kept, tmp_path: Path) -> None:
    added = kept.add(lora_file(tmp_path / f"{'very_' * 20}long.safetensors"))
    assert added.name == "very-" * 11 + "very" and added.title == "very " * 12 + "very"


def test_names_are_numbered_where_they_are_taken(kept: Kept, tmp_path: Path, dog: Path) -> None:
    file = lora_file(tmp_path / "x.safetensors")
    assert [kept.add(file, name="fox").name for _ in range(3)] == ["fox", "fox-2", "fox-3"]
    assert [kept.add(dog).name for _ in range(2)] == ["dog-2", "dog-3"]  # a shipped one is called dog
    joined = kept.library().joined(Library.shipped())
    assert list(joined.concepts) == ["dog-2", "dog-3", "fox", "fox-2", "fox-3", "barn", "cat", "dog"]
    assert all(joined.find(name).name == name for name in joined.concepts)


def test_a_file_called_as_all_are_has_its_folder_s_or_repository_s_name(kept: Kept, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "red fox" / "pytorch_lora_weights.safetensors")
    assert kept.add(file).title == "red fox"
    assert kept.add(file, origin="some/grey-fox:unet@v1").trigger == "grey fox"
    named = lora_file(tmp_path / "blue.safetensors")
    assert kept.add(named, origin="some/grey-fox").title == "blue"


def test_a_concept_s_folder_is_kept_with_all_it_has(kept: Kept, dog: Path, tmp_path: Path) -> None:
    shipped = read_concept(dog)
    added = kept.add(dog)
    assert (added.title, added.trigger, added.class_noun) == ("Our dog", "<rex> dog", "dog")
    assert (added.base, added.weight) == ("storybook", 1.0)
    loaded, before = added.load(), shipped.load()
    assert same(loaded.lora, before.lora) and loaded.sha256 == before.sha256
    assert {t: v.tolist() for t, v in loaded.tokens.items()} == {
        t: v.tolist() for t, v in before.tokens.items()
    }
    assert [p.tobytes() for p in added.pictures()] == [p.tobytes() for p in shipped.pictures()]
    plain = Path(shutil.copytree(dog, tmp_path / "plain", ignore=shutil.ignore_patterns("embeddings")))
    changed = kept.add(plain, title="Rex", weight=2, base="sd15")
    assert (changed.name, changed.title, changed.weight, changed.base) == ("rex", "Rex", 2.0, "sd15")


@pytest.mark.parametrize("names", [(Q,), (Q, TEXT_Q)])
def test_a_folder_of_peft_keeps_its_scale(kept: Kept, tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = peft_folder(tmp_path / "wolf", *names)
    added = kept.add(folder)
    assert (added.title, added.lora) == ("wolf", kept.folder / "wolf" / "lora")
    assert same(added.load().lora, formats.read(folder).lora)
    torch.testing.assert_close(added.load().lora[Q].delta(), 4 * small_lora(*names)[Q].delta())
    again = kept.add(kept.folder / "wolf")
    assert again.name == "wolf-2" and same(again.load().lora, added.load().lora)


def test_a_file_of_peft_brings_its_settings(kept: Kept, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "wolf") / "unet"
    added = kept.add(folder / "adapter_model.safetensors", name="wolf")
    assert same(added.load().lora, formats.read(folder).lora)
    assert sorted(p.name for p in added.lora.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# Pictures


def photo(path: Path, size: tuple[int, int] = (40, 20), **extra: Any) -> Path:
    Image.new("RGB", size, "teal").save(path, **extra)
    return path


def test_pictures_are_upright_small_and_silent(kept: Kept, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "a photographer"  # turned by a quarter
    told = PngInfo()
    told.add_text("place", "home")
    photos = [
        photo(tmp_path / "a.jpg", exif=exif, icc_profile=b"profile"),
        photo(tmp_path / "b.png", (3000, 300), pnginfo=told, dpi=(300, 300)),
        photo(tmp_path / "c.webp"),
    ]
    added = kept.add(lora_file(tmp_path / "x.safetensors"), references=photos)
    assert [path.name for path in added.references] == ["01.png", "02.png", "03.png"]
    assert [picture.size for picture in added.pictures()] == [(20, 40), (1024, 102), (40, 20)]
    for path in added.references:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and not picture.info and not picture.getexif()


def too_many(folder: Path) -> list[Path]:
    return [photo(folder / "x.png")] * (limits.MAX_REFERENCES + 1)


def no_picture(folder: Path) -> list[Path]:
    (folder / "bad.png").write_bytes(b"no picture")
    return [photo(folder / "good.png"), folder / "bad.png"]


def postscript(folder: Path) -> list[Path]:
    Image.new("RGB", (8, 8)).save(folder / "x.eps")
    return [(folder / "x.eps").rename(folder / "x.png")]


def cut_off(folder: Path) -> list[Path]:
    path = photo(folder / "x.jpg", (300, 300))
    path.write_bytes(path.read_bytes()[:700])
    return [path]


BAD_PICTURES: dict[Callable[[Path], list[Path]], str] = {
    too_many: "11 reference pictures are too many; choose at most 10",
    no_picture: "bad.png is no picture that can be opened",
    postscript: "x.png is no picture that can be opened",
    cut_off: "x.jpg is no picture that can be opened",
    lambda folder: [folder / "none.png"]: "none.png is no picture that can be opened",
}


@pytest.mark.parametrize(("make", "message"), BAD_PICTURES.items())
def test_bad_pictures_are_told_and_nothing_is_kept(
    kept: Kept, tmp_path: Path, make: Callable[[Path], list[Path]], message: str
) -> None:
    file = lora_file(tmp_path / "fox.safetensors")
    with pytest.raises(UserError, match=message):
        kept.add(file, references=make(tmp_path))
    assert left(kept) == []
    before = kept.add(file, references=[photo(tmp_path / "y.png")])
    with pytest.raises(UserError, match=message):
        kept.edit("fox", references=make(tmp_path))
    assert left(kept) == ["fox"] and kept.library().find("fox") == before and len(before.pictures()) == 1


def test_a_picture_of_too_many_pixels_is_told(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PICTURE_PIXELS", 40 * 20 - 1)
    with pytest.raises(UserError, match="a.png has more than 799 pixels; make it smaller"):
        kept.add(lora_file(tmp_path / "fox.safetensors"), references=[photo(tmp_path / "a.png")])
    assert left(kept) == []


def test_pictures_are_replaced_by_others_or_by_themselves(kept: Kept, dog: Path, tmp_path: Path) -> None:
    first, second = kept.add(dog).references
    changed = kept.edit("dog-2", references=[second, first, photo(tmp_path / "a.png")])
    assert [p.getpixel((0, 0)) for p in changed.pictures()] == [(250, 128, 114), (0, 128, 128), (0, 128, 128)]
    assert kept.edit("dog-2", references=[]).references == ()
    assert len(kept.edit("dog-2", references=read_concept(dog).references).references) == 2
    with pytest.raises(UserError, match="dog comes with this project"):
        kept.edit("dog", references=[])
    assert left(kept) == ["dog-2"]


# What is refused


def a_token(path: Path) -> Path:
    formats.write_embedding(path, "<rex>", torch.ones(1, 4))
    return path


def a_pickle(path: Path) -> Path:
    torch.save({"x": torch.ones(1)}, path)
    return path


def not_finite(path: Path) -> Path:
    save_file(
        {f"{Q}.lora_A.weight": torch.full((2, 4), torch.nan), f"{Q}.lora_B.weight": torch.ones(6, 2)}, path
    )
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "x.safetensors cannot be used: it cannot be read .No such file"),
        (a_pickle, "PyTorch pickle"),
        (a_token, "learned tokens and no LoRA"),
        (not_finite, "NaN or infinity"),
        (lambda path: path.parent, "there is no adapter_config.json in it"),
    ],
)
def test_what_is_no_lora_is_not_kept(
    kept: Kept, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kept.add(make(tmp_path / "x.safetensors"))
    assert left(kept) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"trigger": "x" * 65}, "The trigger has 65 characters; at most 64"),
        ({"name": "x" * 65}, "The name has 65 characters"),
        ({"title": "\x00 \t"}, "The name of a concept must be a word or a few"),
        ({"weight": 0}, "weight of a concept must be a number above 0 and at most 4, not 0"),
        ({"weight": 4.5}, "at most 4, not 4.5"),
        ({"weight": float("nan")}, "at most 4, not nan"),
        ({"weight": True}, "at most 4, not True"),
        ({"base": "sdxl"}, "There is no base model 'sdxl'; choose one of"),
        ({"origin": "x" * 1001}, "The source has 1001 characters; at most 1000"),
    ],
)
def test_bad_words_are_not_kept(kept: Kept, tmp_path: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kept.add(lora_file(tmp_path / "x.safetensors"), **words)
    assert left(kept) == []


def test_half_characters_are_no_hindrance(kept: Kept, tmp_path: Path) -> None:
    added = kept.add(lora_file(tmp_path / "x.safetensors"), title="a \ud800 b", trigger="\x1b[31msks")
    assert kept.library().find(added.name) == added
    assert added.trigger == "[31msks"
    added.title.encode()


def test_broken_tokens_are_not_kept(
    kept: Kept, dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(dog, tmp_path / "mine"))
    (folder / "embeddings" / "more.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="more.safetensors cannot be used"):
        kept.add(folder)
    formats.write_embedding(folder / "embeddings" / "more.safetensors", "<more>", torch.ones(1, 16))
    monkeypatch.setattr(limits, "MAX_EMBEDDINGS", 1)
    with pytest.raises(UserError, match="dog has 2 learned tokens; at most 1 are kept"):
        kept.add(folder)
    assert left(kept) == []


# All or nothing


@pytest.mark.parametrize("broken", ["shutil.copyfile", "PIL.Image.Image.save", "pathlib.Path.rename"])
def test_a_failure_in_the_middle_leaves_nothing(
    kept: Kept, dog: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.raises(
            UserError, match="concepts .No space left on device.; make room, or choose another folder"
        ):
            kept.add(dog)
    assert left(kept) == []
    assert kept.add(dog).name == "dog-2"


def test_a_name_that_another_process_has_just_taken_is_left_to_it(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if target.name == "fox":
            target.mkdir()
            (target / "theirs").touch()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    added = kept.add(lora_file(tmp_path / "fox.safetensors"))
    assert added.name == "fox-2" and read_concept(kept.folder / "fox-2").name == "fox-2"
    assert left(kept) == ["fox", "fox-2"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, toy: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match="Nothing can be written into .*data.concepts"):
        Kept(tmp_path / "data" / "concepts").add(lora_file(tmp_path / "x.safetensors"))


# Changing


def test_words_are_changed(kept: Kept, dog: Path) -> None:
    before = kept.add(dog)
    changed = kept.edit("dog-2", title="Rex", trigger="<rex> hound", class_noun="hound", weight=1.5)
    assert (changed.title, changed.trigger, changed.class_noun, changed.weight) == (
        "Rex",
        "<rex> hound",
        "hound",
        1.5,
    )
    assert kept.edit("dog-2", description="barks").description == "barks"
    assert (changed.lora, changed.references) == (before.lora, before.references)
    assert kept.library().find("dog-2").title == "Rex" and left(kept) == ["dog-2"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dog-2", {"title": ""}, "The title of a concept must be a word or a few, not ''"),
        ("dog-2", {"title": "Rex", "weight": -1}, "at most 4, not -1"),
        ("dog-2", {"description": "x" * 1001}, "The description has 1001 characters"),
        ("dog-2", {"description": 7}, "The description of a concept must be a text, not 7"),
        (
            "dog-2",
            {"name": "rex"},
            "name cannot be changed; title, trigger, class_noun, weight, description can",
        ),
        ("../dog-2", {"title": "Rex"}, "There is no concept '../dog-2'; choose from dog-2"),
    ],
)
def test_bad_changes_change_nothing(
    kept: Kept, dog: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    before = kept.add(dog)
    with pytest.raises(UserError, match=message):
        kept.edit(name, **changes)
    assert kept.library().concepts == {"dog-2": before} and left(kept) == ["dog-2"]


@pytest.mark.parametrize("broken", ["replace", "write_bytes"])
def test_words_change_whole_or_not_at_all(
    kept: Kept, dog: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = kept.add(dog)
    monkeypatch.setattr(Path, broken, full)
    with pytest.raises(UserError, match="No space left"):
        kept.edit("dog-2", title="Rex")
    assert kept.library().find("dog-2") == before and left(kept) == ["dog-2"]


def test_pictures_change_whole_or_not_at_all(
    kept: Kept, dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept.add(dog)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        new = path.name == "references" and UNFINISHED in str(path)
        return full() if new else rename(path, target)  # type: ignore[func-returns-value, return-value]

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="No space left"):
        kept.edit("dog-2", references=[photo(tmp_path / "a.png")])
    assert kept.library().find("dog-2") == before and len(before.pictures()) == 2


def test_words_pictures_and_tokens_change_together_or_not_at_all(
    kept: Kept, dog: Path, tmp_path: Path
) -> None:
    before = kept.add(dog)
    formats.write_embedding(tmp_path / "red.safetensors", "<red>", torch.ones(1, 16))
    tokens, pictures = [tmp_path / "red.safetensors"], [photo(tmp_path / "a.png")]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    refused: list[dict[str, Any]] = [{"title": "x" * 65}, {"references": [tmp_path / "broken.png"]}]
    for more in refused:
        with pytest.raises(UserError):
            kept.edit("dog-2", **{"references": pictures, "tokens": tokens, **more})
        found = kept.library().find("dog-2")
        assert found == before and found.load().tokens.keys() == {"<rex>"} and len(found.pictures()) == 2
    after = kept.edit("dog-2", title="Rex", references=pictures, tokens=tokens)
    assert (after.title, len(after.pictures()), set(after.load().tokens)) == ("Rex", 1, {"<rex>", "<red>"})


def test_tokens_of_another_width_are_not_kept(kept: Kept, dog: Path, tmp_path: Path) -> None:
    before = kept.add(dog)
    formats.write_embedding(tmp_path / "wide.safetensors", "<wide>", torch.ones(1, 768))
    told = "The token '<wide>' is 768 wide, and Storybook takes tokens of 16; it is for another model"
    with pytest.raises(UserError, match=told):
        kept.edit("dog-2", tokens=[tmp_path / "wide.safetensors"])
    with pytest.raises(UserError, match=told):
        kept.add(dog, tokens=[tmp_path / "wide.safetensors"])
    assert kept.library().find("dog-2") == before and left(kept) == ["dog-2"]


def test_concepts_are_removed(kept: Kept, dog: Path) -> None:
    kept.add(dog)
    kept.add(dog)
    kept.remove("dog-2")
    assert left(kept) == ["dog-3"]
    for name in ("dog-2", "wolf", "", ".", "../concepts", "dog-3/references"):
        with pytest.raises(UserError, match="There is no concept"):
            kept.remove(name)
    assert left(kept) == ["dog-3"]
    for change in (kept.remove, lambda name: kept.edit(name, title="Rex")):
        with pytest.raises(UserError, match="dog comes with this project, and stays as it is"):
            change("dog")


def test_a_broken_folder_does_not_hide_the_others(kept: Kept, dog: Path) -> None:
    assert kept.library().concepts == {} and kept.broken == {}
    kept.add(dog)
    for name in ("empty", "odd", ".hidden"):
        (kept.folder / name).mkdir()
    (kept.folder / "odd" / "concept.json").write_text("[" * 100_000)
    (kept.folder / "some file").touch()
    assert list(kept.library().concepts) == ["dog-2"]
    assert list(kept.broken) == ["empty", "odd"]
    assert "concept.json cannot be read" in kept.broken["empty"]
    assert "is no description of a concept" in kept.broken["odd"]
    with pytest.raises(UserError, match="There is no concept 'odd'"):
        kept.edit("odd", title="x")
    kept.remove("odd")
    assert list(kept.broken) == ["empty"]


def test_a_folder_s_name_is_the_concept_s(kept: Kept, dog: Path) -> None:
    kept.add(dog)
    (kept.folder / "dog-2").rename(kept.folder / "rex")
    assert kept.edit("rex", title="Rex").name == "rex"
    assert kept.library().find("rex").title == "Rex"


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ITERIS_SD_DATA", raising=False)
    usual = platformdirs.user_data_path("iteris-sd", appauthor=False) / "concepts"
    assert Kept.usual() == Kept(usual)
    monkeypatch.setenv("ITERIS_SD_DATA", str(tmp_path))
    assert Kept.usual() == Kept(tmp_path / "concepts")
    monkeypatch.setenv("ITERIS_SD_DATA", "~/somewhere")
    assert Kept.usual() == Kept(Path.home() / "somewhere" / "concepts")


# Zips


def test_a_zip_brings_everything_to_another_machine(kept: Kept, dog: Path, tmp_path: Path) -> None:
    kept.add(dog, weight=0.7, origin="some/dog@main", revision="abc")
    kept.edit("dog-2", description="barks — loudly")
    kept.export_zip("dog-2", tmp_path / "new" / "dog.zip")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["dog.zip"]
    other = Kept(tmp_path / "other")
    there, here = other.import_zip(tmp_path / "new" / "dog.zip"), kept.library().find("dog-2")
    assert there.described() == here.described() and there.revision == "abc"
    one, two = there.load(), here.load()
    assert same(one.lora, two.lora) and one.sha256 == two.sha256
    assert {t: v.tolist() for t, v in one.tokens.items()} == {t: v.tolist() for t, v in two.tokens.items()}
    assert [p.tobytes() for p in there.pictures()] == [p.tobytes() for p in here.pictures()]
    assert other.import_zip(tmp_path / "new" / "dog.zip").name == "dog-2-2"
    assert left(other) == ["dog-2", "dog-2-2"]


def test_a_zip_of_peft(kept: Kept, tmp_path: Path) -> None:
    before = kept.add(peft_folder(tmp_path / "wolf", Q, TEXT_Q))
    kept.export_zip("wolf", tmp_path / "wolf.zip")
    after = kept.import_zip(tmp_path / "wolf.zip")
    assert after.name == "wolf-2" and same(after.load().lora, before.load().lora)


def test_only_a_concept_s_own_files_are_exported(kept: Kept, dog: Path, tmp_path: Path) -> None:
    kept.add(dog)
    folder = kept.folder / "dog-2"
    (folder / "notes.txt").touch()
    (folder / "references" / ".DS_Store").touch()
    (folder / "references" / "old.png").mkdir()
    kept.export_zip("dog-2", tmp_path / "dog.zip")
    with zipfile.ZipFile(tmp_path / "dog.zip") as archive:
        assert sorted(archive.namelist()) == [
            "dog-2/concept.json",
            "dog-2/embeddings/rex.safetensors",
            "dog-2/lora.safetensors",
            "dog-2/references/01.png",
            "dog-2/references/02.png",
        ]


def test_a_failing_export_leaves_the_old_file(
    kept: Kept, dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.add(dog)
    with pytest.raises(UserError, match="There is no concept '../dog'"):
        kept.export_zip("../dog", tmp_path / "x.zip")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "dog.zip"
    path.write_bytes(b"old")
    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(UserError, match="No space left"):
        kept.export_zip("dog-2", path)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@pytest.fixture
def contents(dog: Path) -> dict[str, bytes]:
    """A concept's files by name."""
    return {p.relative_to(dog).as_posix(): p.read_bytes() for p in sorted(dog.rglob("*")) if p.is_file()}


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("top", ["", "dog/", "Ein Hund (1)/"])
def test_files_may_be_at_the_top_or_in_one_folder(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], top: str
) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (9, 9)).save(jpeg, "JPEG")
    files = {**contents, "references/Foto 1.JPG": jpeg.getvalue(), "references/": b""}
    path = zipped(tmp_path / "x.zip", {f"{top}{name}": content for name, content in files.items()})
    added = kept.import_zip(path)
    assert (added.name, added.trigger, len(added.references)) == ("dog-2", "<rex> dog", 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil", "its entry '../evil' has an unsafe name"),
        ("references/../../evil.png", "has an unsafe name"),
        ("references/./a.png", "has an unsafe name"),
        ("/etc/evil", "its entry '/etc/evil' has an unsafe name"),
        ("references//a.png", "has an unsafe name"),
        ("..\\evil", "has an unsafe name"),
        ("references\\a.png", "has an unsafe name"),
        ("C:/evil", "has an unsafe name"),
        ("references/a\n.png", "has an unsafe name"),
        ("references/a.png\x00.exe", "has an unsafe name"),
        ("../", "has an unsafe name"),
        ("notes.txt", "its entry 'notes.txt' is no part of a concept; remove it from the zip"),
        ("references/deep/a.png", "is no part of a concept"),
        ("references/.a.png", "is no part of a concept"),
        ("references/a.svg", "is no part of a concept"),
        ("embeddings/a.pt", "is no part of a concept"),
        ("lora/vae/adapter_config.json", "is no part of a concept"),
        ("lora/adapter_model.bin", "is no part of a concept"),
        ("Lora.safetensors", "is no part of a concept"),
        ("x" * 300, "its entry 'x{80}' is no part"),
        ("references/A.png", "it holds a file twice"),
        ("concept.json", "it holds a file twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_do_not_belong_there_are_refused(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], name: str, message: str
) -> None:
    path = zipped(tmp_path / "x.zip", {**contents, "references/a.png": b""})
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("placeholder")
        entry.filename = name  # as it is: the constructor would mend it
        archive.writestr(entry, b"x")
    with pytest.raises(UserError, match=f"x.zip cannot be imported: .*{message}"):
        kept.import_zip(path)
    assert left(kept) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["data", "x.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], kind: int
) -> None:
    path = zipped(tmp_path / "x.zip", contents)
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("references/a.png")
        entry.external_attr = (kind | 0o777) << 16
        archive.writestr(entry, b"/etc/passwd")
    with pytest.raises(UserError, match="'references/a.png' is a link or a device"):
        kept.import_zip(path)
    assert left(kept) == []


def test_locked_and_oddly_packed_entries_are_refused(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes]
) -> None:
    path = zipped(tmp_path / "x.zip", contents, zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match="'concept.json' is locked or packed by an unusual method"):
        kept.import_zip(path)
    with pytest.raises(UserError, match="is locked or packed"):
        kept.import_zip(patched(zipped(path, contents), flags=1))
    assert left(kept) == []


def patched(path: Path, **fields: int) -> Path:
    """The zip with fields of its last entry set in the list at its end, which is what readers go by."""
    places = {"flags": (8, "<H"), "packed": (20, "<I"), "size": (24, "<I"), "offset": (42, "<I")}
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    for field, value in fields.items():
        place, form = places[field]
        struct.pack_into(form, content, start + place, value)
    path.write_bytes(content)
    return path


def test_a_bomb_is_refused_before_it_fills_the_disk(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(tmp_path / "x.zip", {**contents, "references/a.png": bytes(64 * 1024**2)})
    room = limits.MAX_ZIP_RATIO * path.stat().st_size
    assert room < 32 * 1024**2
    with pytest.raises(UserError, match=f"unpacks to more than {room:,} bytes; it is no honest zip"):
        kept.import_zip(path)
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="unpacks to more than 1,000 bytes"):
        kept.import_zip(zipped(path, contents))
    assert left(kept) == []


@pytest.mark.parametrize("lie", [{"size": 5}, {"packed": 5}, {"offset": 7}, {"offset": 2**31}])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_zip_that_lies_is_refused(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], lie: dict[str, int], method: int
) -> None:
    path = patched(zipped(tmp_path / "x.zip", contents, method), **lie)
    with pytest.raises(
        UserError, match="x.zip cannot be imported: it (is damaged, or no zip|cannot be unpacked)"
    ):
        kept.import_zip(path)
    assert left(kept) == []


@pytest.mark.parametrize("lie", [{"size": 2**31}, {"packed": 2**31}])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_what_is_unpacked_counts_and_not_what_is_declared(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], dog: Path, lie: dict[str, int], method: int
) -> None:
    added = kept.import_zip(patched(zipped(tmp_path / "x.zip", contents, method), **lie))
    assert [p.tobytes() for p in added.pictures()] == [p.tobytes() for p in read_concept(dog).pictures()]


def test_a_long_list_of_entries_is_refused(kept: Kept, tmp_path: Path, contents: dict[str, bytes]) -> None:
    many = {f"references/more{n}.png": b"" for n in range(limits.MAX_ZIP_ENTRIES)}
    path = zipped(tmp_path / "x.zip", {**contents, **many})
    with pytest.raises(UserError, match=f"it holds {len(contents) + 64} entries; at most 64 are unpacked"):
        kept.import_zip(path)
    endless = {f"{n}{'x' * 60_000}": b"" for n in range(20)}
    with pytest.raises(UserError, match="its list of entries has more than 1,048,576 bytes"):
        kept.import_zip(zipped(path, endless))
    assert left(kept) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is damaged, or no zip"),
        (b"no zip at all", "it is damaged, or no zip"),
        (b"PK\x05\x06" + bytes(18), "it holds no concept.json; choose a zip that a concept was exported to"),
    ],
)
def test_what_is_no_zip_of_a_concept_is_told(
    kept: Kept, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=f"x.zip cannot be imported: {message}"):
        kept.import_zip(tmp_path / "x.zip")
    with pytest.raises(UserError, match="none.zip cannot be imported: it is not a file"):
        kept.import_zip(tmp_path / "none.zip")
    assert left(kept) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("concept.json", b"{", "its folder/concept.json is no description of a concept"),
        ("concept.json", b"[" * 1000, "is no description of a concept"),
        ("concept.json", b" " * (limits.MAX_CONCEPT_BYTES + 1), "it has more than 262,144 bytes"),
        ("concept.json", b'{"name": "x", "title": "x"}', "it does not tell its 'trigger'"),
        ("lora.safetensors", b"no tensors", "lora.safetensors cannot be used"),
        ("lora.safetensors", None, "lora.safetensors cannot be used: it cannot be read"),
        ("embeddings/rex.safetensors", b"no tensors", "rex.safetensors cannot be used"),
        ("references/0.png", b"no picture", "0.png is no picture"),
    ],
)
def test_what_add_would_refuse_is_not_imported(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], name: str, content: bytes | None, message: str
) -> None:
    files = {key: value for key, value in {**contents, name: content}.items() if value is not None}
    with pytest.raises(UserError, match=f"x.zip cannot be imported: .*{message}") as caught:
        kept.import_zip(zipped(tmp_path / "x.zip", files, zipfile.ZIP_STORED))
    assert str(tmp_path) not in str(caught.value)
    assert left(kept) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"base": "sdxl"}, "there is no base model 'sdxl'"),
        ({"base": ["sd15"]}, "the base model of a concept must be a word"),
        ({"weight": "1"}, "the weight of a concept must be a number"),
        ({"licence": "x" * 1001}, "the licence has 1001 characters"),
    ],
)
def test_words_of_strangers_are_checked(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], words: dict[str, Any], message: str
) -> None:
    told = {**json.loads(contents["concept.json"]), **words}
    files = {**contents, "concept.json": json.dumps(told).encode()}
    with pytest.raises(UserError, match=f"x.zip cannot be imported: {message}"):
        kept.import_zip(zipped(tmp_path / "x.zip", files))
    assert left(kept) == []


def test_a_full_disk_is_told(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    path = zipped(tmp_path / "x.zip", contents)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", full)
    with pytest.raises(UserError, match="it cannot be unpacked .No space left on device"):
        kept.import_zip(path)
    assert left(kept) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_a_damaged_zip_is_refused_or_read_right(
    kept: Kept, tmp_path: Path, contents: dict[str, bytes], damage: list[tuple[float, int]]
) -> None:
    path = zipped(tmp_path / "x.zip", {name: contents[name] for name in ("concept.json", "references/0.png")})
    whole = bytearray(path.read_bytes())
    for place, value in damage:
        whole[int(place * len(whole))] = value
    path.write_bytes(whole)
    with pytest.raises(UserError, match="x.zip cannot be imported"):  # at the latest for want of a LoRA
        kept.import_zip(path)
    assert left(kept) == []
