"""Stage `oracle`: a judge of pictures, learnt from drawn scenes alone: which classes, which colour each, and where.

A small convolutional net gives features F (width, 8, 8) and one map M_c of scores per class c.  Class c is there if
the log-sum-exp of M_c says so; softmax(M_c) says where to look: the mean of F under it names the colour, and the
mean position under it is the place.  The report judges generated pictures by it; nothing else needs it.

A part of each batch shows one of the eight individuals, alone or with a generic thing: no other scene has their looks,
and a judge that never saw them did not take a heart-shaped pair of sunglasses for sunglasses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from iteris_sd.storybook import data, world
from iteris_sd.storybook.loop import Plan, fit
from iteris_sd.storybook.machine import channels_last
from iteris_sd.storybook.pictures import disturbed, to_tensor
from iteris_sd.storybook.run import Run

CLASSES = tuple(world.CLASSES)
ABSENT = -1  # the colour of a class that is not in the picture, or that has none of the world's ordinary ones
EVALUATED = data.HELD_OUT + 5000
KIN = 6000  # scenes with an individual
KIN_SEED = 50_000_000
KIN_UNSEEN_SEED = 60_000_000  # those that it is judged on
KIN_SHARE = 4  # one in so many pictures of a batch
JUDGED = 1000  # held-out scenes its accuracy is measured on
FILE = Path("oracle") / "oracle.safetensors"


@dataclass(frozen=True, eq=False)
class Truth:
    """Of n pictures: `present` (n, classes) bool; `colours` (n, classes) index into `world.COLOURS` or `ABSENT`;
    `places` (n, classes), 0 to 1."""

    present: Tensor
    colours: Tensor
    places: Tensor

    @staticmethod
    def of(scenes: Sequence[world.Scene]) -> Truth:
        """What is to be seen in drawn scenes; the place of a thing is its middle, from left to right."""
        present = torch.zeros(len(scenes), len(CLASSES), dtype=torch.bool)
        colours = torch.full((len(scenes), len(CLASSES)), ABSENT)
        places = torch.zeros(len(scenes), len(CLASSES))
        for k, scene in enumerate(scenes):
            for thing in world.placed(scene):
                at = CLASSES.index(thing.look.cls)
                present[k, at] = True
                if not thing.look.individual:
                    colours[k, at] = world.COLOURS.index(thing.look.colour)
                places[k, at] = thing.middle / world.CANVAS
        return Truth(present, colours, places)

    def of_rows(self, rows: Sequence[int]) -> Truth:
        """Of some of the pictures."""
        chosen = list(rows)
        return Truth(self.present[chosen], self.colours[chosen], self.places[chosen])

    def followed_by(self, other: Truth) -> Truth:
        """Of these pictures and then of others."""
        parts = zip(
            (self.present, self.colours, self.places),
            (other.present, other.colours, other.places),
            strict=True,
        )
        return Truth(*(torch.cat(pair) for pair in parts))


@dataclass(frozen=True, eq=False)
class Verdict:
    """Of n pictures and all classes: `present` (n, classes) logits, `colours` (n, classes, colours) logits,
    `places` (n, classes) from 0, left, to 1."""

    present: Tensor
    colours: Tensor
    places: Tensor


class Oracle(nn.Module):
    """Pictures (n, 3, 128, 128) in [-1, 1] to a `Verdict`."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, width)
        self.body = nn.Sequential(*(_block(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.maps = nn.Conv2d(width, len(CLASSES), 1)
        self.bias = nn.Parameter(torch.full((len(CLASSES),), -4.0))
        self.colours = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, len(world.COLOURS)))

    def forward(self, pixels: Tensor) -> Verdict:
        """Judge pictures."""
        features = self.body(pixels)
        maps = self.maps(features).float().flatten(2)
        look = maps.softmax(dim=2)
        seen = look @ features.float().flatten(2).transpose(1, 2)
        across = torch.linspace(0.5 / 8, 7.5 / 8, 8, device=maps.device).repeat(8)
        return Verdict(maps.logsumexp(dim=2) + self.bias, self.colours(seen), look @ across)


def _block(inward: int, outward: int) -> nn.Sequential:
    """Halve the picture, then look once more."""
    return nn.Sequential(
        nn.Conv2d(inward, outward, 3, stride=2, padding=1),
        nn.GroupNorm(8, outward),
        nn.SiLU(),
        nn.Conv2d(outward, outward, 3, padding=1),
        nn.GroupNorm(8, outward),
        nn.SiLU(),
    )


@dataclass(frozen=True, eq=False)
class Lesson:
    """Drawn scenes and what is to be seen in them."""

    scenes: data.Scenes
    truth: Truth

    def pick(self, count: int, rng: torch.Generator) -> tuple[np.ndarray, Truth]:
        """Random scenes of it."""
        rows, drawn = self.scenes.pick(count, rng)
        return drawn, self.truth.of_rows(rows)


def kin(count: int, first: int) -> list[world.Scene]:
    """Scenes with one of the individuals in turn, one in three alone, the others with a generic thing; any place."""
    relations = ["next to", "to the left of", "to the right of", "in front of", None]
    scenes = []
    for k in range(count):
        rng = np.random.default_rng((first, k))
        name = list(world.INDIVIDUALS)[k % len(world.INDIVIDUALS)]
        background = str(rng.choice(list(world.BACKGROUNDS)))
        time = str(rng.choice(["day", "day", "sunset", "night"]))
        if k % 3 == 0:
            scenes.append(world.place(name, background, first + k, time=time))
            continue
        others = [cls for cls in world.CLASSES if cls != world.INDIVIDUALS[name].cls]
        look = world.sample_look(str(rng.choice(others)), background, rng, sized=False)
        relation = relations[int(rng.integers(len(relations)))]
        scenes.append(world.place(name, background, first + k, [look], relation, time))
    return scenes


def drawn_kin(directory: Path, count: int, first: int) -> Lesson:
    """Those scenes, drawn once and kept in `directory`."""
    path, scenes = directory / f"kin_{first}_{count}.npy", kin(count, first)
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(2) as pool:
            drawn = list(pool.map(_draw, scenes, chunksize=50))
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.stack(drawn))
        partial.rename(path)
    return Lesson(data.Scenes(np.load(path, mmap_mode="r"), first), Truth.of(scenes))


def _draw(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.draw(scene))


def judging_loss(
    generic: Lesson, individuals: Lesson, batch: int, device: torch.device
) -> Callable[[Oracle, torch.Generator], Tensor]:
    """The loss of `fit`: presence of every class, and colour and place of those that are there."""

    def loss(module: Oracle, rng: torch.Generator) -> Tensor:
        few = max(1, batch // KIN_SHARE)
        drawn, truth = generic.pick(batch - few, rng)
        special, theirs = individuals.pick(few, rng)
        pixels = disturbed(to_tensor(np.concatenate([drawn, special])), rng)
        truth = truth.followed_by(theirs)
        verdict = module(pixels.to(device, memory_format=torch.channels_last))
        present, known = truth.present.to(device), (truth.colours != ABSENT).to(device)
        colours, places = truth.colours.to(device), truth.places.to(device)
        there = F.binary_cross_entropy_with_logits(verdict.present, present.float())
        tint = F.cross_entropy(verdict.colours[known].float(), colours[known])
        where = (verdict.places - places)[present].abs().mean()
        return 4.0 * there + 0.5 * tint + where

    return loss


@torch.no_grad()
def judged(module: Oracle, pixels: Tensor) -> Verdict:
    """The verdict on (n, 3, 128, 128) in [-1, 1], on the CPU."""
    device = module.bias.device
    parts = [module(p.to(device, memory_format=torch.channels_last)) for p in pixels.split(64)]
    return Verdict(
        torch.cat([p.present for p in parts]).cpu(),
        torch.cat([p.colours for p in parts]).cpu(),
        torch.cat([p.places for p in parts]).cpu(),
    )


def marks(verdict: Verdict, truth: Truth) -> dict[str, list[bool]]:
    """Right or wrong, answer by answer: exactly these classes (by picture); the colour (by thing that has an ordinary
    one); and of each two things that stand clearly apart, which is further left."""
    present = truth.present
    sets = ((verdict.present > 0) == present).all(dim=1)
    colours = (verdict.colours.argmax(dim=2) == truth.colours)[truth.colours != ABSENT]
    sides: list[bool] = []
    for row, there in enumerate(present):
        found = there.nonzero().flatten().tolist()
        for k, one in enumerate(found):
            for other in found[k + 1 :]:
                gap = float(truth.places[row, one] - truth.places[row, other])
                if abs(gap) > 0.2:
                    sides.append((gap > 0) == bool(verdict.places[row, one] > verdict.places[row, other]))
    return {"classes": sets.tolist(), "colour": colours.tolist(), "side": sides}


def load(assets: Path) -> Oracle:
    """The trained oracle. Raises FileNotFoundError, and says what to do, if there is none."""
    path = assets / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"There is no oracle at {path}; run `python -m iteris_sd.storybook.train --stage oracle` first."
        )
    module = Oracle()
    load_model(module, path)
    return channels_last(module.eval().requires_grad_(False))


def train(run: Run) -> None:
    """Train and write the oracle, in fp16."""
    drawn = data.drawn(run.runs / "scenes", run.scenes)
    generic = Lesson(drawn, Truth.of([world.sample(seed) for seed in range(run.scenes)]))
    individuals = drawn_kin(run.runs / "scenes", KIN, KIN_SEED)
    unseen_kin = drawn_kin(run.runs / "scenes", JUDGED // 2, KIN_UNSEEN_SEED)
    unseen = data.drawn(run.runs / "scenes", JUDGED, EVALUATED)
    their = Truth.of([world.sample(seed) for seed in range(EVALUATED, EVALUATED + JUDGED)])
    plan = Plan(
        "oracle",
        run.steps or 3000,
        batch=64,
        peak=2e-3,
        average=0.995,
        seed=4,
        sample_every=500,
        save_every=run.save_every,
    )

    def measure(module: Oracle, step: int) -> None:
        found = marks(judged(module, to_tensor(unseen.pixels)), their)
        shares = ", ".join(f"{what} {np.mean(right):.4f} (n = {len(right)})" for what, right in found.items())
        print(f"oracle step {step}: {shares}", flush=True)
        found = marks(judged(module, to_tensor(unseen_kin.scenes.pixels)), unseen_kin.truth)
        right = found["classes"]
        print(f"oracle step {step}: individuals, classes {np.mean(right):.4f} (n = {len(right)})", flush=True)

    torch.manual_seed(plan.seed)
    module = load(run.assets) if run.warm else Oracle()
    module = channels_last(module.requires_grad_(True).to(run.machine.device))
    loss = judging_loss(generic, individuals, plan.batch, run.machine.device)
    average = fit(plan, module, loss, run.runs / "oracle", run.machine, measure)
    (run.assets / FILE).parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in average.state_dict().items()}
    save_file(weights, run.assets / FILE, metadata={"format": "pt"})
