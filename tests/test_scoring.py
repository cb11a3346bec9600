"""Scores: the formulas of the design's fourth section, and the scorer that ships."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iteris_sd import dino, scoring
from iteris_sd.errors import UserError
from iteris_sd.scoring import Score, Scorer
from iteris_sd.storybook import data, world
from tests.test_intervals import Made

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "scorer"
shipped = pytest.mark.skipif(
    not (FOLDER / "open_clip_model.safetensors").exists(),
    reason="assets/scorer is not there: run `python -m iteris_sd.storybook.train --stage clip`",
)
cosines = st.floats(-1, 1)


class Palette(torch.nn.Module):
    """A stand-in for CLIP whose embeddings are easy to say: of a picture its mean colour, of a text its letters."""

    def encode_image(self, pixels, normalize):
        return torch.nn.functional.normalize(pixels.mean(dim=(2, 3)), dim=-1)

    def encode_text(self, tokens, normalize):
        return torch.nn.functional.normalize(tokens, dim=-1)


def toy() -> Scorer:
    """A scorer on `Palette`, in which the texts r, g and b are the pure colours and "-r" is against red."""
    words = {
        "r": (1.0, 0.0, 0.0),
        "g": (0.0, 1.0, 0.0),
        "b": (0.0, 0.0, 1.0),
        "rg": (1.0, 1.0, 0.0),
        "-r": (-1.0, 0.0, 0.0),
    }
    return Scorer(
        "toy",
        Palette(),
        lambda picture: torch.from_numpy(np.asarray(picture) / 255.0).float().mean(dim=(0, 1))[:, None, None],
        lambda texts: torch.tensor([words[text] for text in texts]),
        torch.device("cpu"),
    )


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def patched(ground: str, colour: str, box: tuple[int, int, int, int]) -> Image.Image:
    """A picture of 8×8 pixels in one colour with a rectangle of another."""
    picture = plain(ground)
    picture.paste(colour, box)
    return picture


by_concept = st.dictionaries(st.text(max_size=5), cosines, max_size=5)


@given(cosines, by_concept.filter(bool), by_concept, by_concept)
def test_a_score_follows_from_its_cosines(text, images, crops, dino):
    score = Score.of(text, images, crops, dino)
    assert (score.crops, score.dino) == (crops, dino)
    assert score.text == (2.5 * text if text > 0 else 0.0)
    assert score.text_cosine == text
    assert score.images == images
    assert score.minimum == min(images.values())
    assert score.mean == pytest.approx(np.mean(list(images.values())))


def test_without_concepts_there_is_no_image_alignment():
    assert Score.of(0.2, {}) == Score(0.5, 0.2, {}, None, None)


def test_each_picture_is_scored_against_the_prompt_and_each_concept():
    scorer = toy()
    references = {
        "warm": scorer.reference([plain("red"), plain("yellow")]),
        "cold": scorer.reference([plain("blue")]),
    }
    red, blue = scorer.score([plain("red"), plain("blue")], "rg", references)
    half = np.sqrt(0.5)
    assert red.text_cosine == pytest.approx(half)
    assert red.text == pytest.approx(2.5 * half)
    assert red.images == pytest.approx(
        {"warm": (1 + half) / 2, "cold": 0.0}
    )  # the mean of cosines, not of pictures
    assert red.minimum == pytest.approx(0.0)
    assert red.mean == pytest.approx((1 + half) / 4)
    assert blue.text == pytest.approx(0.0)
    assert blue.images == pytest.approx({"warm": 0.0, "cold": 1.0})


@pytest.mark.parametrize("prompt", ["r", "rg"])
def test_no_pictures_have_no_scores(prompt):
    scorer = toy()
    assert scorer.score([], prompt, {"red": scorer.reference([plain("red")])}) == []


# ---------------------------------------------------------------- windows


def test_a_blend_of_two_concepts_and_both_of_them_are_told_apart():
    scorer = toy()
    references = {name: scorer.reference([plain(name)]) for name in ("red", "blue")}
    pictures = [patched("red", "blue", (4, 0, 8, 8)), plain("#ff00ff"), plain("red")]
    both, blend, one = scorer.score(pictures, "r", references)
    half = np.sqrt(0.5)
    assert both.images == pytest.approx({"red": half, "blue": half}) == blend.images
    assert both.crops == pytest.approx({"red": 1.0, "blue": 1.0})
    assert blend.crops == pytest.approx({"red": half, "blue": half})
    assert one.crops == pytest.approx({"red": 1.0, "blue": 0.0})
    least = [scoring.measures(score)["crop_minimum"] for score in (both, blend, one)]
    assert least == pytest.approx([1.0, half, 0.0])


def test_a_small_concept_counts_by_the_window_that_shows_it_best():
    scorer = toy()
    red = {"red": scorer.reference([plain("red")])}
    quarter, off = patched("lime", "red", (4, 4, 8, 8)), patched("lime", "red", (1, 0, 5, 4))
    (fits, between) = scorer.score([quarter, off], "r", red)
    assert fits.images["red"] == pytest.approx(0.25 / np.hypot(0.25, 0.75))
    assert fits.crops["red"] == pytest.approx(1.0)
    assert between.crops["red"] == pytest.approx(0.75 / np.hypot(0.75, 0.25))  # three of four columns


def test_without_references_there_are_no_crops():
    (score,) = toy().score([plain("red")], "r", {})
    assert score.text_cosine is not None and score == Score.of(score.text_cosine, {})
    assert "crop_minimum" not in scoring.measures(score)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_a_window_is_never_worse_than_the_whole(seed, width, height):
    rng = np.random.default_rng(seed)
    scorer = toy()
    picture = Image.fromarray(rng.integers(1, 256, (height, width, 3), dtype=np.uint8))
    (score,) = scorer.score([picture], "r", {"red": scorer.reference([plain("red"), plain("yellow")])})
    assert score.images["red"] <= score.crops["red"] <= 1 + 1e-6


def test_the_large_clip_looks_at_fewer_windows_on_a_cpu(monkeypatch):
    monkeypatch.setenv(dino.SWITCH, "off")
    monkeypatch.setattr(scoring, "_open", lambda source, device: (Palette(), None, None))
    counts = {
        (name, device): scoring.load.__wrapped__(name, device).windows
        for name in scoring.SCORERS
        for device in ("cpu", "cuda")
    }
    assert counts.pop(("vit-l-14", "cpu")) == 5 and set(counts.values()) == {14}
    few = replace(toy(), windows=5)
    picture, red = patched("lime", "red", (4, 4, 8, 8)), {"red": few.reference([plain("red")])}
    (score,) = few.score([picture], "r", red)  # red fills four ninths of the best of them
    assert score.crops["red"] == pytest.approx(4 / np.hypot(4, 5))


@given(st.integers(1, 90), st.integers(1, 90))
def test_windows_are_the_whole_four_large_and_nine_small_ones(width, height):
    whole, *others = scoring.windows(Image.new("RGB", (width, height)))
    assert whole.size == (width, height) and len(others) == 13
    for parts, some in ((0.75, others[:4]), (0.5, others[4:])):
        for window in some:
            for have, side in zip(window.size, (width, height), strict=True):
                assert parts * side <= have < parts * side + 2 and have <= side


@given(st.floats(0, 2), st.floats(0, 2))
def test_half_a_side_anywhere_is_seen_to_three_quarters(left, top):
    def overlap(start: float, low: int) -> float:
        return min(start, low) + 2 - max(start, low)

    small = [box for box in scoring.WINDOWS if box[2] - box[0] == 2]
    assert max(min(overlap(left, x), overlap(top, y)) for x, y, _, _ in small) >= 0.75 * 2


def test_a_picture_against_its_prompt_scores_zero_and_keeps_its_cosine():
    (score,) = toy().score([plain("red")], "-r", {})
    assert (score.text, score.text_cosine) == (0.0, pytest.approx(-1.0))


def test_embeddings_are_normalised_and_independent_of_their_number():
    scorer = toy()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(1, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(37)]
    together = scorer.embed_images(pictures)
    assert together.shape == (37, 3)
    assert torch.allclose(together.norm(dim=1), torch.ones(37))
    assert torch.equal(together, torch.cat([scorer.embed_images([p]) for p in pictures]))


def test_references_must_not_be_empty():
    with pytest.raises(UserError, match="at least one"):
        toy().reference([])


def test_an_unknown_scorer_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'blip'.*storybook.*vit-l-14"):
        scoring.load("blip")


def test_a_scorer_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    source = scoring.Source("Nobody's CLIP", f"local-dir:{tmp_path / 'none'}", None, "Put it there.")
    monkeypatch.setattr(scoring, "SCORERS", {"nobody": source})
    with pytest.raises(UserError, match=r"Nobody's CLIP could not be loaded: .*none.*\. Put it there."):
        scoring.load("nobody")


def test_what_did_not_take_part_is_not_among_the_encoders():
    one = {"dog": 0.5}
    unscored, clip, both = (
        Made("linear", score) for score in (scoring.UNSCORED, Score.of(0, one), Score.of(0, one, one, one))
    )
    assert scoring.encoders("CLIP", [unscored]) == []
    assert scoring.encoders("CLIP", [unscored, clip]) == ["CLIP"]
    assert scoring.encoders("CLIP", [clip, both]) == ["CLIP", dino.TITLE]
    assert scoring.NoScorer("nobody").encoders == () and toy().encoders == ("toy",)


# ---------------------------------------------------------------- the scorer that ships


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return scoring.load("storybook", "cpu")


@shipped
def test_plain_open_clip_loads_the_weights_and_finds_captions():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{FOLDER}")
    first, count = data.HELD_OUT + 5000, 32
    scenes = [world.sample(seed) for seed in range(first, first + count)]
    pictures = [world.draw(scene) for scene in scenes]
    captions = [data.scene_captions(scene, k)[0] for k, scene in enumerate(scenes)]
    with torch.inference_mode():
        seen = model.eval().encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        said = model.encode_text(tokenizer(captions), normalize=True)
    hits = (said @ seen.T).argmax(dim=1) == torch.arange(count)
    assert float(hits.float().mean()) >= 0.9  # by chance 0.03


@shipped
def test_the_scorer_is_named_deterministic_and_prefers_the_truth(scorer):
    assert "Storybook" in scorer.name
    picture = world.draw(world.Scene("snow", (world.Look("dog", "brown"),), None, 3))
    (score,), (again,) = (scorer.score([picture], "a brown dog in the snow", {}) for _ in range(2))
    (wrong,) = scorer.score([picture], "a red barn on the beach", {})
    assert score == again
    assert score.text_cosine > wrong.text_cosine + 0.1


@shipped
def test_an_individual_is_nearer_its_own_references_than_another_of_its_class(scorer):
    places = ("beach", "meadow", "snow")
    own = scorer.reference([world.draw(world.place("dog", place, k)) for k, place in enumerate(places)])
    common = world.Look("dog", "brown")
    others = scorer.reference([world.draw(world.Scene(p, (common,), None, k)) for k, p in enumerate(places)])
    picture = world.draw(world.place("dog", "mountains", 9))
    (score,) = scorer.score([picture], "a dog in the mountains", {"own": own, "other": others})
    assert score.images["own"] > score.images["other"] + 0.1


@shipped
def test_two_individuals_side_by_side_are_both_found_in_windows(scorer):
    places = ("beach", "meadow", "snow")
    references = {
        name: scorer.reference([world.draw(world.place(name, place, k)) for k, place in enumerate(places)])
        for name in ("dog", "barn")
    }
    dog, barn = (world.draw(world.place(name, "mountains", 9)) for name in ("dog", "barn"))
    together = Image.new("RGB", (2 * dog.width, 2 * dog.height), "white")
    together.paste(dog, (0, 0))
    together.paste(barn, (dog.width, dog.height))
    with_both, with_one = scorer.score([together, dog], "a dog", references)
    assert scoring.measures(with_both)["crop_minimum"] > with_both.minimum + 0.1
    assert scoring.measures(with_both)["crop_minimum"] > scoring.measures(with_one)["crop_minimum"] + 0.1


@shipped
def test_the_scorer_ships_small():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) <= 5_000_000


@shipped
def test_loading_leaves_no_handler_on_the_root_logger_and_prints_nothing(capfd):
    import logging

    before = list(logging.getLogger().handlers)
    scoring.load("storybook", "cpu")
    assert logging.getLogger().handlers == before
    assert capfd.readouterr() == ("", "")
