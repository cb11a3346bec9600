"""Scores: the formulas of the design's fourth section, their summary, and the scorer that ships."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iteris_sd import scoring
from iteris_sd.errors import UserError
from iteris_sd.scoring import Row, Score, Scorer
from iteris_sd.storybook import data, world

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
        lambda picture: torch.from_numpy(np.asarray(picture) / 255.0).permute(2, 0, 1).float(),
        lambda texts: torch.tensor([words[text] for text in texts]),
        torch.device("cpu"),
    )


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


@given(cosines, st.dictionaries(st.text(max_size=5), cosines, min_size=1, max_size=5))
def test_a_score_follows_from_its_cosines(text, images):
    score = Score.of(text, images)
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


# ---------------------------------------------------------------- summary


@dataclass(frozen=True)
class Made:
    """A picture as `summarise` needs it."""

    method: str
    score: Score


def test_a_summary_agrees_with_numpy():
    rng = np.random.default_rng(1)
    made = [
        Made(method, Score.of(text, {"dog": dog, "barn": barn}))
        for method in ("iteris", "linear")
        for text, dog, barn in rng.uniform(-0.2, 1, (5, 3)).tolist()
    ]
    rows = {(row.method, row.measure): row for row in scoring.summarise(made[5:] + made[:5])}
    assert list(dict.fromkeys(method for method, _ in rows)) == ["linear", "iteris"]
    measures = {
        "text": lambda s: s.text,
        "text_cosine": lambda s: s.text_cosine,
        "image:dog": lambda s: s.images["dog"],
        "image:barn": lambda s: s.images["barn"],
        "minimum": lambda s: s.minimum,
        "mean": lambda s: s.mean,
    }
    assert set(rows) == {(method, measure) for method in ("iteris", "linear") for measure in measures}
    for (method, measure), row in rows.items():
        values = np.array([measures[measure](m.score) for m in made if m.method == method])
        reach = 2.776445 * values.std(ddof=1) / np.sqrt(5)  # Student's t, four degrees of freedom
        assert row.n == 5
        assert row.mean == pytest.approx(values.mean())
        assert (row.low, row.high) == pytest.approx((values.mean() - reach, values.mean() + reach))


def test_one_picture_has_a_mean_and_no_interval():
    rows = scoring.summarise([Made("base", Score.of(0.4, {}))])
    assert rows == [Row("base", "text", 1, 1.0, None, None), Row("base", "text_cosine", 1, 0.4, None, None)]


def test_a_summary_of_nothing_is_empty():
    assert scoring.summarise([]) == []


@pytest.mark.parametrize(
    ("freedom", "printed"),
    [(1, 12.7062), (4, 2.7764), (10, 2.2281), (11, 2.2010), (15, 2.1314), (30, 2.0423), (120, 1.9799)],
)
def test_the_t_quantile_agrees_with_the_printed_table(freedom, printed):
    assert scoring.t_quantile(freedom) == pytest.approx(printed, abs=6e-5)


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
