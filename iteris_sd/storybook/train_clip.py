"""Stage `clip`: the scorer, a small CLIP in open_clip's format, learnt from drawn scenes and their captions.

Two losses share one image tower.  A picture finds its caption among others of its batch, and the other way
round.  And a picture of a thing finds another picture of the same thing among things of its class, on another
background or in company: so that marks and colours no caption names count as well.
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
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from iteris_sd.storybook import data, model, world
from iteris_sd.storybook.loop import Plan, fit
from iteris_sd.storybook.pictures import to_tensor

if TYPE_CHECKING:
    from open_clip.model import CLIP

CONTEXT = 48  # tokens; captions have at most 22, a long prompt in rare words about 40
WIDTH = 128  # of the embedding that both towers share, and of the text tower
SIDE = 96  # pictures are looked at in this size: marks still show, at under two thirds of the time of 128
VISION: Mapping[str, Any] = {"layers": [1, 2, 2, 1], "width": 16, "head_width": 64, "image_size": SIDE}

LOOKS = 640  # particular things drawn for the second loss
VIEWS = 4  # pictures of each: two alone, two in company
LOOKS_SEED = 20_000_000
OTHERS_SEED = 30_000_000  # things never trained on
PAIRS = 16
SHARPNESS = 20.0  # inverse temperature of the second loss
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
    marks = {i.cls: i.look.mark for i in world.INDIVIDUALS.values()}
    decks = [rng.permutation(np.array(_all_looks(c, marks[c.name]), object)) for c in world.CLASSES.values()]
    rounds = zip(*decks, strict=False)
    looks = [look for row in rounds for look in row][:count]
    if len(looks) < count:
        raise ValueError(f"the world has no {count} different looks, only {len(looks)}")
    return looks


def _all_looks(spec: world.ClassSpec, mark: str | None) -> list[world.Look]:
    """Every look of a class that shows; a second colour shows only in a mark or a pattern."""
    colours = tuple(spec.colours)
    return [world.Look(spec.name, colour) for colour in colours] + [
        world.Look(spec.name, colour, pattern, mark=worn, accent=accent)
        for colour, accent in permutations(colours, 2)
        for pattern in spec.patterns
        for worn in (None, mark)
        if worn is not None or pattern != "plain"
    ]


def views(look: world.Look, seed: int) -> list[world.Scene]:
    """`VIEWS` scenes with one thing on different backgrounds, the second half of them beside another thing."""
    rng = np.random.default_rng((seed, 2))
    places = rng.permutation(list(world.BACKGROUNDS))[:VIEWS].tolist()
    scenes = []
    for k, background in enumerate(places):
        shown = replace(look, size=str(rng.choice(list(world.SIZES))))
        own = int(rng.integers(2**31))
        other = world.sample(rng, two=0).things[0]
        if 2 * k < VIEWS or other.cls == look.cls:
            scenes.append(world.Scene(background, (shown,), None, own))
        else:
            relation = str(rng.choice(["next to", "to the left of", "to the right of", "in front of"]))
            scenes.append(world.Scene(background, (shown, other), relation, own))
    return scenes


def _draw_views(look: world.Look, seed: int) -> np.ndarray:
    return np.stack([np.asarray(world.draw(scene)) for scene in views(look, seed)])


def drawn_views(directory: Path, looks: Sequence[world.Look], first: int, workers: int = 2) -> np.ndarray:
    """Pictures of the looks, (looks, VIEWS, 128, 128, 3) uint8, drawn once and kept in `directory`."""
    path = directory / f"views_{first}_{len(looks)}.npy"
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


def disturbed(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Light, tint, softness and grain of (n, 3, h, w) changed a little, as generated pictures differ from drawn."""
    n, side = len(pixels), int(torch.randint(32, 84, (), generator=rng))
    gain = 1 + 0.1 * torch.randn(n, 1, 1, 1, generator=rng)
    pixels = pixels * gain + 0.05 * torch.randn(n, 3, 1, 1, generator=rng)
    soft = torch.rand(n, generator=rng) < 0.4
    if soft.any():
        small = F.interpolate(pixels[soft], size=side, mode="bilinear", antialias=True)
        pixels[soft] = F.interpolate(small, size=pixels.shape[-1], mode="bilinear")
    grain = 0.08 * torch.rand(n, 1, 1, 1, generator=rng)
    return pixels + grain * torch.randn(pixels.shape, generator=rng)


def contrast(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of paired rows, each (n, d) and normalised (arXiv 2103.00020, figure 3)."""
    logits, own = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def contrastive_loss(
    scenes: data.Scenes, ids: Tensor, things: np.ndarray, batch: int
) -> Callable[[CLIP, torch.Generator], Tensor]:
    """The loss of `fit`: `batch` captioned scenes, and `PAIRS` pairs of pictures of things of one class."""
    classes = len(world.CLASSES)

    def pairs(rng: torch.Generator) -> Tensor:
        """(2 PAIRS, 3, h, w): each thing alone, then each in another view."""
        cls = int(torch.randint(classes, (), generator=rng))
        rows = cls + classes * torch.randperm(len(things) // classes, generator=rng)[:PAIRS].numpy()
        alone = torch.randint(VIEWS // 2, (PAIRS,), generator=rng).numpy()
        other = (alone + torch.randint(1, VIEWS, (PAIRS,), generator=rng).numpy()) % VIEWS
        pixels = looked_at(np.concatenate([things[rows, alone], things[rows, other]]))
        # One order of the colour channels for all, so that it tells nobody apart.
        return pixels[:, torch.randperm(3, generator=rng)]

    def loss(module: CLIP, rng: torch.Generator) -> Tensor:
        rows, drawn = scenes.pick(batch, rng)
        tokens = ids[rows, torch.randint(ids.shape[1], (batch,), generator=rng)].long()
        pixels = disturbed(torch.cat([looked_at(drawn), pairs(rng)]), rng)
        seen = module.encode_image(pixels.contiguous(memory_format=torch.channels_last), normalize=True)
        pictures, one, two = seen.split([batch, PAIRS, PAIRS])
        said = module.encode_text(tokens, normalize=True)
        scale = module.logit_scale.clamp(max=MAX_LOG_SCALE).exp()
        return contrast(pictures, said, scale) + 0.5 * contrast(one, two, SHARPNESS)

    return loss


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """One measured share: what of, among how many, and how large."""

    name: str
    n: int
    value: float


def full_captions(first: int, count: int) -> list[str]:
    """For each held-out scene the longest of many wordings: most captions leave too much out to name one scene."""
    captions = []
    for seed in range(first, first + count):
        rng, scene = np.random.default_rng((seed, 3)), world.sample(seed)
        captions.append(max((world.caption(scene, rng) for _ in range(32)), key=len))
    return captions


@torch.no_grad()
def embedded(module: CLIP, pixels: np.ndarray) -> Tensor:
    """Normalised embeddings (n, d) of (n, 128, 128, 3) uint8."""
    return torch.cat([module.encode_image(p, normalize=True) for p in looked_at(pixels).split(32)])


@torch.no_grad()
def retrieval(module: CLIP, tokenizer: CLIPTokenizer, pictures: Tensor, captions: Sequence[str]) -> float:
    """Share of captions whose own picture is the nearest in its group of `CHOICES`; pictures (n, d)."""
    said = torch.cat(
        [module.encode_text(t, normalize=True) for t in tokenised(tokenizer, captions).long().split(64)]
    )
    groups = zip(pictures.split(CHOICES), said.split(CHOICES), strict=True)
    hits = [(s @ p.T).argmax(dim=1) == torch.arange(len(s)) for p, s in groups]
    return float(torch.cat(hits).float().mean())


def told_apart(things: Tensor, classes: int) -> float:
    """Chance that two views of one thing are nearer than views of two things of its class, (things, VIEWS, d).

    This is the area under the ROC curve, averaged over classes; thing k is of class k modulo `classes`.
    """
    areas = []
    for cls in range(classes):
        rows = things[cls::classes]
        flat, who = rows.flatten(0, 1), torch.arange(len(rows)).repeat_interleave(rows.shape[1])
        near, same = flat @ flat.T, who[:, None] == who
        mine, others = near[same & ~torch.eye(len(flat), dtype=torch.bool)], near[~same]
        areas.append((mine[:, None] > others).float().mean())
    return float(torch.stack(areas).mean())


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
                "width": WIDTH,
                "heads": 4,
                "layers": 3,
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


def _tokenizer(assets: Path, captions: Sequence[Sequence[str]], resumed: bool) -> CLIPTokenizer:
    """Storybook's own tokenizer, copied to the scorer; learnt the same way if Storybook has none yet.

    A resumed run keeps the one it began with: two learnt from the same captions may number words differently.
    """
    folder, storybook = assets / "scorer", assets / "storybook" / "tokenizer"
    if not resumed and storybook.exists():
        shutil.copytree(storybook, folder, dirs_exist_ok=True)
    elif not resumed:
        model.train_tokenizer((c for wordings in captions[:6000] for c in wordings), folder)
    return CLIPTokenizer.from_pretrained(folder)


def train(runs: Path, assets: Path, scenes: int, steps: int = 900) -> None:
    """Train and write `assets/scorer`; the figures go to `clip/figures.csv` under `runs`."""
    from open_clip.model import CLIP

    drawn = data.drawn(runs / "scenes", scenes)
    things = drawn_views(runs / "scenes", particular_looks(LOOKS, LOOKS_SEED), LOOKS_SEED)
    captions = drawn.captions()
    tokenizer = _tokenizer(assets, captions, resumed=(runs / "clip" / "checkpoint.pt").exists())
    ids = tokenised(tokenizer, [c for wordings in captions for c in wordings]).view(
        len(captions), -1, CONTEXT
    )
    unseen = data.drawn(runs / "scenes", QUERIES, EVALUATED)
    full, usual = full_captions(EVALUATED, QUERIES), [wordings[0] for wordings in unseen.captions()]
    # Of one seed the same looks come first: those after them are not trained on.
    strangers = [
        *particular_looks(LOOKS + 64, LOOKS_SEED)[LOOKS:],
        *(i.look for i in world.INDIVIDUALS.values()),
    ]
    others = drawn_views(runs / "scenes", strangers, OTHERS_SEED)
    plan = Plan("clip", steps, batch=64, peak=1.5e-3, average=0.995, decay=0.05, seed=3, sample_every=200)

    def measure(module: CLIP, step: int) -> None:
        pictures = embedded(module, unseen.pixels[:])
        apart = embedded(module, others.reshape(-1, *others.shape[2:])).unflatten(0, others.shape[:2])
        figures = [
            Figure(
                f"retrieval of 1 of {CHOICES}, full captions",
                QUERIES,
                retrieval(module, tokenizer, pictures, full),
            ),
            Figure(
                f"retrieval of 1 of {CHOICES}, any caption",
                QUERIES,
                retrieval(module, tokenizer, pictures, usual),
            ),
            Figure(
                "AUC of unseen individuals within their class",
                len(others),
                told_apart(apart, len(world.CLASSES)),
            ),
        ]
        for figure in figures:
            print(f"clip step {step}: {figure.name}, n = {figure.n}: {figure.value:.3f}", flush=True)
        with (runs / "clip" / "figures.csv").open("w", newline="") as file:
            rows = [(step, figure.name, figure.n, f"{figure.value:.4f}") for figure in figures]
            csv.writer(file).writerows([("step", "figure", "n", "value"), *rows])

    torch.manual_seed(plan.seed)
    cfg = configuration(len(tokenizer))["model_cfg"]
    module = CLIP(**cfg).to(memory_format=torch.channels_last)
    average = fit(plan, module, contrastive_loss(drawn, ids, things, plan.batch), runs / "clip", measure)
    write(average, len(tokenizer), assets / "scorer")
