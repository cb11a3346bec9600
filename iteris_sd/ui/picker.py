"""The concept picker: a gallery of cards, and for each picked concept how it is used.

The order of picking numbers the places of the prompt. What the browser sends is a list of plain values, which may be
anything: `read` takes what makes sense.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from iteris_sd import limits
from iteris_sd.concepts import Concept, Library
from iteris_sd.recipe import Blocks, ConceptUse
from iteris_sd.ui.inline import thumbnail

_SIDE = 112  # of a thumbnail in pixels
_SCRIPT = Path(__file__).with_name("picker.js")
BLOCKS = {"text_encoder": "Text encoder", "down": "U-Net, down", "mid": "U-Net, middle", "up": "U-Net, up"}


@dataclass(frozen=True)
class Use:
    """A picked concept; where it is not `on` it stays picked, and the prompt says its class noun instead."""

    name: str
    on: bool = True
    weight: float = 1.0
    blocks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BLOCKS, 1.0))

    def plain(self) -> dict[str, Any]:
        """As the browser has it."""
        return asdict(self)


def picker(concepts: Iterable[Concept], picked: Sequence[Use]) -> gr.HTML:
    """The widget; its value is the list of uses in the order of picking, as plain values."""
    return gr.HTML(
        value=[use.plain() for use in picked],
        choices=choices(concepts),
        most=limits.MAX_CONCEPTS,
        heaviest=limits.MAX_WEIGHT,
        blocks=BLOCKS,
        html_template='<div class="picker"></div>',
        js_on_load=_SCRIPT.read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="picker",
        label="Concepts",
    )


def of_names(names: Sequence[str], library: Library) -> list[Use]:
    """Concepts as they are used unless told."""
    return [Use(name, weight=library.concepts[name].weight) for name in names if name in library.concepts]


def of_recipe(uses: Sequence[ConceptUse], library: Library) -> list[Use]:
    """Concepts as a recipe uses them, those that there are."""
    return [Use(u.name, True, u.weight, dict(u.blocks)) for u in uses if u.name in library.concepts]


def read(value: Any, library: Library) -> list[Use]:
    """What a browser sends, as far as it speaks of concepts that there are; numbers are checked by the recipe."""
    found: dict[str, Use] = {}
    for one in value if isinstance(value, list) else []:
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or name not in library.concepts:
            continue
        sent = one.get("blocks")
        blocks = {block: sent.get(block, 1.0) for block in BLOCKS} if isinstance(sent, dict) else {}
        weight = one.get("weight", library.concepts[name].weight)
        found[name] = Use(name, one.get("on") is not False, weight, blocks or dict.fromkeys(BLOCKS, 1.0))
    return list(found.values())[: limits.MAX_CONCEPTS]


def asked(use: Use) -> dict[str, Any]:
    """A use as a recipe has it."""
    plain: dict[str, Any] = {"name": use.name, "weight": use.weight}
    return plain if use.blocks == dict(Blocks()) else {**plain, "blocks": use.blocks}


def choices(concepts: Iterable[Concept]) -> list[dict[str, Any]]:
    """What the cards show, as plain values."""
    return [
        {
            "name": concept.name,
            "title": concept.title,
            "trigger": concept.trigger,
            "noun": concept.class_noun,
            "description": concept.description,
            "weight": concept.weight,
            "picture": picture(concept),
        }
        for concept in concepts
    ]


def picture(concept: Concept) -> str:
    """The first reference picture that can be opened, small; nothing where there is none."""
    for path in concept.references:
        try:
            return thumbnail(path, path.stat().st_mtime_ns, _SIDE)
        except OSError:
            continue
    return ""
