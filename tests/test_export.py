"""What a person takes away: complete, true to the composition, and good in plain diffusers."""

import csv
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iteris_sd import (
    __version__,
    bases,
    calibration,
    columns,
    composer,
    export,
    formats,
    intervals,
    restoring,
    scoring,
)
from iteris_sd.cli import printing
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, MergeDone, Picture
from iteris_sd.recipe import Recipe
from iteris_sd.ui import takeaway
from tests import toybook

METHODS = ("base", "linear", "regmean", "iteris")
TOKENS = {"<rex>", "<lucky>"}


def composed(asked: Recipe, library: Library) -> Composition:
    return calibration.finish(composer.compose(asked, library))


@pytest.fixture(scope="module")
def composition(toy_assets: Path) -> Composition:
    """Two concepts, four methods, two seeds on the toy base model."""
    with pytest.MonkeyPatch.context() as patch:
        toybook.install(toy_assets, patch)
        return composed(recipe(), Library.shipped())


def recipe(**changes: object) -> Recipe:
    asked = {
        "concepts": [{"name": "dog"}, {"name": "barn", "weight": 0.8}],
        "prompt": "a {0} next to a {1}",
        "negative": "rain",
        "methods": [{"name": name} for name in METHODS],
        "seeds": [0, 7],
        "steps": 3,
        "calibration": {"samples": 6, "steps": 3},
    }
    return Recipe.of({**asked, **changes})


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=int)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


EVERYTHING = {
    "grid.png",
    "recipe.json",
    "scores.csv",
    "scores.json",
    *(f"{method}_seed{seed}.png" for method in METHODS for seed in (0, 7)),
    *(f"merged/{method}.safetensors" for method in METHODS[1:]),
    *(f"merged/{method}.embeddings/{t}.safetensors" for method in METHODS[1:] for t in ("rex", "lucky")),
}


def test_everything_is_written_and_nothing_else(composition: Composition, tmp_path: Path) -> None:
    export.write(composition, tmp_path / "some" / "where")
    assert files(tmp_path) == {f"some/where/{name}" for name in EVERYTHING}
    assert Recipe.read(tmp_path / "some" / "where" / "recipe.json") == composition.recipe


def test_an_existing_folder_keeps_what_is_not_ours(composition: Composition, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.safetensors").write_text("mine")
    export.write(composition, tmp_path)
    assert files(tmp_path) == EVERYTHING | {"notes.txt", "merged/mine.safetensors"}
    assert Image.open(tmp_path / "grid.png").format == "PNG"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_an_earlier_composition_wrote_does_not_stay_beside_it(
    composition: Composition, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export.write(composition, out)
    (out / "mine_seed0.png").write_bytes(b"a picture of mine")
    (out / "merged" / "mine.safetensors").write_bytes(b"a LoRA of mine")
    fewer = composition.recipe.model_copy(update={"methods": composition.recipe.methods[1:2], "seeds": (7,)})
    method = fewer.methods[0].name
    kept = tuple(p for p in composition.pictures if p.method == method and p.seed == 7)
    merged = {method: composition.merged[method]}
    less = replace(composition, recipe=fewer, pictures=kept, merged=merged, retained=())
    export.write(less, out)
    export.write(less, tmp_path / "alone")
    tokens = {
        file for file in EVERYTHING if ".embeddings/" in file
    }  # they belong to no LoRA now, and do no harm
    mine = {"mine_seed0.png", "merged/mine.safetensors"}
    assert files(out) == files(tmp_path / "alone") | mine | tokens


def test_nothing_is_left_when_writing_fails(
    composition: Composition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "grid.png").write_text("old")
    monkeypatch.setattr(formats, "write_embedding", full)
    for folder in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            export.write(composition, folder)
    monkeypatch.setattr(formats, "write_embedding", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export.write(composition, tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "grid.png"]
    assert (tmp_path / "old" / "grid.png").read_text() == "old"


def test_places_that_cannot_be_written_to(composition: Composition, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file is a file; choose a folder"):
            export.write(composition, folder)
    (tmp_path / "out" / "scores.json").mkdir(parents=True)
    with pytest.raises(UserError, match="scores.json is a folder where a file should be written"):
        export.write(composition, tmp_path / "out")
    assert files(tmp_path) == {"file"}
    merged = composition.merged["linear"].lora
    for name in ("lora.bin", "lora"):
        with pytest.raises(UserError, match="give it a name that ends in .safetensors"):
            export.write_lora(merged, {}, tmp_path / name, {})


FORMS = [
    export.Form("diffusers", "fp16"),
    export.Form("kohya"),
    export.Form("kohya", "fp32", bundle=True),
    export.Form("peft", "bf16"),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_lora_is_written_in_every_form(composition: Composition, tmp_path: Path, form: export.Form) -> None:
    lora, tokens = composition.merged["linear"].lora, {"<rex>": torch.ones(1, 4)}
    path = tmp_path / ("merged" if form.layout == "peft" else "merged.safetensors")
    written = export.write_lora(lora, tokens, path, {}, form)
    assert all(file.is_file() for file in written)
    found = formats.read(path)
    assert set(found.lora) == set(lora)
    loose = 1e-2 if form.precision in ("fp16", "bf16") else 1e-6
    for name in lora:
        torch.testing.assert_close(found.lora[name].delta(), lora[name].delta(), rtol=loose, atol=loose)
    assert set(found.tokens) == ({"<rex>"} if form.bundle else set())
    assert (tmp_path / "merged.embeddings" / "rex.safetensors").exists() != form.bundle


def test_forms_that_are_none() -> None:
    for wrong, message in (
        ({"layout": "a1111"}, "no layout 'a1111'; choose one of diffusers, kohya, peft"),
        ({"precision": "int8"}, "no precision 'int8'"),
        ({"bundle": True}, "kohya's layout only"),
    ):
        with pytest.raises(UserError, match=message):
            export.Form(**wrong)
    assert export.LAYOUTS == formats.LAYOUTS


def test_tokens_of_any_name_get_files_of_their_own(composition: Composition, tmp_path: Path) -> None:
    tokens = {token: torch.ones(1, 4) for token in ("<rex>", "rex", "../../etc/x y", "<>", "<Rex>")}
    written = export.write_lora(composition.merged["linear"].lora, tokens, tmp_path / "a+b.safetensors", {})
    assert written[0] == tmp_path / "a+b.safetensors"
    assert {path.parent for path in written[1:]} == {tmp_path / "a+b.embeddings"}
    assert {token for path in written[1:] for token in formats.read_embeddings(path)} == set(tokens)


def test_the_zip_of_a_lora_has_a_name_that_every_system_takes(
    composition: Composition, tmp_path: Path
) -> None:
    uses = [use.model_copy(update={"name": use.name * 20}) for use in composition.recipe.concepts]
    asked = composition.recipe.model_copy(update={"concepts": uses})
    bag = takeaway.Bag(asked, Library.shipped(), tmp_path)
    bag.take(MergeDone("linear", composition.merged["linear"], composition.concepts, 0.0))
    bag.take(composition)
    packed = bag.lora("linear")
    assert len(packed.name) < 70
    with zipfile.ZipFile(packed) as archive:
        assert max(map(len, archive.namelist())) < 70


def test_a_picture_tells_how_it_was_made(composition: Composition) -> None:
    picture = composition.picture("iteris", 7)
    assert picture is not None
    opened = Image.open(io.BytesIO(export.picture_png(picture, composition.recipe)))
    assert np.array_equal(pixels(opened), pixels(picture.image))
    assert opened.info["parameters"] == (
        "a <rex> dog next to a <lucky> barn\nNegative prompt: rain\n"
        "Steps: 3, Sampler: ddim, CFG scale: 4, Seed: 7, Size: 16x16, Model: storybook, Method: iteris, "
        f"Concepts: dog (1) + barn (0.8), Version: iteris-sd {__version__}"
    )
    told = json.loads(opened.info["iteris_sd"])
    assert Recipe.of(told["recipe"]) == composition.recipe
    assert (told["method"], told["seed"]) == ("iteris", 7)
    assert told["scores"]["images"].keys() == {"dog", "barn"}


def test_where_a_base_model_lies_is_nobody_else_s_matter(
    composition: Composition, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is handed on says its file's name alone; the recipe in one's own folder can be repeated."""
    place = tmp_path / "home" / "secret" / "mine"
    monkeypatch.setitem(bases.BASES, str(place), replace(bases.find("storybook"), name=str(place)))
    asked = Recipe.of({**composition.recipe.model_dump(), "base": str(place)})
    made = replace(composition, recipe=asked)
    png = export.picture_png(made.pictures[0], asked)
    entries = Image.open(io.BytesIO(png)).info
    metadata = export.lora_metadata(asked, made.concepts, made.merged["linear"])
    told = json.dumps([entries, metadata, export.scores(made)])
    assert "secret" not in told and "Model: mine" in entries["parameters"] and metadata["base"] == "mine"
    export.write(made, tmp_path / "out")
    assert Recipe.read(tmp_path / "out" / "recipe.json").base == str(place)
    (tmp_path / "drawn.png").write_bytes(png)
    with pytest.raises(UserError, match="There is no base model 'mine'; choose one of storybook"):
        restoring.from_picture(tmp_path / "drawn.png")
    monkeypatch.setitem(bases.BASES, "mine", replace(bases.find("storybook"), name="mine"))
    assert restoring.from_picture(tmp_path / "drawn.png").base == "mine"  # a page that offers it has it so


def test_scores(composition: Composition) -> None:
    found = json.loads(json.dumps(export.scores(composition)))
    assert found["scorer"] == "toy scorer"
    assert [p["file"] for p in found["pictures"]] == [f"{m}_seed{s}.png" for s in (0, 7) for m in METHODS]
    rows = {(row["method"], row["measure"]): row for row in found["summary"]}
    own = [p["scores"]["images"]["dog"] for p in found["pictures"] if p["method"] == "iteris"]
    row = rows["iteris", "image:dog"]
    assert row["n"] == 2 and row["mean"] == pytest.approx(sum(own) / 2)
    assert row["low"] <= row["mean"] <= row["high"]


def test_scores_tell_how_methods_differ_from_the_linear_average(composition: Composition) -> None:
    found = json.loads(json.dumps(export.scores(composition)))
    assert found["encoders"] == ["toy scorer"]
    assert {row["method"] for row in found["paired"]} == set(METHODS) - {"linear"}
    assert {row["to"] for row in found["paired"]} == {"linear"} and {row["n"] for row in found["paired"]} == {
        2
    }
    text = {(p["method"], p["seed"]): p["scores"]["text"] for p in found["pictures"]}
    expected = sum(text["iteris", seed] - text["linear", seed] for seed in (0, 7)) / 2
    (row,) = (r for r in found["paired"] if (r["method"], r["measure"]) == ("iteris", "text"))
    assert row["mean"] == pytest.approx(expected)
    without = tuple(p for p in composition.pictures if p.method != "linear")
    assert export.scores(replace(composition, pictures=without))["paired"] == []


def table(composition: Composition) -> list[dict[str, str]]:
    text = export.scores_csv(composition)
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_the_table_has_a_line_for_every_picture(composition: Composition, tmp_path: Path) -> None:
    rows = table(composition)
    measures = ["text", "text_cosine", "image:dog", "image:barn", "minimum", "mean"]
    assert list(rows[0]) == ["method", "seed", "prompt", "flagged", *measures]
    for row, picture in zip(rows, composition.pictures, strict=True):
        assert (row["method"], row["seed"], row["prompt"]) == (
            picture.method,
            str(picture.seed),
            picture.prompt,
        )
        assert row["flagged"] == "false"
        assert {name: float(row[name]) for name in measures} == scoring.measures(picture.score)
    export.write(composition, tmp_path)
    assert (tmp_path / "scores.csv").read_text(encoding="utf-8") == export.scores_csv(composition)


def test_the_table_keeps_its_columns_and_leaves_empty_what_was_not_scored(composition: Composition) -> None:
    blanked = replace(composition.pictures[0], score=scoring.UNSCORED, flagged=True)
    each = {"dog": 0.1, "barn": 0.2}
    seen = replace(composition.pictures[1], score=scoring.Score.of(0.5, each, each, each))
    first, second = table(replace(composition, pictures=(blanked, seen)))
    more = ["crop:dog", "crop:barn", "crop_minimum", "dino:dog", "dino:barn"]
    assert list(first)[4:] == ["text", "text_cosine", "image:dog", "image:barn", "minimum", "mean", *more]
    assert first["flagged"] == "true" and not any(list(first.values())[4:])
    assert [float(second[name]) for name in more] == [0.1, 0.2, 0.1, 0.1, 0.2]
    assert table(replace(composition, pictures=())) == []


@given(st.sampled_from(["", "=", "+", "-", "@", "\t", "\r", '"', "\n"]), st.text(max_size=20))
def test_no_cell_is_a_formula(start: str, rest: str) -> None:
    said = export._inert(start + rest)
    assert not said.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert said.removeprefix("'") == (start + rest).removeprefix("'")


def test_prompts_reach_the_table_as_texts(composition: Composition) -> None:
    prompts = ['=HYPERLINK("http://a")', "-2, +3", 'a "dog",\na barn', "+1", "@x", "a = b"]
    pictures = tuple(replace(composition.pictures[0], prompt=prompt) for prompt in prompts)
    shown = [row["prompt"] for row in table(replace(composition, pictures=pictures))]
    assert shown == [f"'{p}" if p[0] in "=+-@" else p for p in prompts]


def test_the_terminal_shows_means_and_differences(
    composition: Composition, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(pictures: tuple[Picture, ...]) -> str:
        printing.scores(replace(composition, pictures=pictures))
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "200")
    means, differences = printed(composition.pictures).split("by toy scorer.")
    (row,) = (
        r
        for r in intervals.paired(composition.pictures, "linear")
        if (r.method, r.measure) == ("iteris", "image:dog")
    )
    assert row.high is not None and f"{row.mean:+.3f} ±{row.high - row.mean:.3f}" in differences
    assert "Base model" in differences and "Differences to" in differences
    assert means.count("Linear") == 1 and "crop" not in means
    assert "Differences" not in printed(tuple(p for p in composition.pictures if p.method != "linear"))
    unscored = tuple(replace(p, score=scoring.UNSCORED) for p in composition.pictures)
    assert printed(unscored) == "No picture was scored; the scorer was toy scorer.\n"


def test_base_column_and_scorer_get_plain_words(composition: Composition) -> None:
    assert {p.prompt for p in composition.pictures if p.method == "base"} == {"a dog next to a barn"}
    assert {p.prompt for p in composition.pictures if p.method != "base"} == {
        "a <rex> dog next to a <lucky> barn"
    }


def test_the_grid_has_a_place_for_every_picture(composition: Composition) -> None:
    whole = export.grid(composition)
    assert whole.width > len(METHODS) * 256 and whole.height > 2 * 256
    partial = replace(composition, pictures=composition.pictures[:3])
    assert export.grid(partial).width == whole.width
    long = recipe(prompt="a {0} next to a {1}, " + "very " * 150 + "x" * 200)
    assert export.grid(replace(composition, recipe=long)).width == whole.width
    enlarged = pixels(composition.pictures[0].image.resize((256, 256), Image.Resampling.LANCZOS))
    windows = np.lib.stride_tricks.sliding_window_view(pixels(whole), (256, 256, 3))[::1, ::1, 0]
    corners = np.argwhere((windows[:, :, 0, 0] == enlarged[0, 0]).all(axis=-1))
    assert any(np.array_equal(windows[y, x], enlarged) for y, x in corners)


def test_methods_draw_different_pictures(composition: Composition) -> None:
    drawn = [pixels(p.image) for p in composition.pictures if p.seed == 0]
    assert all(np.abs(a - b).max() > 2 for k, a in enumerate(drawn) for b in drawn[:k])


def test_a_picture_does_not_depend_on_the_company(composition: Composition, toy: Path) -> None:
    alone = composed(recipe(methods=[{"name": "iteris"}], seeds=[7]), Library.shipped()).pictures[0]
    together = composition.picture("iteris", 7)
    assert together and np.array_equal(pixels(alone.image), pixels(together.image))


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_pair_draws_the_same_in_plain_diffusers(
    composition: Composition, toy: Path, tmp_path: Path, method: str
) -> None:
    ours = composition.picture(method, 7)
    assert ours is not None
    assert np.abs(pixels(drawn_plainly(composition, method, tmp_path)) - pixels(ours.image)).max() <= 2


def test_the_shipped_pair_draws_the_same_in_plain_diffusers(tmp_path: Path) -> None:
    library = Library.shipped()
    if not {"dog", "barn"} <= set(library.concepts):
        pytest.skip(f"no dog and barn in {bases.ASSETS / 'concepts'}")
    made = composed(recipe(methods=[{"name": "iteris"}], seeds=[7]), library)
    assert "toy" not in made.scorer
    assert np.asarray(made.pictures[0].image).std() > 5
    assert np.abs(pixels(drawn_plainly(made, "iteris", tmp_path)) - pixels(made.pictures[0].image)).max() <= 2


def drawn_plainly(made: Composition, method: str, folder: Path) -> Image.Image:
    """Seed 7 by plain diffusers, from the files of the merged pair."""
    merged = made.merged[method]
    path, *embeddings = export.write_lora(merged.lora, made.tokens, folder / f"{method}.safetensors", {})
    pipeline = StableDiffusionPipeline.from_pretrained(
        bases.find("storybook").source, dtype=torch.float32, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    for embedding in embeddings:
        pipeline.load_textual_inversion(embedding)
    side = bases.find("storybook").size
    return pipeline(
        columns.prompt_with_triggers(made.recipe, made.concepts),
        negative_prompt="rain",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        height=side,
        width=side,
    ).images[0]


def test_a_merged_file_says_where_it_comes_from(composition: Composition, tmp_path: Path) -> None:
    merged = composition.merged["iteris"]
    metadata = export.lora_metadata(composition.recipe, composition.concepts, merged)
    export.write_lora(merged.lora, {}, tmp_path / "x.safetensors", metadata)
    told = formats.read(tmp_path / "x.safetensors").metadata
    assert (told["method"], told["base"]) == ("iteris", "storybook")
    assert json.loads(told["parameters"])["alpha"] == 1e-4
    assert [(s["name"], s["weight"]) for s in json.loads(told["sources"])] == [("dog", 1.0), ("barn", 0.8)]
    assert {len(s["sha256"]) for s in json.loads(told["sources"])} == {64}
    assert told["modelspec.architecture"] == "storybook/lora"
    assert "<rex>" in told["modelspec.trigger_phrase"]
    assert set(composition.tokens) == TOKENS
