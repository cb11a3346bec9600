"""Which base models there are, as data: where their weights are, how large their pictures, who scores them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iteris_sd.errors import UserError

TEXT_WIDTHS = {768: "sd15", 128: "storybook"}  # width of the text states -> family, which it tells apart
STRANGERS = {
    1024: "Stable Diffusion 2",
    2048: "Stable Diffusion XL",
    4096: "a model with a T5 text encoder",
}  # families of other models, by the same width
ASSETS = Path(__file__).resolve().parents[1] / "assets"


@dataclass(frozen=True)
class Base:
    """A base model.

    `source`: a diffusers folder, a single-file checkpoint, or an id on the Hugging Face Hub; `download`: in the last
    case, about how much, for people. `family`: which concepts suit it; those say the same as their base. `size`: side
    of its pictures in pixels. `scorer`: the name `scoring.load` knows. `sampler`, `steps`, `guidance`: defaults that
    suit it. `objects`, `places`: generic things and places it can draw, for calibration prompts.
    `architecture`, `prediction` (epsilon or v), `kohya_version`: what LoRA files made for it say to other tools.
    """

    name: str
    title: str
    description: str
    source: str
    download: str
    family: str
    size: int
    scorer: str
    sampler: str
    steps: int
    guidance: float
    objects: tuple[str, ...]
    places: tuple[str, ...]
    architecture: str
    prediction: str
    kohya_version: str

    @property
    def drawing(self) -> dict[str, Any]:
        """How it draws where nothing is said, as values of a recipe."""
        return {"sampler": self.sampler, "steps": self.steps, "guidance": self.guidance}


BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            name="storybook",
            title="Storybook",
            description="The small model that ships with this project: a drawn world in 128 px, on any machine.",
            source=str(ASSETS / "storybook"),
            download="",
            family="storybook",
            size=128,
            scorer="storybook",
            sampler="ddim",
            steps=20,
            guidance=4.0,
            objects=(
                "red barn",
                "grey cat",
                "blue car",
                "yellow flower",
                "brown dog",
                "green umbrella",
                "white rabbit",
                "brown wooden pot",
                "blue teddybear",
                "red chair",
                "green tortoise plushy",
                "yellow duck",
                "purple mushroom",
                "pair of black sunglasses",
                "brown owl",
                "white teapot",
            ),
            places=(
                "on the beach",
                "in a meadow",
                "in the snow",
                "in a living room",
                "in the mountains",
                "in the forest",
                "in the desert",
                "in the city",
                "in a kitchen",
                "by a lake",
            ),
            architecture="storybook",
            prediction="v",
            kohya_version="storybook",
        ),
        Base(
            name="sd15",
            title="Stable Diffusion v1.5",
            description="The model that most LoRAs of one dog, one barn, one pair of sunglasses were made for: 512 px.",
            source="stable-diffusion-v1-5/stable-diffusion-v1-5",
            download="2.7 GB",
            family="sd15",
            size=512,
            scorer="vit-l-14",
            sampler="dpm++",
            steps=25,
            guidance=7.5,
            objects=(
                "red barn",
                "grey cat",
                "brown dog",
                "blue car",
                "vase of flowers",
                "wooden chair",
                "white horse",
                "yellow bicycle",
                "coffee mug",
                "green umbrella",
                "pair of boots",
                "teddy bear",
                "potted plant",
                "brass lamp",
                "pair of sunglasses",
                "stack of books",
            ),
            places=(
                "on the beach",
                "in the snow",
                "in the jungle",
                "in a living room",
                "in a city street",
                "in a garden",
                "on a wooden floor",
                "in the mountains",
                "by a lake",
                "at night",
            ),
            architecture="stable-diffusion-v1",
            prediction="epsilon",
            kohya_version="sd_v1",
        ),
    )
}

ALLOWED: dict[str, str] = {
    "sd-legacy/stable-diffusion-v1-5": "Stable Diffusion v1.5 (a mirror)",
    "Lykon/dreamshaper-8": "DreamShaper 8",
    "Lykon/AbsoluteReality": "Absolute Reality",
    "SG161222/Realistic_Vision_V5.1_noVAE": "Realistic Vision 5.1",
}  # ids on the Hub whose weights were made from Stable Diffusion v1.5: LoRAs for that suit them


def find(name: str) -> Base:
    """The base called `name`, or that has this id on the Hub. Raises UserError when there is none."""
    if name in BASES:
        return BASES[name]
    known = next((base for base in BASES.values() if base.source == name), None)
    if known is not None:
        return known
    if name in ALLOWED:
        return like(
            BASES["sd15"], name=name, title=ALLOWED[name], source=name, download=BASES["sd15"].download
        )
    raise UserError(f"There is no base model {name!r}; choose one of {', '.join([*BASES, *ALLOWED])}.")


def called(base: str) -> str:
    """A base model's name in what is handed on; of one at a path its file's, since the path is nobody's matter."""
    return Path(base).name if Path(base).is_absolute() else base


def like(base: Base, *, name: str, title: str, source: str, download: str) -> Base:
    """Another model of the same family: its own weights, all else as `base` has it."""
    told = f"Of {base.title}'s family."
    return replace(base, name=name, title=title, source=source, download=download, description=told)


def everyone() -> list[Base]:
    """All base models that can be chosen."""
    return [*BASES.values(), *(find(name) for name in ALLOWED)]


def add(base: Base) -> None:
    """Make a base known for as long as this process lives, such as one that a terminal's user opened by its path."""
    BASES[base.name] = base
