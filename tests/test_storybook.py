"""Storybook: its world, its tokenizer, its training loop, and the size of what ships."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from iteris_sd.bases import ASSETS
from iteris_sd.storybook import data, loop, model, report, train_concepts, train_unet, train_vae, world
from iteris_sd.storybook.loop import Plan, fit
from iteris_sd.storybook.machine import Machine
from iteris_sd.storybook.run import Run
from iteris_sd.storybook.train import STAGES, stage
from tests import sheet

SEEDS = range(200)
PLAIN = Machine(torch.device("cpu"))


def test_a_scene_is_drawn_the_same_every_time():
    for seed in range(12):
        scene = world.sample(seed)
        assert scene == world.sample(seed)
        assert world.draw(scene).tobytes() == world.draw(scene).tobytes()


def test_another_seed_draws_another_picture():
    scene = world.sample(3)
    assert world.draw(scene).tobytes() != world.draw(replace(scene, seed=scene.seed + 1)).tobytes()


@pytest.mark.parametrize("change", [{"time": "night"}, {"time": "sunset"}, {"style": "watercolour"}])
def test_time_and_style_change_the_picture(change):
    scene = world.Scene("meadow", (world.Look("dog", "brown"),), None, 5)
    plain, other = (np.asarray(world.draw(s)).astype(float) for s in (scene, replace(scene, **change)))
    assert np.abs(plain - other).mean() > 8


def test_the_world_is_as_large_as_it_says():
    assert len(world.CLASSES) >= 16 and len(world.BACKGROUNDS) >= 10 and len(world.TIMES) >= 3
    counts = np.bincount([len(world.sample(seed).things) for seed in range(600)], minlength=4)
    assert counts[2] > 300 and counts[3] > 30


def test_generic_scenes_never_show_an_individual():
    for seed in SEEDS:
        for look in world.sample(seed).things:
            assert not look.individual
            assert look.colour not in world.EXCLUSIVE


def test_strange_things_are_like_no_individual_and_called_by_their_class_alone():
    from iteris_sd.storybook import train_clip

    mains = [np.array(main) for main, _ in world.EXCLUSIVE.values()]
    assert min(np.linalg.norm(main - own) for own, _ in world.STRANGE.values() for main in mains) > 80
    looks = train_clip.strange_looks(64, seed=1)
    assert {look.cls for look in looks} == set(world.CLASSES)
    assert 32 <= sum(look.mark is not None for look in looks) < 60
    for k, look in enumerate(looks):
        scene = train_clip.views(look, k)[0]
        said = world.caption(scene, np.random.default_rng(k), full=True)
        assert look.cls in said and not any(
            word in said for word in (look.colour, look.pattern) if word != "plain"
        )


def test_held_out_combinations_are_never_drawn_in_training_and_can_be_asked_for():
    assert not any(world.sample(seed).held_out for seed in range(1000))
    assert sum(world.sample(seed, unseen=True).held_out for seed in range(100)) > 50


def _named(words, caption):
    return {word for word in words if re.search(rf"\b{word}\b", caption)}


@pytest.mark.parametrize("seed", SEEDS)
def test_captions_name_what_is_drawn_and_nothing_else(seed):
    scene = world.sample(seed)
    shown = {look.cls for look in scene.things}
    colours = {look.colour for look in scene.things}
    full, *others = data.scene_captions(scene, seed)
    for caption in (full, *others):
        assert _named(world.CLASSES, caption) == shown
        assert _named(world.COLOURS, caption) <= colours
        assert {b.name for b in world.BACKGROUNDS.values() if b.phrase in caption} <= {scene.background}
        assert {t.name for t in world.TIMES.values() if t.phrase and t.phrase in caption} <= {scene.time}
        assert ("watercolour" in caption) == (scene.style == "watercolour")
        for word in ("left", "right"):
            assert word not in caption or scene.relation == f"to the {word} of"
    assert _named(world.COLOURS, full) == colours
    assert world.BACKGROUNDS[scene.background].phrase in full
    assert scene.time == "day" or world.TIMES[scene.time].phrase in full


def test_things_stand_inside_the_picture_and_on_the_side_they_are_said_to():
    for seed in range(400):
        scene = world.sample(seed)
        things = world.placed(scene)
        assert {thing.look for thing in things} == set(scene.things)
        for thing in things:
            assert 5 < thing.middle < 123 and thing.ground < 125 and thing.ground - thing.height > 0
        if scene.relation in ("to the left of", "to the right of"):
            at = {thing.look: thing.middle for thing in things}
            first, second = (at[look] for look in scene.things)
            assert (first < second) == (scene.relation == "to the left of")


@pytest.mark.parametrize("name", world.INDIVIDUALS)
def test_individuals_differ_from_every_generic_of_their_class(name):
    look = world.INDIVIDUALS[name].look
    mine = np.asarray(world.draw(world.place(name, "meadow", 7))).astype(float)
    for colour in world.CLASSES[look.cls].colours:
        other = world.Scene("meadow", (world.Look(look.cls, colour),), None, 7)
        assert np.abs(mine - np.asarray(world.draw(other))).mean() > 1.5


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("unknown class", lambda: world.Look("dragon", "red")),
        ("bears no badge", lambda: world.Look("dog", "brown", mark="badge")),
        ("unknown time", lambda: world.Scene("beach", (world.Look("dog", "brown"),), time="noon")),
        ("unknown style", lambda: world.Scene("beach", (world.Look("dog", "brown"),), style="oil")),
        ("one to 3 things", lambda: world.Scene("beach", ())),
        (
            "cannot take its part",
            lambda: world.Scene("beach", (world.Look("barn", "red"), world.Look("dog", "brown")), "wearing"),
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(what, wrong):
    with pytest.raises(ValueError, match=what):
        wrong()


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


def test_the_same_captions_always_give_the_same_tokenizer(tmp_path):
    captions = [c for seed in range(50) for c in data.scene_captions(world.sample(seed), seed)]
    for folder, texts in (("one", captions), ("other", captions[::-1])):
        model.train_tokenizer(texts, tmp_path / folder)
    vocabularies = [(tmp_path / folder / "vocab.json").read_text() for folder in ("one", "other")]
    assert vocabularies[0] == vocabularies[1]


def _toy_loss(module: nn.Module, rng: torch.Generator) -> torch.Tensor:
    x = torch.randn(8, 3, generator=rng)
    return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    plan = Plan("toy", steps=12, batch=8, peak=0.05, warmup=3, save_every=5, sample_every=100)
    whole = fit(plan, fresh(), _toy_loss, tmp_path / "whole", PLAIN)

    def stop_at_eight(module: nn.Module, rng: torch.Generator) -> torch.Tensor:
        if rng.initial_seed() == plan.generator(8).initial_seed():
            raise KeyboardInterrupt
        return _toy_loss(module, rng)

    with pytest.raises(KeyboardInterrupt):
        fit(plan, fresh(), stop_at_eight, tmp_path / "halves", PLAIN)
    resumed = fit(plan, fresh(), _toy_loss, tmp_path / "halves", PLAIN)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    log = (tmp_path / "halves" / "toy.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in log[1:]] == list(range(12))


class Stopped(Exception):
    """Thrown into a stage as Ctrl-C would be."""


@pytest.fixture
def tiny(monkeypatch):
    """Storybook's parts in tiny width, so that every stage takes a few steps in seconds."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from iteris_sd.storybook import train_clip, train_oracle

    def autoencoder():
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=model.LATENT_CHANNELS,
            norm_num_groups=1,
            sample_size=128,
            mid_block_add_attention=False,
        )

    def unet():
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=model.LATENT_CHANNELS,
            out_channels=model.LATENT_CHANNELS,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )

    for made in (autoencoder, unet):
        monkeypatch.setattr(model, made.__name__, made)
    for name, value in {"TEXT_WIDTH": 16, "TEXT_LAYERS": 1, "TEXT_HEADS": 2}.items():
        monkeypatch.setattr(model, name, value)
    for name, value in {"LOOKS": 32, "STRANGE_LOOKS": 16, "STRANGERS": 32, "PAIRS": 2, "QUERIES": 64}.items():
        monkeypatch.setattr(train_clip, name, value)
    vision = {"layers": [1, 1, 1, 1], "width": 4, "head_width": 8, "image_size": 96}
    monkeypatch.setattr(train_clip, "VISION", vision)
    monkeypatch.setattr(train_oracle, "JUDGED", 8)
    monkeypatch.setattr(train_oracle, "KIN", 16)
    monkeypatch.setattr(train_unet, "SHEET", train_unet.SHEET[:1])


def _stopping_at(monkeypatch, step):
    """Have every loss stop the run when this step begins."""
    plan = loop.Plan.generator

    def generator(self, number):
        if number == step:
            raise Stopped
        return plan(self, number)

    monkeypatch.setattr(loop.Plan, "generator", generator)


@pytest.mark.parametrize("name", ["vae", "unet", "clip", "oracle"])
def test_a_resumed_stage_equals_an_uninterrupted_one(name, tiny, tmp_path, monkeypatch):
    def run(folder):
        return Run(tmp_path / folder, tmp_path / folder / "assets", 24, PLAIN, steps=4, save_every=2)

    def weights(folder):
        files = (tmp_path / folder).rglob("*.safetensors")
        found = {p.relative_to(tmp_path / folder).as_posix(): p.read_bytes() for p in files}
        assert found
        return found

    for folder in ("whole", "halves"):
        if name in ("unet", "clip"):
            (tmp_path / folder / "assets" / "storybook").mkdir(parents=True)
            torch.manual_seed(0)
            model.autoencoder().save_pretrained(tmp_path / folder / "assets" / "storybook" / "vae")
        if name == "unet":
            stage("clip")(replace(run(folder), steps=1))
    stage(name)(run("whole"))
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        _stopping_at(patched, 3)
        stage(name)(run("halves"))
    stage(name)(run("halves"))
    assert weights("halves") == weights("whole")
    assert (tmp_path / "halves" / name / f"{name}.png").exists()
    log = (tmp_path / "halves" / name / f"{name}.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in log[1:]] == [0, 1, 2, 3]


def test_the_report_measures_every_figure_with_its_n_and_interval(tiny, tmp_path, monkeypatch):
    run = Run(tmp_path / "runs", tmp_path / "assets", 24, PLAIN, steps=1)
    few = dict(list(train_concepts.SUBJECTS.items())[:2])
    for room in (train_concepts, report):
        monkeypatch.setattr(room, "SUBJECTS", few)
    monkeypatch.setattr(train_concepts, "SETTINGS", replace(train_concepts.SETTINGS, inversion_steps=1))
    for name in STAGES:
        stage(name)(run)
    figures = report.measure(run, tmp_path / "out", count=10)
    names = "\n".join(figure.name for figure in figures)
    for wanted in (
        "PSNR",
        "one object",
        "two objects",
        "binding",
        "left/right",
        "retrieval",
        "AUC",
        "loaded",
    ):
        assert wanted in names
    for wanted in ("identity", "nearest", "composable", "leak"):
        assert wanted in names
    assert all(figure.n > 0 for figure in figures)
    intervals = [(f.low, f.value, f.high) for f in figures if f.low is not None and f.high is not None]
    assert intervals and all(low <= value <= high for low, value, high in intervals)
    written = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert all(figure.name in written for figure in figures)
    assert (tmp_path / "out" / "two_objects.csv").read_text().count("\n") == 11
    assert (tmp_path / "out" / "binding.png").exists()


def test_a_share_has_wilsons_interval():
    figure = report.share("heads", [True] * 80 + [False] * 20, 75)
    assert (figure.value, figure.met) == (80, True)
    assert (figure.low, figure.high) == pytest.approx((71.11, 86.66), abs=0.01)


def test_the_text_encoder_begins_as_the_scorers_text_tower(tiny, tmp_path):
    from open_clip.model import CLIP

    from iteris_sd.storybook import train_clip

    tokenizer = model.train_tokenizer(["a dog next to a barn", "a small cat"], tmp_path)
    clip = CLIP(**train_clip.configuration(len(tokenizer))["model_cfg"]).eval()
    mine = model.with_text_tower(model.text_encoder(tokenizer), clip.state_dict()).eval()
    ids = tokenizer(
        ["a dog", "a small barn next to a cat"], padding="max_length", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        ends = mine(ids).last_hidden_state[range(2), (ids == tokenizer.eos_token_id).int().argmax(dim=1)]
        torch.testing.assert_close(ends @ clip.text_projection, clip.encode_text(ids))


def test_the_unet_stage_asks_for_the_scorer_first(tiny, tmp_path):
    model.autoencoder().save_pretrained(tmp_path / "assets" / "storybook" / "vae")
    with pytest.raises(FileNotFoundError, match="run `--stage clip` first"):
        stage("unet")(Run(tmp_path / "runs", tmp_path / "assets", 24, PLAIN, steps=1))


def test_a_part_may_learn_more_slowly(tmp_path):
    parts = nn.ModuleDict({"fast": nn.Linear(3, 1), "slow": nn.Linear(3, 1)})

    def loss(module: nn.ModuleDict, rng: torch.Generator) -> torch.Tensor:
        x = torch.randn(8, 3, generator=rng)
        return (module["fast"](x) + module["slow"](x) - 1).square().mean()

    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    plan = Plan("toy", steps=1, batch=8, peak=0.01, warmup=1, cooldown=0.0, decay=0.0, slower={"slow": 0.1})
    fit(plan, parts, loss, tmp_path, PLAIN)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in parts.named_parameters()}
    assert moved["slow.weight"] == pytest.approx(0.1 * moved["fast.weight"], rel=1e-2)


def test_a_warm_start_goes_on_from_the_shipped_weights(tiny, tmp_path):
    first = Run(tmp_path / "runs", tmp_path / "assets", 24, PLAIN, steps=2)
    stage("vae")(first)
    before = (tmp_path / "assets" / "storybook" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    no_steps = Run(tmp_path / "again", tmp_path / "assets", 24, PLAIN, steps=0, warm=True)
    average = train_vae.started(no_steps)
    from safetensors.torch import load

    for name, value in load(before).items():
        assert torch.equal(average.state_dict()[name], value.float())


def test_what_ships_fits_a_space():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert files, "assets/ is empty"
    assert max(path.stat().st_size for path in files) < 10 * 1024**2
    assert sum(path.stat().st_size for path in files) <= 40 * 1024**2


shipped = pytest.mark.skipif(
    not (ASSETS / "storybook" / "unet").is_dir(), reason="assets/storybook is not there"
)


@shipped
def test_the_shipped_model_loads_through_plain_diffusers_and_draws_its_stored_sheet():
    drawn, stored = sheet.draw(), Image.open(sheet.STORED).convert("RGB")
    apart = np.abs(np.asarray(drawn).astype(float) - np.asarray(stored))
    assert apart.mean() < 4.0
    assert np.asarray(drawn).std() > 30


@shipped
def test_the_shipped_autoencoder_reconstructs_scenes_it_never_saw():
    from diffusers import AutoencoderKL

    from iteris_sd.storybook.pictures import to_tensor
    from iteris_sd.storybook.train_vae import reconstruct

    vae = AutoencoderKL.from_pretrained(ASSETS / "storybook" / "vae", torch_dtype=torch.float32)
    seeds = range(data.HELD_OUT + 1000, data.HELD_OUT + 1016)
    pixels = to_tensor(np.stack([np.asarray(world.draw(world.sample(s))) for s in seeds]))
    assert reconstruct(vae, pixels)[1] > 27.0
