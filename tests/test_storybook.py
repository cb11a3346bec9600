"""Storybook: its world, its tokenizer, its training loop, and the size of what ships."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from iteris_sd.bases import ASSETS
from iteris_sd.storybook import data, model, world
from iteris_sd.storybook.loop import Plan, fit

SEEDS = range(200)


def test_a_scene_is_drawn_the_same_every_time():
    for seed in range(12):
        scene = world.sample(seed)
        assert scene == world.sample(seed)
        assert world.draw(scene).tobytes() == world.draw(scene).tobytes()


def test_another_seed_draws_another_picture():
    scene = world.sample(3)
    assert world.draw(scene).tobytes() != world.draw(replace(scene, seed=scene.seed + 1)).tobytes()


def test_generic_scenes_never_show_an_individual():
    for seed in SEEDS:
        for look in world.sample(seed).things:
            assert not look.individual
            assert look.colour not in world.EXCLUSIVE


@pytest.mark.parametrize("seed", SEEDS)
def test_captions_name_what_is_drawn_and_nothing_else(seed):
    scene = world.sample(seed)
    shown = {look.cls for look in scene.things}
    colours = {look.colour for look in scene.things}
    every_colour = {c for spec in world.CLASSES.values() for c in spec.colours}
    for caption in data.scene_captions(scene, seed):
        assert {cls for cls in world.CLASSES if cls in caption} == shown
        assert {c for c in every_colour if c in caption.split()} <= colours
        phrases = {b.name for b in world.BACKGROUNDS.values() if b.phrase in caption}
        assert phrases <= {scene.background}


@pytest.mark.parametrize("name", world.INDIVIDUALS)
def test_individuals_differ_from_every_generic_of_their_class(name):
    look = world.INDIVIDUALS[name].look
    mine = np.asarray(world.draw(world.place(name, "meadow", 7))).astype(float)
    for colour in world.CLASSES[look.cls].colours:
        other = world.Scene("meadow", (world.Look(look.cls, colour),), None, 7)
        assert np.abs(mine - np.asarray(world.draw(other))).mean() > 1.5


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="unknown class"):
        world.Look("dragon", "red")
    with pytest.raises(ValueError, match="cannot take its part"):
        world.Scene("beach", (world.Look("barn", "red"), world.Look("dog", "brown")), "wearing")


def test_drawn_scenes_are_kept_and_found_again(tmp_path):
    first = data.drawn(tmp_path, 3, first=5, workers=1)
    assert np.array_equal(first.pixels[1], np.asarray(world.draw(world.sample(6))))
    assert np.array_equal(data.drawn(tmp_path, 3, first=5).pixels, first.pixels)
    assert len(first.captions()) == 3


def test_any_text_tokenises_and_the_format_loads_plainly(tmp_path):
    from transformers import CLIPTokenizer

    captions = [c for seed in range(300) for c in data.scene_captions(world.sample(seed), seed)]
    made = model.train_tokenizer(captions, tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("a dog next to a barn", "Zebra façade 東京 🧩", ""):
        ids = loaded(text).input_ids
        assert ids == made(text).input_ids
        assert ids[0] == loaded.bos_token_id and ids[-1] == loaded.eos_token_id
        assert loaded.eos_token_id not in ids[:-1]
    assert len(loaded("dog").input_ids) == 3  # a word of the world is one token


def _toy_loss(module: nn.Module, rng: torch.Generator) -> torch.Tensor:
    x = torch.randn(8, 3, generator=rng)
    return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    plan = Plan("toy", steps=12, batch=8, peak=0.05, warmup=3, save_every=5, sample_every=100)
    whole = fit(plan, fresh(), _toy_loss, tmp_path / "whole")

    def stop_at_eight(module: nn.Module, rng: torch.Generator) -> torch.Tensor:
        if rng.initial_seed() == plan.generator(8).initial_seed():
            raise KeyboardInterrupt
        return _toy_loss(module, rng)

    with pytest.raises(KeyboardInterrupt):
        fit(plan, fresh(), stop_at_eight, tmp_path / "halves")
    resumed = fit(plan, fresh(), _toy_loss, tmp_path / "halves")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    log = (tmp_path / "halves" / "toy.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in log[1:]] == list(range(12))


def test_what_ships_fits_a_space():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert files, "assets/ is empty"
    assert max(path.stat().st_size for path in files) < 10 * 1024**2
    assert sum(path.stat().st_size for path in files) <= 40 * 1024**2


shipped = pytest.mark.skipif(
    not (ASSETS / "storybook" / "unet").is_dir(), reason="assets/storybook is not there"
)


@shipped
def test_the_shipped_model_loads_through_plain_diffusers_and_draws(tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "storybook", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a dog next to a barn", num_inference_steps=4, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert picture.size == (128, 128)
    assert np.asarray(picture).std() > 20


@shipped
def test_the_shipped_autoencoder_reconstructs_scenes_it_never_saw():
    from diffusers import AutoencoderKL

    from iteris_sd.storybook.pictures import to_tensor
    from iteris_sd.storybook.train_vae import reconstruct

    vae = AutoencoderKL.from_pretrained(ASSETS / "storybook" / "vae", torch_dtype=torch.float32)
    seeds = range(data.HELD_OUT + 1000, data.HELD_OUT + 1016)
    pixels = to_tensor(np.stack([np.asarray(world.draw(world.sample(s))) for s in seeds]))
    assert reconstruct(vae, pixels)[1] > 24.0
