"""Stage `clip`: the scorer, a small CLIP in open_clip's format, learnt from drawn scenes and their captions.

Two losses share one image tower.  A picture finds its caption among others of its batch, and the other way
round; a quarter of these show a particular thing, whose caption names its class only: a scorer that had seen only
generic things beside captions took no individual for its class, and the more a picture had of one, the less it
fitted its prompt.  And a picture of a thing finds another picture of the same thing among things of its class, on
another background or in company: so that marks and colours no caption names count as well.

Half of the pictures are shown as the autoencoder gives them back, since every generated picture comes out of it. A
scorer that had seen only drawn ones told individuals apart in those far better than in the same ones rebuilt.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_model, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from iteris_sd.storybook import autoencoding, data, model, world
from iteris_sd.storybook.loop import Plan, fit
from iteris_sd.storybook.pictures import disturbed, to_tensor
from iteris_sd.storybook.run import Run

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from open_clip.model import CLIP

CONTEXT = model.TEXT_LENGTH
WIDTH = 128  # of the embedding that both towers share
SIDE = 96  # pictures are looked at in this size: marks still show, at under two thirds of the time of 128
VISION: Mapping[str, Any] = {"layers": [1, 2, 2, 1], "width": 16, "head_width": 64, "image_size": SIDE}

LOOKS = 992  # particular things in ordinary colours, for both losses
STRANGE_LOOKS = 320  # and in colours that no generic scene shows, as the eight individuals'
VIEWS = 10  # pictures of each, one in each place: half of them alone, half in company
LOOKS_SEED = 20_000_000
OTHERS_SEED = 30_000_000  # things never trained on
INDIVIDUALS_SEED = 40_000_000  # scenes with the eight individuals, never trained on
STRANGERS = 192  # how many of them
REBUILT = 12_000  # captioned scenes that are also shown as the autoencoder gives them back
PAIRS = 64
IN_COMPANY = 0.75  # of the second pictures of pairs: there a mark is hardest to tell
LIKENESS = 2.0  # weight of the second loss
PARTICULAR = 4  # one in so many captioned pictures shows a particular thing
SHARPNESS = 40.0  # inverse temperature of the second loss
MAX_LOG_SCALE = float(np.log(100.0))

QUERIES = 512  # held-out scenes that the retrieval figure is measured on
CHOICES = 64  # pictures a caption chooses from
EVALUATED = data.HELD_OUT + 1000


# ---------------------------------------------------------------- particular things


def particular_looks(count: int, seed: int) -> list[world.Look]:
    """`count` different looks, class after class in turn, often with a mark and always in ordinary colours.

    The world's eight individuals are never among them: their colours are exclusive.
    """
    rng = np.random.default_rng(seed)
    decks = [rng.permutation(np.array(_all_looks(c), object)) for c in world.CLASSES.values()]
    rounds = zip(*decks, strict=False)
    looks = [look for row in rounds for look in row][:count]
    if len(looks) < count:
        raise ValueError(f"the world has no {count} different looks, only {len(looks)}")
    return looks


def strange_looks(count: int, seed: int) -> list[world.Look]:
    """`count` looks in colours that no caption names, class after class in turn, two in three with a mark."""
    rng, classes = np.random.default_rng(seed), list(world.CLASSES.values())
    colours = list(world.STRANGE)
    looks = []
    for k in range(count):
        spec = classes[k % len(classes)]
        mark = str(rng.choice(_marks(spec))) if rng.random() < 2 / 3 else None
        looks.append(
            world.Look(spec.name, str(rng.choice(colours)), str(rng.choice(spec.patterns)), mark=mark)
        )
    return looks


def _marks(spec: world.ClassSpec) -> list[str]:
    """The marks that things of a class bear."""
    return [i.look.mark for i in world.INDIVIDUALS.values() if i.cls == spec.name and i.look.mark] or [
        "badge"
    ]


def _all_looks(spec: world.ClassSpec) -> list[world.Look]:
    """Every look of a class that can be told from the others; a second colour shows only in a mark."""
    colours = tuple(spec.colours)
    return [world.Look(spec.name, colour, pattern) for colour in colours for pattern in spec.patterns] + [
        world.Look(spec.name, colour, pattern, mark=mark, accent=accent)
        for colour, accent in permutations(colours, 2)
        for pattern in spec.patterns
        for mark in _marks(spec)
    ]


def views(look: world.Look, seed: int) -> list[world.Scene]:
    """`VIEWS` scenes with one thing on different backgrounds, the second half of them beside another thing."""
    rng = np.random.default_rng((seed, 2))
    places = rng.permutation(list(world.BACKGROUNDS))[:VIEWS].tolist()
    scenes = []
    for k, background in enumerate(places):
        shown = replace(look, size=str(rng.choice(list(world.SIZES))))
        own = int(rng.integers(2**31))
        any_scene = world.sample(rng, count=1)
        other = any_scene.things[0]
        if 2 * k < VIEWS or other.cls == look.cls:
            scenes.append(world.Scene(background, (shown,), None, own, any_scene.time))
        else:
            relation = str(rng.choice(["next to", "to the left of", "to the right of", "in front of"]))
            scenes.append(world.Scene(background, (shown, other), relation, own))
    return scenes


def _draw_views(look: world.Look, seed: int) -> np.ndarray:
    return np.stack([np.asarray(world.draw(scene)) for scene in views(look, seed)])


def drawn_views(directory: Path, looks: Sequence[world.Look], first: int, workers: int = 2) -> np.ndarray:
    """Pictures of the looks, (looks, VIEWS, 128, 128, 3) uint8, drawn once and kept in `directory`."""
    path = directory / f"views_{first}_{len(looks)}x{VIEWS}.npy"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(workers) as pool:
            drawn = list(pool.map(_draw_views, looks, range(first, first + len(looks)), chunksize=16))
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.stack(drawn))
        partial.rename(path)
    pixels: np.ndarray = np.load(path, mmap_mode="r")
    return pixels


# ---------------------------------------------------------------- losses


def looked_at(pixels: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, SIDE, SIDE) in [-1, 1], as open_clip's own preprocessing does it."""
    return F.interpolate(to_tensor(pixels), size=SIDE, mode="bicubic", antialias=True)


def contrast(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of paired rows, each (n, d) and normalised (arXiv 2103.00020, figure 3)."""
    logits, own = scale * a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@dataclass(frozen=True, eq=False)
class Lessons:
    """Pictures as drawn, and as the autoencoder gives them back: captioned scenes (the first few of them rebuilt), and
    `VIEWS` of each thing, (things, VIEWS, 128, 128, 3) uint8, with the `wordings` of each view's caption."""

    scenes: data.Scenes
    scenes_rebuilt: data.Scenes
    things: np.ndarray
    things_rebuilt: np.ndarray
    wordings: Sequence[Sequence[str]]

    @staticmethod
    def drawn(run: Run, vae: AutoencoderKL) -> Lessons:
        """Draw and rebuild them, or open them."""
        folder = run.runs / "scenes"
        scenes = data.drawn(folder, run.scenes)
        looks = particular_looks(LOOKS, LOOKS_SEED) + strange_looks(STRANGE_LOOKS, LOOKS_SEED)
        things = drawn_views(folder, looks, LOOKS_SEED)
        shown = [scene for k, look in enumerate(looks) for scene in views(look, LOOKS_SEED + k)]
        few = autoencoding.rebuilt(run.runs, "scenes", vae, scenes.pixels[:REBUILT], run.machine)
        return Lessons(
            scenes,
            data.Scenes(few, scenes.first),
            things,
            rebuilt_views(run, vae, f"views_{LOOKS_SEED}", things),
            [data.scene_captions(scene, scene.seed) for scene in shown],
        )

    def captioned(self, count: int, rng: torch.Generator) -> tuple[list[int], np.ndarray]:
        """`count` random scenes, half of them rebuilt: their indices and pixels."""
        rows, drawn = self.scenes.pick(count - count // 2, rng)
        others, rebuilt = self.scenes_rebuilt.pick(count // 2, rng)
        return rows + others, np.concatenate([drawn, rebuilt])

    def seen(self, things: np.ndarray, views: np.ndarray, rng: torch.Generator) -> np.ndarray:
        """Those views of those things, about half of them rebuilt, (n, 128, 128, 3)."""
        pixels = self.things[things, views]
        back = (torch.rand(len(pixels), generator=rng) < 0.5).numpy()
        pixels[back] = self.things_rebuilt[things[back], views[back]]
        return pixels


def rebuilt_views(run: Run, vae: AutoencoderKL, name: str, things: np.ndarray) -> np.ndarray:
    """Views of things, (things, VIEWS, 128, 128, 3), as the autoencoder gives them back."""
    flat = things.reshape(-1, *things.shape[2:])
    return autoencoding.rebuilt(run.runs, name, vae, flat, run.machine).reshape(things.shape)


def contrastive_loss(
    lessons: Lessons, ids: Tensor, thing_ids: Tensor, batch: int, device: torch.device
) -> Callable[[CLIP, torch.Generator], Tensor]:
    """The loss of `fit`: `batch` captioned pictures, and `PAIRS` pairs of pictures of things of one class.

    `ids`: captions of scenes, (scenes, wordings, CONTEXT); `thing_ids`: of views, (things * VIEWS, wordings, CONTEXT).
    """
    classes, things = len(world.CLASSES), len(lessons.things)
    particular = batch // PARTICULAR

    def captioned(rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (batch, 3, h, w) and tokens (batch, CONTEXT): scenes, then views of particular things."""
        rows, drawn = lessons.captioned(batch - particular, rng)
        places = torch.randint(things * VIEWS, (particular,), generator=rng)
        shown = lessons.seen((places // VIEWS).numpy(), (places % VIEWS).numpy(), rng)
        said = torch.cat([_any_wording(ids[rows], rng), _any_wording(thing_ids[places], rng)])
        return looked_at(np.concatenate([drawn, shown])), said.long()

    def pairs(rng: torch.Generator) -> Tensor:
        """(2 PAIRS, 3, h, w): each thing alone, then each in another view."""
        cls = int(torch.randint(classes, (), generator=rng))
        rows = cls + classes * torch.randperm(things // classes, generator=rng)[:PAIRS].numpy()
        alone = torch.randint(VIEWS // 2, (PAIRS,), generator=rng).numpy()
        other = (alone + torch.randint(1, VIEWS // 2, (PAIRS,), generator=rng).numpy()) % (VIEWS // 2)
        met = torch.randint(VIEWS // 2, VIEWS, (PAIRS,), generator=rng).numpy()
        other = np.where((torch.rand(PAIRS, generator=rng) < IN_COMPANY).numpy(), met, other)
        both = np.concatenate([rows, rows]), np.concatenate([alone, other])
        pixels = looked_at(lessons.seen(*both, rng))
        # One order of the colour channels for all, so that it tells nobody apart.
        return pixels[:, torch.randperm(3, generator=rng)]

    def loss(module: CLIP, rng: torch.Generator) -> Tensor:
        shown, tokens = captioned(rng)
        pixels = disturbed(torch.cat([shown, pairs(rng)]), rng)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        seen = module.encode_image(pixels, normalize=True).float()
        pictures, one, two = seen.split([batch, PAIRS, PAIRS])
        said = module.encode_text(tokens.to(device), normalize=True).float()
        scale = module.logit_scale.clamp(max=MAX_LOG_SCALE).exp()
        return contrast(pictures, said, scale) + LIKENESS * contrast(one, two, SHARPNESS)

    return loss


def _any_wording(ids: Tensor, rng: torch.Generator) -> Tensor:
    """One wording of each caption, (n, CONTEXT), of (n, wordings, CONTEXT)."""
    return ids[torch.arange(len(ids)), torch.randint(ids.shape[1], (len(ids),), generator=rng)]


# ---------------------------------------------------------------- figures


@torch.no_grad()
def embedded(module: CLIP, pixels: np.ndarray) -> Tensor:
    """Normalised embeddings (n, d) of (n, 128, 128, 3) uint8."""
    device = module.logit_scale.device
    seen = [module.encode_image(p.to(device), normalize=True) for p in looked_at(pixels).split(32)]
    return torch.cat(seen).float().cpu()


@torch.no_grad()
def retrieval(
    module: CLIP, tokenizer: CLIPTokenizer, pictures: Tensor, captions: Sequence[str]
) -> list[bool]:
    """Of each caption, whether its own picture is the nearest in its group of `CHOICES`; pictures (n, d)."""
    device = module.logit_scale.device
    ids = tokenised(tokenizer, captions).long().to(device).split(64)
    said = torch.cat([module.encode_text(part, normalize=True) for part in ids]).float().cpu()
    groups = zip(pictures.split(CHOICES), said.split(CHOICES), strict=True)
    hits = [(s @ p.T).argmax(dim=1) == torch.arange(len(s)) for p, s in groups]
    found: list[bool] = torch.cat(hits).tolist()
    return found


def told_apart(things: Tensor, seen: Tensor, classes: int) -> list[float]:
    """Of each class, the chance that two views of one thing are nearer than views of two.

    This is the area under the ROC curve. Each pair is one of `things` and one of `seen`, both (things, views, d): the
    same views, or the same rebuilt; a view is never paired with itself. Thing k is of class k modulo `classes`.
    """
    areas = []
    for cls in range(classes):
        rows, others_rows = things[cls::classes], seen[cls::classes]
        who = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
        near, same = rows.flatten(0, 1) @ others_rows.flatten(0, 1).T, who[:, None] == who
        mine, others = near[same & ~torch.eye(len(who), dtype=torch.bool)], near[~same]
        areas.append(float((mine[:, None] > others).float().mean()))
    return areas


def tokenised(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Captions as (n, CONTEXT) int16."""
    ids = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="np"
    )
    return torch.from_numpy(ids.input_ids.astype(np.int16))


# ---------------------------------------------------------------- the stage


def configuration(vocabulary: int) -> dict[str, Any]:
    """What `open_clip_config.json` holds.  Any non-empty tokenizer name makes open_clip look in the same folder."""
    return {
        "model_cfg": {
            "embed_dim": WIDTH,
            "vision_cfg": dict(VISION),
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "storybook",
                "width": model.TEXT_WIDTH,
                "heads": model.TEXT_HEADS,
                "layers": model.TEXT_LAYERS,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "size": SIDE,
        },
    }


def write(module: CLIP, vocabulary: int, folder: Path) -> None:
    """Write configuration and fp16 weights; the tokenizer must already lie in `folder`."""
    text = json.dumps(configuration(vocabulary), indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in module.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def _tokenizer(run: Run, captions: Sequence[Sequence[str]]) -> CLIPTokenizer:
    """Storybook's own tokenizer, learnt now if there is none yet, and copied to the scorer."""
    model.kept_tokenizer(run.storybook / "tokenizer", captions)
    shutil.copytree(run.storybook / "tokenizer", run.assets / "scorer", dirs_exist_ok=True)
    return CLIPTokenizer.from_pretrained(run.assets / "scorer")


def _module(run: Run, vocabulary: int) -> CLIP:
    """A new scorer, or the one in `assets`."""
    from open_clip.model import CLIP

    module = CLIP(**configuration(vocabulary)["model_cfg"])
    if run.warm:
        load_model(module, run.assets / "scorer" / "open_clip_model.safetensors")
        module.float()
    return module.to(run.machine.device, memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Unseen:
    """What the scorer is measured on: scenes with two captions each, scenes with the eight individuals and a caption
    that names their class, and `VIEWS` pictures of things, never learnt; these also as the autoencoder gives them
    back."""

    pixels: np.ndarray
    full: Sequence[str]
    usual: Sequence[str]
    individuals: np.ndarray
    named: Sequence[str]
    things: np.ndarray
    rebuilt: np.ndarray

    @staticmethod
    def drawn(run: Run, vae: AutoencoderKL) -> Unseen:
        """Draw them, or open them."""
        directory = run.runs / "scenes"
        scenes = data.drawn(directory, QUERIES, EVALUATED)
        captions = scenes.captions()
        # Of one seed the same looks come first: those after them are not trained on.
        strangers = particular_looks(LOOKS + STRANGERS, LOOKS_SEED)[LOOKS:]
        things = drawn_views(directory, strangers, OTHERS_SEED)
        rebuilt = rebuilt_views(run, vae, f"views_{OTHERS_SEED}", things)
        met = [in_company(k) for k in range(QUERIES)]
        return Unseen(
            scenes.pixels[:],
            [c[0] for c in captions],
            [c[1] for c in captions],
            np.stack([np.asarray(world.draw(scene)) for scene in met]),
            [data.scene_captions(scene, scene.seed)[0] for scene in met],
            things,
            rebuilt,
        )

    def measured(self, module: CLIP, tokenizer: CLIPTokenizer) -> Measured:
        """What the scorer makes of it."""
        pictures, individuals = embedded(module, self.pixels), embedded(module, self.individuals)
        things, rebuilt = (
            embedded(module, views.reshape(-1, *views.shape[2:])).unflatten(0, views.shape[:2])
            for views in (self.things, self.rebuilt)
        )
        alone, classes = slice(VIEWS // 2), len(world.CLASSES)
        return Measured(
            retrieval(module, tokenizer, pictures, self.full),
            retrieval(module, tokenizer, pictures, self.usual),
            retrieval(module, tokenizer, individuals, self.named),
            told_apart(things[:, alone], things[:, alone], classes),
            told_apart(things[:, alone], rebuilt[:, alone], classes),
            told_apart(things, things, classes),
        )


def in_company(k: int) -> world.Scene:
    """Held-out scene k of one of the eight individuals, in turn, beside a generic thing."""
    rng = np.random.default_rng((INDIVIDUALS_SEED, k))
    name = list(world.INDIVIDUALS)[k % len(world.INDIVIDUALS)]
    background = str(rng.choice(list(world.BACKGROUNDS)))
    cls = str(rng.choice([c for c in world.CLASSES if c != world.INDIVIDUALS[name].cls]))
    other = world.sample_look(cls, background, rng, sized=False)
    return world.place(name, background, int(rng.integers(2**31)), [other], "next to")


@dataclass(frozen=True)
class Measured:
    """Whether each caption found its picture, by full and by usual captions, and of the scenes with individuals; and
    the AUC of each class.

    `areas` are of pictures of one thing, `rebuilt` those of a drawn picture and one that came through the autoencoder.
    Those `in_company` count pictures with a second thing, too: what an embedding of a whole picture says of them is as
    much about the other thing.
    """

    full: list[bool]
    usual: list[bool]
    named: list[bool]
    areas: list[float]
    rebuilt: list[float]
    in_company: list[float]

    def rows(self) -> list[tuple[str, int, str]]:
        """Name, n and value of each figure."""
        return [
            (f"retrieval of 1 of {CHOICES}, full captions", len(self.full), f"{np.mean(self.full):.4f}"),
            (f"retrieval of 1 of {CHOICES}, any caption", len(self.usual), f"{np.mean(self.usual):.4f}"),
            ("the same, the eight individuals in company", len(self.named), f"{np.mean(self.named):.4f}"),
            ("AUC of unseen individuals, mean of classes", len(self.areas), f"{np.mean(self.areas):.4f}"),
            ("the same, one of two pictures rebuilt", len(self.areas), f"{np.mean(self.rebuilt):.4f}"),
            (
                "the same, a second thing in half the pictures",
                len(self.areas),
                f"{np.mean(self.in_company):.4f}",
            ),
        ]


def train(run: Run) -> None:
    """Train and write `assets/scorer`; the figures go to `clip/figures.csv` under `runs`."""
    vae = autoencoding.opened(run)
    lessons = Lessons.drawn(run, vae)
    captions = lessons.scenes.captions()
    tokenizer = _tokenizer(run, captions)
    ids, thing_ids = (
        tokenised(tokenizer, [c for wordings in every for c in wordings]).view(len(every), -1, CONTEXT)
        for every in (captions, lessons.wordings)
    )
    unseen = Unseen.drawn(run, vae)
    plan = Plan(
        "clip",
        run.steps or 2400,
        batch=64,
        peak=1.5e-3,
        average=0.995,
        decay=0.05,
        seed=3,
        sample_every=400,
        save_every=run.save_every,
    )

    def measure(module: CLIP, step: int) -> None:
        rows = unseen.measured(module, tokenizer).rows()
        for name, n, value in rows:
            print(f"clip step {step}: {name}, n = {n}: {value}", flush=True)
        with (run.runs / "clip" / "figures.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "figure", "n", "value"), *((step, *row) for row in rows)])

    torch.manual_seed(plan.seed)
    module = _module(run, len(tokenizer))
    loss = contrastive_loss(lessons, ids, thing_ids, plan.batch, run.machine.device)
    average = fit(plan, module, loss, run.runs / "clip", run.machine, measure)
    write(average, len(tokenizer), run.assets / "scorer")
