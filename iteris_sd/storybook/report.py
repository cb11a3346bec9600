"""Measure Storybook: `python -m iteris_sd.storybook.report --output DIR` renders, judges and writes `report.md`.

Every figure has its n and a 95 % interval: Wilson's for shares, Student's t for means.  Generated pictures are judged
by the oracle (`train_oracle`), learnt from drawn scenes alone; captions ask for class x colour x background
combinations never drawn in training.  Pictures of concepts are compared by the scorer that ships.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from iteris_sd import backbone, bases, concepts, intervals, scoring
from iteris_sd.storybook import data, train_clip, train_oracle, world
from iteris_sd.storybook.machine import here, suit
from iteris_sd.storybook.pictures import contact_sheet, to_image, to_tensor
from iteris_sd.storybook.run import Run
from iteris_sd.storybook.train_concepts import PLACES, SUBJECTS, UNSEEN_PLACES, Subject, load
from iteris_sd.storybook.train_vae import reconstruct

ASKED = data.HELD_OUT + 200_000  # scenes whose captions are asked for
OTHERS = data.HELD_OUT + 400_000  # other individuals
_Z = 1.959963984540054


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """One measured number: what, its bar in words, n, value and 95 % interval, and whether the bar is met."""

    name: str
    bar: str
    n: int
    value: float
    low: float | None
    high: float | None
    met: bool | None = None
    unit: str = "%"

    def row(self) -> tuple[str, ...]:
        """As text, for people and for CSV."""
        digits = {"%": 1, "dB": 2, "s": 2, "concepts": 0}.get(self.unit, 3)
        interval = "" if self.low is None else f"{self.low:.{digits}f} to {self.high:.{digits}f}"
        verdict = {None: "", True: "yes", False: "no"}[self.met]
        return (
            self.name,
            self.bar,
            str(self.n),
            f"{self.value:.{digits}f} {self.unit}".strip(),
            interval,
            verdict,
        )


def share(name: str, right: Sequence[bool], least: float | None = None) -> Figure:
    """A share in per cent with Wilson's interval; the bar is that the share itself reaches `least` per cent."""
    n, k = len(right), sum(right)
    p, z2 = k / n, _Z**2 / n
    middle, reach = (p + z2 / 2) / (1 + z2), _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    bar, met = ("", None) if least is None else (f"≥ {least:g} %", 100 * p >= least)
    low, high = min(p, middle - reach), max(p, middle + reach)  # at 0 and 1 rounding would leave p outside
    return Figure(name, bar, n, 100 * p, 100 * low, 100 * high, met)


def mean(name: str, values: Sequence[float], unit: str, least: float | None = None, bar: str = "") -> Figure:
    """A mean with its t interval; the bar is that the mean reaches `least`."""
    value, low, high = intervals.mean_and_interval(values)
    met = None if least is None else value >= least
    return Figure(
        name,
        bar or ("" if least is None else f"≥ {least:g} {unit}"),
        len(values),
        value,
        low,
        high,
        met,
        unit,
    )


# ---------------------------------------------------------------- drawing what captions ask for


@dataclass(frozen=True, eq=False)
class Bench:
    """What every measurement needs: the model, the judge, the scorer, and where sheets go."""

    backbone: backbone.Backbone
    oracle: train_oracle.Oracle
    scorer: scoring.Scorer
    run: Run
    output: Path

    def draw(self, prompts: Sequence[str], first_seed: int = 0, batch: int = 32) -> list[Image.Image]:
        """A picture of each prompt by plain diffusers: 20 DDIM steps, guidance 4, seeds in order."""
        pipeline: StableDiffusionPipeline = self.backbone.pipeline
        base = self.backbone.base
        pictures: list[Image.Image] = []
        for k in range(0, len(prompts), batch):
            part = list(prompts[k : k + batch])
            seeds = range(first_seed + k, first_seed + k + len(part))
            noise = [torch.Generator().manual_seed(seed) for seed in seeds]
            with self.run.machine.autocast():
                pictures += pipeline(
                    part, num_inference_steps=base.steps, guidance_scale=base.guidance, generator=noise
                ).images
        return pictures

    def judge(self, pictures: Iterable[Image.Image]) -> train_oracle.Verdict:
        """The oracle's verdict."""
        return train_oracle.judged(self.oracle, to_tensor(np.stack([np.asarray(p) for p in pictures])))

    def sheet(self, name: str, pictures: Sequence[Image.Image], columns: int = 10) -> None:
        """A contact sheet under `output`."""
        contact_sheet(pictures[:100], columns, self.output / f"{name}.png")


def asked(
    count: int, of: int, calm: bool, fits: Callable[[world.Scene], bool], offset: int
) -> list[world.Scene]:
    """`count` held-out scenes of `of` things that fit."""
    scenes: list[world.Scene] = []
    seed = ASKED + offset
    while len(scenes) < count:
        scene = world.sample(seed, count=of, unseen=True, calm=calm)
        if scene.held_out and fits(scene):
            scenes.append(scene)
        seed += 1
    return scenes


def full_captions(scenes: Sequence[world.Scene]) -> list[str]:
    """A caption of each scene that says all there is to say."""
    return [world.caption(scene, np.random.default_rng((scene.seed, 7)), full=True) for scene in scenes]


# ---------------------------------------------------------------- measurements


def reconstruction(bench: Bench, n: int) -> list[Figure]:
    """The autoencoder on held-out scenes, and what it costs the oracle."""
    first = train_oracle.EVALUATED
    pixels = to_tensor(data.drawn(bench.run.runs / "scenes", train_oracle.JUDGED, first).pixels[:n])
    truth = train_oracle.Truth.of([world.sample(seed) for seed in range(first, first + n)])
    blocks = [reconstruct(bench.backbone.vae, part) for part in pixels.split(50)]
    back = torch.cat([b for b, _ in blocks])
    ratios = (-10 * ((back - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()).tolist()
    bench.sheet("reconstruction", [to_image(p) for k in range(min(30, n)) for p in (pixels[k], back[k])])
    before = train_oracle.marks(train_oracle.judged(bench.oracle, pixels), truth)
    after = train_oracle.marks(train_oracle.judged(bench.oracle, back), truth)
    figures = [mean("reconstruction, PSNR", ratios, "dB", 28.0, "≥ 28 dB (trained on CPU; else 30)")]
    for what in before:
        lost = [100.0 * (b - a) for b, a in zip(before[what], after[what], strict=True)]
        loss = mean(f"oracle, {what}: points lost by reconstruction", lost, "points", bar="within 1 point")
        figures += [
            share(f"oracle, {what}, on drawn scenes", before[what], 98.0),
            replace(loss, met=abs(loss.value) <= 1.0),
        ]
    theirs = train_oracle.drawn_kin(
        bench.run.runs / "scenes", train_oracle.JUDGED // 2, train_oracle.KIN_UNSEEN_SEED
    )
    seen = train_oracle.judged(bench.oracle, to_tensor(theirs.scenes.pixels[:n]))
    right = train_oracle.marks(seen, theirs.truth.of_rows(range(min(n, len(theirs.scenes)))))["classes"]
    return [*figures, share("oracle, classes, on drawn scenes with the individuals", right, 98.0)]


def one_object(bench: Bench, n: int) -> list[Figure]:
    """Is the one thing asked for the most certain of all classes?"""
    scenes = asked(n, 1, False, lambda s: True, 0)
    pictures = bench.draw(full_captions(scenes))
    bench.sheet("one_object", pictures)
    verdict, truth = bench.judge(pictures), train_oracle.Truth.of(scenes)
    classes = truth.present.int().argmax(dim=1)
    right = (verdict.present.argmax(dim=1) == classes) & (verdict.present[range(n), classes] > 0)
    colours = verdict.colours[range(n), classes].argmax(dim=1) == truth.colours[range(n), classes]
    _write_details(
        bench.output / "one_object.csv", full_captions(scenes), {"class": right, "colour": colours}
    )
    return [
        share("one object, class right", right.tolist(), 97.0),
        share("one object, class and colour right", (right & colours).tolist()),
    ]


def two_objects(bench: Bench, n: int) -> list[Figure]:
    """Are both there, in any relation?"""
    scenes = asked(n, 2, False, lambda s: True, 50_000)
    pictures = bench.draw(full_captions(scenes), 1000)
    bench.sheet("two_objects", pictures)
    both = _both(bench.judge(pictures), train_oracle.Truth.of(scenes))
    _write_details(bench.output / "two_objects.csv", full_captions(scenes), {"both": both})
    names = [scene.relation or "and" for scene in scenes]
    apart = [
        share(f"two objects, {name!r}", [bool(b) for b, own in zip(both, names, strict=True) if own == name])
        for name in sorted(set(names))
    ]
    return [share("two objects, both classes present", both.tolist(), 80.0), *apart]


def binding(bench: Bench, n: int) -> list[Figure]:
    """Two things of different colours, side by side: each its own colour? the sides as asked?"""

    def fits(scene: world.Scene) -> bool:
        one, other = scene.things
        return scene.relation in ("to the left of", "to the right of") and one.colour != other.colour

    scenes = asked(n, 2, True, fits, 100_000)
    pictures = bench.draw(full_captions(scenes), 2000)
    bench.sheet("binding", pictures)
    verdict, truth = bench.judge(pictures), train_oracle.Truth.of(scenes)
    both = _both(verdict, truth)
    own = ((verdict.colours.argmax(dim=2) == truth.colours) | ~truth.present).all(dim=1)
    index = [[train_oracle.CLASSES.index(look.cls) for look in scene.things] for scene in scenes]
    first = torch.tensor([verdict.places[k, a] < verdict.places[k, b] for k, (a, b) in enumerate(index)])
    left = torch.tensor([scene.relation == "to the left of" for scene in scenes])
    sides = first == left
    details = {"both": both, "colours": own, "sides": sides}
    _write_details(bench.output / "binding.csv", full_captions(scenes), details)
    return [
        share("colour binding, both there and each in its own colour", (both & own).tolist(), 70.0),
        share("left/right, both there and the sides as asked", (both & sides).tolist(), 75.0),
        share("side by side, both classes present", both.tolist()),
        share("colour binding where both are there", own[both].tolist()),
        share("left/right where both are there", sides[both].tolist()),
    ]


def _both(verdict: train_oracle.Verdict, truth: train_oracle.Truth) -> Tensor:
    """(n,) bool: every class asked for is there."""
    return ((verdict.present > 0) | ~truth.present).all(dim=1)


def scorer(bench: Bench) -> list[Figure]:
    """Retrieval by caption, and telling individuals apart."""
    tokenizer = CLIPTokenizer.from_pretrained(bench.run.assets / "scorer")
    unseen = train_clip.Unseen.drawn(bench.run, bench.backbone.vae)
    found = unseen.measured(bench.scorer.model, tokenizer)
    return [
        share(f"scorer, retrieval of 1 of {train_clip.CHOICES}, full captions", found.full, 95.0),
        share(f"scorer, retrieval of 1 of {train_clip.CHOICES}, any caption", found.usual),
        share("the same, full captions of scenes with the eight individuals", found.named),
        mean("scorer, AUC of unseen individuals, over classes", found.areas, "", 0.95),
        mean("the same, one of two pictures through the autoencoder", found.rebuilt, ""),
        mean("the same, a second thing in half the pictures", found.in_company, ""),
    ]


@dataclass(frozen=True, eq=False)
class _Kin:
    """Embeddings of a concept's references (5, d) and of seven other individuals of its class (7, 5, d)."""

    own: Tensor
    others: Tensor

    def nearest(self, seen: Tensor) -> Tensor:
        """(n,) bool: mean cosine with its own references above that with every other's."""
        return (seen @ self.own.T).mean(dim=1) > (seen @ self.others.mean(dim=1).T).max(dim=1).values


def _kin(bench: Bench, subject: Subject, concept: concepts.Concept) -> _Kin:
    rounds = len(world.CLASSES)
    looks = train_clip.particular_looks(64 * rounds, OTHERS + subject.number)
    others = [look for look in looks if look.cls == subject.noun and look.mark is not None][:7]
    scenes = [
        world.Scene(place, (look,), None, OTHERS + 10 * k + j)
        for k, look in enumerate(others)
        for j, place in enumerate(PLACES)
    ]
    seen = bench.scorer.embed_images([world.draw(scene) for scene in scenes])
    return _Kin(bench.scorer.reference(concept.pictures()), seen.unflatten(0, (7, len(PLACES))))


def _alone(subject: Subject, words: str | None, n: int) -> list[str]:
    phrase = subject.phrases(words)[0]
    return [f"{phrase} {world.BACKGROUNDS[UNSEEN_PLACES[k % 5]].phrase}" for k in range(n)]


def _beside(subject: Subject, n: int) -> tuple[list[str], list[str]]:
    """Prompts with a generic second thing, and the class of that thing."""
    things: tuple[str, ...] = (
        "red barn",
        "grey cat",
        "blue car",
        "yellow flower",
        "brown dog",
        "green umbrella",
    )
    things = tuple(t for t in things if not t.endswith(subject.noun))
    words = ("next to a {}", "and a {}", "to the left of a {}", "to the right of a {}")
    chosen = [things[k % len(things)] for k in range(n)]
    phrase = subject.phrases()[0]
    prompts = [
        f"{phrase} {words[k % 4].format(thing)} {world.BACKGROUNDS[UNSEEN_PLACES[k % 5]].phrase}"
        for k, thing in enumerate(chosen)
    ]
    return prompts, [thing.split(" ", 1)[1] for thing in chosen]


@dataclass(frozen=True)
class _OfConcept:
    """What was measured of one concept."""

    identity: Figure
    leak: Figure
    leak_apart: Figure
    nearest: list[bool]
    both: list[bool]
    composable: list[bool]


def _of_concept(bench: Bench, subject: Subject, concept: concepts.Concept, n: int) -> _OfConcept:
    """Draw one concept's LoRA alone, in company and by its class word, beside the base model, and measure it."""
    kin, loaded = _kin(bench, subject, concept), concept.load()
    plain, (prompts, beside) = _alone(subject, subject.noun, n), _beside(subject, n)
    base = bench.draw(plain, 5000)
    with bench.backbone.prepared(loaded.tokens, loaded.lora):
        alone = bench.draw(_alone(subject, None, n), 5000)
        together, leaked = bench.draw(prompts, 6000), bench.draw(plain, 5000)
    bench.sheet(f"concept_{subject.name}", [*alone[:10], *base[:10], *together[:10], *leaked[:10]])
    seen, from_base, left = (bench.scorer.embed_images(p) for p in (alone, base, leaked))
    gain = ((seen - from_base) @ kin.own.T).mean(dim=1).tolist()
    name = f"{subject.name}: image alignment above the base model's, paired"
    identity = mean(name, gain, "", bar="above 0")
    # Nearer the base model's picture of the same prompt and seed than the concept's references? And nearer its pictures
    # of the other seeds, which the scorer takes for other individuals?
    to_concept = (left @ kin.own.T).mean(dim=1)
    name = f"{subject.name}: class word alone, nearer the base than the concept"
    leak = mean(name, ((left * from_base).sum(dim=1) - to_concept).tolist(), "", bar="above 0")
    others = (left @ from_base.T).fill_diagonal_(0).sum(dim=1) / max(1, len(left) - 1)
    apart = mean(f"{name}, by the base's other seeds", (others - to_concept).tolist(), "")
    verdict = bench.judge(together).present
    wanted = [[train_oracle.CLASSES.index(cls) for cls in (other, subject.noun)] for other in beside]
    both = torch.stack([(verdict[k, pair] > 0).all() for k, pair in enumerate(wanted)])
    own = kin.nearest(bench.scorer.embed_images(together))
    return _OfConcept(
        replace(identity, met=(identity.low or 0.0) > 0),
        replace(leak, met=leak.value > 0),
        apart,
        kin.nearest(seen).tolist(),
        both.tolist(),
        (both & own).tolist(),
    )


def individuals(bench: Bench, n: int) -> list[Figure]:
    """Identity, composability and leak of each concept's LoRA alone."""
    library = concepts.Library.read(bench.run.assets / "concepts")
    found = {s.name: _of_concept(bench, s, library.find(s.name), n) for s in SUBJECTS.values()}
    each = list(found.values())
    return [
        _count("identity: above the base, interval clear of zero", [bool(one.identity.met) for one in each]),
        share(
            "identity: nearest its own references of eight individuals",
            [right for one in each for right in one.nearest],
            80.0,
        ),
        share("composable: both there and still itself", [r for one in each for r in one.composable], 65.0),
        _count("leak: class word alone stays with the base", [bool(one.leak.met) for one in each]),
        *(one.identity for one in each),
        *(share(f"{name}: nearest its own references", one.nearest) for name, one in found.items()),
        *(
            share(f"{name}: beside another thing, {what}", marks)
            for name, one in found.items()
            for what, marks in (("both there and still itself", one.composable), ("both there", one.both))
        ),
        *(figure for one in each for figure in (one.leak, one.leak_apart)),
    ]


def _count(name: str, met: Sequence[bool]) -> Figure:
    """How many of the concepts reach a bar that all must reach."""
    return Figure(name, f"all {len(met)}", len(met), sum(met), None, None, all(met), "concepts")


def speed(bench: Bench, repeats: int) -> list[Figure]:
    """Seconds to load the weights, to draw one picture, and to draw four in one batch, in float32 as the app does."""

    def timed(work: Callable[[], object]) -> list[float]:
        work()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return seconds

    def drawing(count: int) -> Callable[[], object]:
        prompts = ["a dog next to a red barn on the beach"] * count
        return lambda: bench.backbone.pipeline(prompts, num_inference_steps=20, guidance_scale=4.0)

    def loading() -> object:
        return StableDiffusionPipeline.from_pretrained(bench.run.storybook, use_safetensors=True)

    figures = []
    for name, work, most in (
        ("weights loaded", loading, 1.0),
        ("one picture, 20 steps with guidance", drawing(1), 1.5),
        ("four pictures in one batch", drawing(4), 4.0),
    ):
        figure = mean(name, timed(work), "s", bar=f"< {most:g} s on two cores")
        figures.append(replace(figure, met=figure.value < most))
    return figures


# ---------------------------------------------------------------- the report


def _write_details(path: Path, captions: Sequence[str], marks: dict[str, Tensor]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("caption", *marks))
        writer.writerows((text, *(int(m[k]) for m in marks.values())) for k, text in enumerate(captions))


HEADER: tuple[str, ...] = ("figure", "must reach", "n", "value", "95 % interval", "reached")


def write(figures: Sequence[Figure], output: Path) -> None:
    """`report.md` and `report.csv`."""
    rows: list[tuple[str, ...]] = [figure.row() for figure in figures]
    lines = [f"| {' | '.join(row)} |" for row in [HEADER, tuple("---" for _ in HEADER), *rows]]
    text = "# Storybook, measured\n\n" + (__doc__ or "").split("\n\n", 1)[1] + "\n" + "\n".join(lines) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    with (output / "report.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])


def opened(run: Run, output: Path) -> Bench:
    """Everything the measurements need, from the folders of a run."""
    import open_clip

    base = bases.find("storybook")
    pipeline = load(run.assets).to(run.machine.device)
    place = f"local-dir:{run.assets / 'scorer'}"
    clip, _, preprocess = open_clip.create_model_and_transforms(place, require_pretrained=True)
    judge = scoring.Scorer(
        scoring.SCORERS[base.scorer].title,
        clip.eval().requires_grad_(False).to(run.machine.device),
        preprocess,
        open_clip.get_tokenizer(place),
        run.machine.device,
    )
    oracle = train_oracle.load(run.assets).to(run.machine.device)
    return Bench(backbone.Backbone(base, pipeline), oracle, judge, run, output)


def measure(run: Run, output: Path, count: int) -> list[Figure]:
    """All figures, written to `output` as they come; `count` pictures per figure, a tenth of it per concept."""
    output.mkdir(parents=True, exist_ok=True)
    bench = opened(run, output)
    figures = speed(bench, 5)
    suit(bench.backbone.unet, run.machine)
    for work in (
        lambda: reconstruction(bench, min(500, train_oracle.JUDGED)),
        lambda: one_object(bench, count),
        lambda: two_objects(bench, count),
        lambda: binding(bench, count),
        lambda: scorer(bench),
        lambda: individuals(bench, max(10, count // 10)),
    ):
        figures += work()
        write(figures, output)
        print(*(" | ".join(f.row()) for f in figures[-3:]), sep="\n", flush=True)
    return figures


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for report.md, CSVs and sheets")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/storybook"), help="where drawn scenes are kept"
    )
    parser.add_argument("--assets", type=Path, default=bases.ASSETS, help="the weights to measure")
    parser.add_argument("--count", type=int, default=400, help="pictures per figure; concepts: a tenth each")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    options = parser.parse_args()
    run = Run(options.runs, options.assets, 0, here(options.precision))
    measure(run, options.output, options.count)


if __name__ == "__main__":
    main()
