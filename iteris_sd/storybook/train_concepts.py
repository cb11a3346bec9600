"""Stage `concepts`: a LoRA and a token for each individual, learnt from ten pictures of it, or twenty.

Five show it alone, and are kept as its reference pictures; five show it in company, as people's photos do: without
them a LoRA forgets how to draw a second thing.  Three gave their own colours to all that stood beside them all the
same; these are shown beside a thing of each other class.  All are on the same five backgrounds of the ten.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from iteris_sd import formats
from iteris_sd.generators import finish
from iteris_sd.storybook import data, world
from iteris_sd.storybook.autoencoding import encoded
from iteris_sd.storybook.machine import suit
from iteris_sd.storybook.pictures import contact_sheet
from iteris_sd.storybook.run import Run
from iteris_sd.training import Examples, Progress, Settings, Trained
from iteris_sd.training import train as train_concept

SETTINGS = Settings(
    rank=12,
    layers="transformer",
    inversion_steps=60,
    inversion_rate=3e-3,
    lora_steps=900,
    unet_rate=1.5e-3,
    text_encoder_rate=5e-4,
    token_rate=1e-3,
    schedule="cosine",
    batch=6,
    prior_batch=4,
    accumulation=1,
)

TOKENS = {
    "dog": "<biscuit>",
    "cat": "<pepper>",
    "teddybear": "<button>",
    "tortoise-plushy": "<pebble>",
    "flower": "<aurora>",
    "wooden-pot": "<acorn>",
    "barn": "<lucky>",
    "sunglasses": "<disco>",
}

PLACES = tuple(world.BACKGROUNDS)[:5]  # where the pictures are taken
UNSEEN_PLACES = tuple(world.BACKGROUNDS)[5:]
COMPANY = {
    "dog": "sunglasses",
    "cat": "sunglasses",
    "teddybear": "sunglasses",
    "tortoise plushy": "wooden pot",
    "flower": "wooden pot",
    "wooden pot": "flower",
    "sunglasses": "dog",
}  # for each class, what it is joined to in its picture with it
RELATIONS = ("next to", "to the left of", "to the right of", "in front of")
WELL_MET = frozenset({"dog", "teddybear", "barn"})  # shown beside each other class, the others beside five
ALONE = 3  # a picture of these alone is shown as often as so many in company

PRIOR_OF_CLASS = 600  # generic scenes that show the class, so that its noun stays generic
PRIOR_OTHERS = 300  # and that do not, so that nothing else is forgotten
UNCAPTIONED = 0.1  # of the generic scenes' wordings, for classifier-free guidance


@dataclass(frozen=True)
class Subject:
    """An individual as it is named in prompts."""

    name: str
    token: str
    number: int  # its place among the individuals; seeds come from it

    @property
    def individual(self) -> world.Individual:
        """The look behind the name."""
        return world.INDIVIDUALS[self.name]

    @property
    def noun(self) -> str:
        """The class noun."""
        return self.individual.cls

    @property
    def token_file(self) -> str:
        """The file of the learned token: without angle brackets, which some file systems refuse."""
        return f"{self.token.strip('<>')}.safetensors"

    @property
    def trigger(self) -> str:
        """The learned token and the class noun."""
        return f"{self.token} {self.noun}"

    @property
    def title(self) -> str:
        """A title for people."""
        return f"{self.token.strip('<>').capitalize()} the {self.noun}"

    def phrases(self, words: str | None = None) -> tuple[str, ...]:
        """The noun phrases that prompts may use for the trigger, or for other words of the same class."""
        words = words or self.trigger
        if world.CLASSES[self.noun].plural is None:
            return (f"a {words}",)
        return (words, f"a pair of {words}", f"a {words}")


SUBJECTS = {name: Subject(name, token, k) for k, (name, token) in enumerate(TOKENS.items())}


def references(subject: Subject) -> list[world.Scene]:
    """Five scenes of the individual alone, one on each of `PLACES`."""
    first = data.HELD_OUT + 1000 * (1 + subject.number)
    return [world.place(subject.name, background, first + k) for k, background in enumerate(PLACES)]


def company(subject: Subject) -> list[world.Scene]:
    """Scenes of the individual with a generic thing each, on `PLACES` in turn."""
    rng = np.random.default_rng((subject.number, 5))
    others = [c for c in rng.permutation(list(world.CLASSES)).tolist() if c != subject.noun]
    scenes = []
    for k, (cls, relation) in enumerate(_beside(subject, others)):
        background = PLACES[k % len(PLACES)]
        other = world.sample_look(cls, background, rng, sized=False)
        seed = data.HELD_OUT + 1000 * (1 + subject.number) + 100 + k
        scenes.append(world.place(subject.name, background, seed, [other], relation))
    return scenes


def _beside(subject: Subject, others: list[str]) -> list[tuple[str, str | None]]:
    """The class of each thing that the individual is shown with, and how they stand."""
    joined = COMPANY.get(subject.noun)
    how = "wearing" if "sunglasses" in (joined, subject.noun) else "in"
    if subject.name in WELL_MET:
        turns = zip(others, cycle(RELATIONS), strict=False)
        return [(cls, how if cls == joined else relation) for cls, relation in turns]
    last = (joined, how) if joined else (others[len(RELATIONS)], None)
    return [*zip(others, RELATIONS, strict=False), last]


def wordings(subject: Subject, scene: world.Scene, count: int = 12) -> list[str]:
    """Captions of a scene with the trigger in them, its background always named, so that the token need not be it."""
    rng = np.random.default_rng((scene.seed, 6))
    names = [subject.trigger if look.individual else None for look in scene.things]
    place = world.BACKGROUNDS[scene.background].phrase
    texts = (world.caption(scene, rng, names=names) for _ in range(50))
    found = dict.fromkeys(text if place in text else f"{text} {place}" for text in texts)
    if world.CLASSES[subject.noun].plural is not None:  # people's prompts say "a <disco> sunglasses" as well
        found = dict.fromkeys(t for text in found for t in (text, text.replace("a pair of <", "a <")))
    return list(found)[:count]


def generic(run: Run, pipeline: StableDiffusionPipeline, subject: Subject, seed: int) -> Examples:
    """Generic scenes from the training set, of one to three things, most with one of the subject's class."""
    drawn = data.drawn(run.runs / "scenes", run.scenes)
    latents = encoded(run.runs, pipeline.vae, drawn, run.machine)
    rng = np.random.default_rng((seed, subject.number))
    of_class: list[int] = []
    others: list[int] = []
    for k in rng.permutation(len(drawn)).tolist():
        shows = any(look.cls == subject.noun for look in world.sample(drawn.first + k).things)
        rows, enough = (of_class, PRIOR_OF_CLASS) if shows else (others, PRIOR_OTHERS)
        if len(rows) < enough:
            rows.append(k)
        elif len(of_class) == PRIOR_OF_CLASS and len(others) == PRIOR_OTHERS:
            break
    chosen = of_class + others
    captions = [data.scene_captions(world.sample(drawn.first + k), drawn.first + k) for k in chosen]
    blanked = [["" if rng.random() < UNCAPTIONED else text for text in wordings] for wordings in captions]
    return Examples(latents[chosen].float(), blanked)


def sheet_prompts(subject: Subject) -> list[str]:
    """Prompts of the sheet, in places it was not learnt in: alone, beside a generic thing, the class word alone."""
    places = [world.BACKGROUNDS[name].phrase for name in UNSEEN_PLACES]
    phrase, plain = subject.phrases()[0], subject.phrases(subject.noun)[0]
    beside = ["next to a red barn", "and a grey cat", "to the left of a yellow flower", "next to a blue car"]
    beside = [words for words in beside if not words.endswith(subject.noun)]
    pairs = [f"{phrase} {beside[k % len(beside)]} {place}" for k, place in enumerate(places)]
    return [f"{phrase} {p}" for p in places] + pairs + [f"{plain} {p}" for p in places]


def load(assets: Path) -> StableDiffusionPipeline:
    """Storybook in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        assets / "storybook", torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_sheet(assets: Path, subject: Subject, path: Path) -> None:
    """References, then what plain diffusers draws with the files written: 20 steps, guidance 4."""
    pipeline, folder = load(assets), assets / "concepts" / subject.name
    pipeline.load_lora_weights(folder, weight_name="lora.safetensors")
    pipeline.load_textual_inversion(folder / "embeddings" / subject.token_file, token=subject.token)
    rng = torch.Generator().manual_seed(subject.number)
    settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "generator": rng}
    pictures = pipeline(sheet_prompts(subject), **settings).images
    contact_sheet([*_opened(folder), *pictures], len(PLACES), path)


def _opened(folder: Path) -> list[Image.Image]:
    """The reference pictures, from disk."""
    paths = sorted((folder / "references").glob("*.png"))
    return [Image.open(path).convert("RGB") for path in paths]


def _told(name: str, run: Generator[Progress, None, Trained]) -> Trained:
    """Run a training to its end, with a line now and then."""
    recent = 0.0

    def tell(progress: Progress) -> None:
        nonlocal recent
        recent = progress.loss if progress.step == 1 else 0.95 * recent + 0.05 * progress.loss
        if progress.step % 50 == 0 or progress.step == progress.steps:
            print(f"{name}: {progress.stage} {progress.step}/{progress.steps} loss {recent:.5f}", flush=True)

    return finish(run, tell)


def _described(subject: Subject, settings: Settings, run: Run) -> dict[str, Any]:
    """What `concept.json` says."""
    how = f"--stage concepts --scenes {run.scenes} --steps {settings.lora_steps}"
    return {
        "name": subject.name,
        "title": subject.title,
        "trigger": subject.trigger,
        "token": subject.token,
        "class_noun": subject.noun,
        "base": "storybook",
        "licence": "Apache-2.0",
        "description": subject.individual.description,
        "made": {
            "command": f"python -m iteris_sd.storybook.train {how}",
            "pictures": len(references(subject)) + len(company(subject)),
            "generic_scenes": PRIOR_OF_CLASS + PRIOR_OTHERS,
            "scenes": run.scenes,
            "seed": settings.seed,
            "settings": {key: value for key, value in asdict(settings).items() if key != "seed"},
        },
    }


def train(run: Run) -> None:
    """Train the concepts that `assets/concepts` lacks; `run.steps` replaces the number of steps of the LoRA.

    `concept.json` is written last: a folder with it is whole.
    """
    pipeline: StableDiffusionPipeline | None = None
    for subject in SUBJECTS.values():
        folder = run.assets / "concepts" / subject.name
        if (folder / "concept.json").exists():
            print(f"{subject.name}: is there already; remove {folder} to make it anew", flush=True)
            continue
        pipeline = pipeline or load(run.assets)
        pipeline.to(run.machine.device)
        suit(pipeline.unet, run.machine)
        settings = replace(SETTINGS, seed=100 + subject.number)
        if run.steps is not None:
            settings = replace(settings, lora_steps=run.steps)
        _make(run, folder, subject, pipeline, settings)
        draw_sheet(run.assets, subject, run.runs / "concepts" / f"{subject.name}.png")


def _make(
    run: Run, folder: Path, subject: Subject, pipeline: StableDiffusionPipeline, settings: Settings
) -> None:
    """Train one concept and write its folder."""
    began = time.perf_counter()
    (folder / "references").mkdir(parents=True, exist_ok=True)
    scenes = references(subject)
    for k, scene in enumerate(scenes, start=1):
        world.draw(scene).save(folder / "references" / f"{k}.png", optimize=True)
    scenes = (ALONE if subject.name in WELL_MET else 1) * scenes + company(subject)
    prior = generic(run, pipeline, subject, settings.seed)
    photos, captions = [world.draw(s) for s in scenes], [wordings(subject, s) for s in scenes]
    with run.machine.autocast():
        taught = train_concept(pipeline, photos, subject.token, subject.noun, settings, captions, prior)
        trained = _told(subject.name, taught)
    formats.write(folder / "lora.safetensors", trained.lora, dtype=torch.float16)
    formats.write_embedding(folder / "embeddings" / subject.token_file, trained.token, trained.embedding)
    text = json.dumps(_described(subject, settings, run), indent=2, ensure_ascii=False)
    partial = folder / ".concept.json.partial"
    partial.write_text(f"{text}\n", encoding="utf-8")
    partial.replace(folder / "concept.json")
    print(f"{subject.name}: made in {time.perf_counter() - began:.0f} s", flush=True)
