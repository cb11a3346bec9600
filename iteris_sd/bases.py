"""Which base models there are, as data: where their weights are, how large their pictures, who scores them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iteris_sd.errors import UserError

ASSETS = Path(__file__).resolve().parents[1] / "assets"


@dataclass(frozen=True)
class Base:
    """A base model.

    `size`: side of its pictures in pixels. `scorer`: the name `scoring.load` knows. `steps`, `guidance`: defaults
    that suit it. `objects`, `places`: generic things and places it can draw, for calibration prompts.
    `architecture`, `prediction` (epsilon or v), `kohya_version`: what LoRA files made for it say to other tools.
    """

    name: str
    title: str
    description: str
    source: str
    size: int
    scorer: str
    steps: int
    guidance: float
    objects: tuple[str, ...]
    places: tuple[str, ...]
    architecture: str
    prediction: str
    kohya_version: str


BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            name="storybook",
            title="Storybook",
            description="The small model that ships with this project: a drawn world in 128 px, on any machine.",
            source=str(ASSETS / "storybook"),
            size=128,
            scorer="storybook",
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
    )
}


def find(name: str) -> Base:
    """The base called `name`. Raises UserError when there is none."""
    if name not in BASES:
        raise UserError(f"There is no base model {name!r}; choose one of {', '.join(BASES)}.")
    return BASES[name]
