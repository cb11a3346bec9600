"""The files of a composition: whole or not there, with the scorer that there was, and no more in memory than needed."""

from __future__ import annotations

import errno
import gc
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from iteris_sd import calibration, limits, scoring
from iteris_sd.concepts import Concept, Library, Loaded
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, MergeDone, Picture
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.recipe import Recipe
from iteris_sd.ui import outcome, takeaway
from iteris_sd.ui.takeaway import Bag
from iteris_sd.ui.visits import Result

METHODS = ("linear", "task_arithmetic")
DOG = Concept("dog", "Rex", "<rex> dog", "dog", Path("dog.safetensors"))
LIBRARY = Library({"dog": DOG})
TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LORA = LoRA({TO_K: LowRank(torch.ones(2, 768), torch.ones(320, 2))})
SIZE = (24, 40)  # which no other picture has that is made here
SCORED = scoring.Score(0.8, 0.32, {}, None, None)


def recipe(base: str = "storybook") -> Recipe:
    return Recipe.of(
        {
            "base": base,
            "concepts": [{"name": "dog"}],
            "prompt": "a {0}",
            "methods": [{"name": name} for name in METHODS],
            "seeds": [0, 1],
        }
    )


def pictures(score: scoring.Score) -> list[Picture]:
    return [
        Picture(name, seed, Image.new("RGB", SIZE), "a dog", score) for name in METHODS for seed in (0, 1)
    ]


def filled(folder: Path, whole: bool = True, score: scoring.Score = SCORED, base: str = "storybook") -> Bag:
    """A bag with two merges and four pictures, or with one picture where the composition was stopped."""
    asked, loaded = recipe(base), Loaded(DOG, LORA)
    bag = Bag(asked, LIBRARY, folder)
    merged = {name: calibration.Merged(LORA, name, {}, (), 0) for name in METHODS}
    for name in METHODS:
        bag.take(MergeDone(name, merged[name], (loaded,), 0.0))
    drawn = pictures(score)
    for picture in drawn if whole else drawn[:1]:
        bag.take(picture)
    if whole:
        bag.take(Composition(asked, (loaded,), merged, tuple(drawn), "S"))
    return bag


def full(*given: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def in_memory() -> int:
    """How many pictures are held in memory."""
    gc.collect()
    return sum(type(one) is Image.Image and one.size == SIZE for one in gc.get_objects())


@pytest.mark.parametrize(("whole", "count"), [(True, 4), (False, 1)])
def test_pictures_are_in_files_only_once_they_are_packed(tmp_path: Path, whole: bool, count: int) -> None:
    bag = filled(tmp_path, whole)
    assert in_memory() == count
    files, scores = bag.pack()
    assert in_memory() == 0
    assert scores is not None and len(scores["pictures"]) == count and bag.is_whole is whole
    with zipfile.ZipFile(files["pictures"]) as archive:
        assert sum(name.endswith(".png") for name in archive.namelist()) == count
    assert all(one.path.is_file() for one in bag.drawn) and files["grid"].is_file()
    made_of = Result(recipe(), bag.drawn, scores, bag)
    assert (outcome.pair(made_of, *METHODS, "0") is not None) is whole
    with zipfile.ZipFile(bag.lora("linear")) as archive:
        assert archive.namelist() == ["dog-linear.safetensors"]


@pytest.mark.parametrize(
    ("base", "score", "told"),
    [
        ("sd15", scoring.UNSCORED, "nobody"),
        ("sd15", SCORED, scoring.SCORERS["vit-l-14"].title),
        ("storybook", scoring.UNSCORED, "nobody"),
    ],
)
def test_a_scorer_is_named_only_where_there_was_one(
    tmp_path: Path, base: str, score: scoring.Score, told: str
) -> None:
    files, scores = filled(tmp_path, False, score, base).pack()
    assert scores is not None and scores["scorer"] == told
    assert json.loads(files["scores"].read_text(encoding="utf-8"))["scorer"] == told


def test_a_zip_that_the_disk_had_no_room_for_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag, before = filled(tmp_path), sorted(tmp_path.rglob("*"))
    write = zipfile.ZipFile.write

    def half(archive: zipfile.ZipFile, *given: Any) -> None:
        write(archive, *given)
        full()

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "write", half)
        with pytest.raises(
            UserError, match=r"linear-diffusers.zip cannot be written \(No space .* try again"
        ):
            bag.lora("linear")
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(UserError, match="pictures.zip cannot be written"):
            bag.pack()
        assert not list(tmp_path.glob("pictures.zip*"))
    with zipfile.ZipFile(bag.lora("linear")) as archive:
        assert archive.testzip() is None and archive.namelist()
    assert zipfile.is_zipfile(bag.pack()[0]["pictures"])


def test_where_nothing_can_be_made_at_all_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bag = filled(tmp_path)
    monkeypatch.setattr(takeaway.tempfile, "mkdtemp", full)
    with pytest.raises(UserError, match="The LoRA merged by linear cannot be written"):
        bag.lora("linear")


def test_zips_of_loras_have_names_of_their_own_and_the_oldest_of_too_many_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PACKED_LORAS", 2)
    bag = filled(tmp_path)
    first, second = bag.lora("linear"), bag.lora("linear", "kohya")
    assert bag.lora("linear") == first and first.is_file()
    assert (
        first.parent != second.parent != tmp_path
    )  # who knows where a picture lies does not know where this does
    third = bag.lora("task_arithmetic")
    assert not first.parent.exists() and second.is_file() and third.is_file()
    assert bag.lora("linear").is_file() and not second.exists()
