"""DINO beside CLIP: a tiny random one, in a cache and on a Hub of this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from iteris_sd import dino, scoring
from iteris_sd.errors import UserError
from tests.fake_hub import FakeHub
from tests.test_scoring import plain, shipped, toy

CPU = torch.device("cpu")
SIDE, WIDTH = 32, 12
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = {  # what the Hub's repository says, but for the size
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": MEAN,
    "image_std": DEVIATION,
    "resample": 3,
    "size": SIDE,
}


def written(folder: Path) -> Path:
    """A tiny random DINO, as the Hub's repository has it."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=SIDE,
        patch_size=16,
    )
    model = ViTModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny DINO."""
    return written(tmp_path_factory.mktemp("dino"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the Hub, and nobody who said whether DINO takes part."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(dino.SWITCH, raising=False)
    scoring.load.cache_clear()
    yield tmp_path / "cache"
    scoring.load.cache_clear()


@pytest.fixture
def cached(cache: Path) -> Path:
    """A tiny DINO in the cache: its snapshot."""
    return written(cache / "models--facebook--dino-vits16" / "snapshots" / "0123")


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(n)]


# ---------------------------------------------------------------- embedding


def test_an_embedding_is_the_class_token_of_the_prepared_picture(tiny: Path) -> None:
    (picture,) = pictures(1)
    pixels = (np.asarray(picture) / 255 - MEAN) / DEVIATION
    model = ViTModel.from_pretrained(tiny, add_pooling_layer=False).eval()
    with torch.inference_mode():
        states = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float()).last_hidden_state
    found = dino.opened(tiny, CPU).embed([picture])
    assert found.shape == (1, WIDTH) and found.dtype == torch.float32
    torch.testing.assert_close(found, states[:, 0] / states[:, 0].norm(), rtol=1e-4, atol=1e-5)


def test_embeddings_are_normalised_and_independent_of_their_number(tiny: Path) -> None:
    encoder, shown = dino.opened(tiny, CPU), pictures(18)
    together = encoder.embed(shown)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(18))
    torch.testing.assert_close(together, torch.cat([encoder.embed([one]) for one in shown]))
    assert (together[0] - together[1]).norm() > 0.01


def test_pictures_of_any_size_and_mode_are_embedded(tiny: Path) -> None:
    shown = [Image.new("L", (5, 90), 7), Image.new("RGBA", (64, 64), "red"), Image.new("P", (32, 32))]
    assert dino.opened(tiny, CPU).embed(shown).shape == (3, WIDTH)


def test_the_tiny_one_has_the_names_that_the_hubs_weights_have(tiny: Path) -> None:
    names = set(load_file(tiny / "model.safetensors"))
    assert {
        "embeddings.cls_token",
        "encoder.layer.1.attention.attention.query.weight",
        "layernorm.bias",
    } <= names
    assert not [name for name in names if name.startswith("pooler")]


# ---------------------------------------------------------------- whether it takes part


def test_it_joins_in_where_its_weights_are(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dino.load(CPU, usual=True) is not None
    assert dino.load(CPU, usual=False) is None
    monkeypatch.setenv(dino.SWITCH, "on")
    assert dino.load(CPU, usual=False) is not None
    monkeypatch.setenv(dino.SWITCH, "off")
    assert dino.load(CPU, usual=True) is None


def test_it_is_left_out_where_they_are_not(cached: Path) -> None:
    (cached / "model.safetensors").rename(cached / "pytorch_model.bin")
    assert dino.load(CPU, usual=True) is None


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dino.SWITCH, "yes")
    with pytest.raises(UserError, match="ITERIS_SD_DINO is 'yes'; choose one of on, off"):
        dino.load(CPU, usual=False)


def test_asked_for_without_a_network_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(dino.SWITCH, "on")
    with pytest.raises(
        UserError, match=r"is on and DINO.* cannot be had: facebook/dino-vits16 .*network.* off"
    ):
        dino.load(CPU, usual=False)


@pytest.fixture
def fake(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with a tiny DINO, which somebody asks for."""
    monkeypatch.setenv(dino.SWITCH, "on")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = {name: (tiny / name).read_bytes() for name in dino.FILES}
    with FakeHub({dino.MODEL: {**files, "pytorch_model.bin": b"a pickle"}}).running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def test_asked_for_it_is_fetched_once_and_no_pickle_with_it(fake: FakeHub, cache: Path) -> None:
    first = dino.load(CPU, usual=False)
    asked = len(fake.asked)
    again = dino.load(CPU, usual=False)
    assert first is not None and again is not None and len(fake.asked) == asked > 0
    assert torch.equal(first.embed(pictures(1)), again.embed(pictures(1)))
    assert {path.name for path in cache.glob("models--*/snapshots/*/*")} == set(dino.FILES)


def test_a_repository_without_safetensors_is_told(fake: FakeHub) -> None:
    del fake.repos[dino.MODEL]["model.safetensors"]
    with pytest.raises(UserError, match="cannot be had: .* has no file model.safetensors"):
        dino.load(CPU, usual=False)


def test_broken_weights_are_told_to_those_who_asked_for_them(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cached / "model.safetensors").write_bytes(b"nonsense")
    assert dino.load(CPU, usual=True) is None
    monkeypatch.setenv(dino.SWITCH, "on")
    with pytest.raises(UserError, match=r"0123 cannot be loaded: .*; remove that folder .* off"):
        dino.load(CPU, usual=True)


def test_weights_that_are_not_all_there_are_told(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dino.SWITCH, "on")
    state = load_file(cached / "model.safetensors")
    del state["layernorm.bias"]
    save_file(state, cached / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="it has no layernorm.bias; remove that folder"):
        dino.load(CPU, usual=True)


# ---------------------------------------------------------------- in scores


def test_a_picture_is_compared_with_each_concept_by_dino_too(tiny: Path) -> None:
    encoder, alone = dino.opened(tiny, CPU), toy()
    both = scoring.Scorer(
        alone.name, alone.model, alone.preprocess, alone.tokenizer, alone.device, dino=encoder
    )
    assert both.encoders == ("toy", dino.TITLE)
    shown, own = pictures(2), {"warm": [plain("red"), plain("yellow")], "cold": [plain("blue")]}
    references = {name: both.reference(some) for name, some in own.items()}
    assert references["warm"].shape == (2, 3 + WIDTH)
    scores = both.score(shown, "rg", references)
    for picture, score in zip(shown, scores, strict=True):
        seen = encoder.embed([picture])
        cosines = {name: float((seen @ encoder.embed(some).T).mean()) for name, some in own.items()}
        assert score.dino == pytest.approx(cosines, abs=1e-5)
    by_clip = alone.score(shown, "rg", {name: alone.reference(some) for name, some in own.items()})
    assert [(s.text, s.images, s.crops) for s in scores] == [(s.text, s.images, s.crops) for s in by_clip]
    assert {*scoring.measures(scores[0])} == {*scoring.measures(by_clip[0]), "dino:warm", "dino:cold"}


@shipped
def test_beside_storybooks_own_scorer_it_takes_part_only_when_told(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = scoring.load("storybook", "cpu")
    assert usual.encoders == (usual.name,)
    monkeypatch.setenv(dino.SWITCH, "on")
    scoring.load.cache_clear()
    told = scoring.load("storybook", "cpu")
    assert told.name == usual.name and told.encoders == (usual.name, dino.TITLE)
    (score,) = told.score(pictures(1), "a dog", {"dog": told.reference(pictures(2))})
    assert score.dino.keys() == {"dog"}
