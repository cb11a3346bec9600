"""The concept picker: a card for each concept, with its picture; the order of picking numbers the places."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from iteris_sd import limits
from iteris_sd.concepts import Concept

_SIDE = 112  # of a thumbnail in pixels

_SCRIPT = Path(__file__).with_name("picker.js")


def picker(concepts: Iterable[Concept], picked: Sequence[str]) -> gr.HTML:
    """The widget; its value is the list of picked names, in the order of picking."""
    return gr.HTML(
        value=list(picked),
        choices=choices(concepts),
        most=limits.MAX_CONCEPTS,
        html_template='<div class="picker" role="group" aria-label="Concepts"></div>',
        js_on_load=_SCRIPT.read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="picker",
        label="Concepts",
    )


def choices(concepts: Iterable[Concept]) -> list[dict[str, Any]]:
    """What the cards show, as plain values."""
    return [
        {
            "name": concept.name,
            "title": concept.title,
            "trigger": concept.trigger,
            "noun": concept.class_noun,
            "description": concept.description,
            "picture": _picture(concept),
        }
        for concept in concepts
    ]


def _picture(concept: Concept) -> str:
    """The first reference picture that can be opened, small; nothing where there is none."""
    for path in concept.references:
        try:
            return _thumbnail(path, path.stat().st_mtime_ns)
        except OSError:
            continue
    return ""


@lru_cache(maxsize=256)
def _thumbnail(path: Path, changed: int) -> str:
    """A small copy of a picture, as a data URI; made anew when the file was `changed` (nanoseconds)."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
