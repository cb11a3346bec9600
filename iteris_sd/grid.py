"""The grid: one row per seed, one column per method, every picture with its scores under it.

A sheet is put together from blocks: texts and pictures of a given width, set beside and below each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageDraw, ImageFont

from iteris_sd import bases
from iteris_sd.recipe import title

if TYPE_CHECKING:
    from iteris_sd.events import Composition, Picture

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL = 256  # pixels: smaller pictures are enlarged, by a whole factor, to about this side
GAP = 12
MARGIN = 20
FLAGGED = "blanked: safety checker, or numbers overflowed"
INK, FAINT, PAPER = "#1d1f24", "#5c6370", "#ffffff"
HEADING, CAPTION = 17, 13  # font sizes in pixels


def grid(composition: Composition) -> Image.Image:
    """All pictures of a composition on one sheet, in the order of its recipe; a missing one stays blank."""
    recipe = composition.recipe
    side = max((picture.image.width for picture in composition.pictures), default=CELL)
    width = side * max(1, round(CELL / side))
    label = max(_length(_label(seed), CAPTION) for seed in recipe.seeds)
    blank = Image.new("RGB", (label, 1), PAPER)
    headings = [_text([title(column)], HEADING, width, INK) for column in recipe.columns]
    rows = [_beside([blank, *headings])]
    for seed in recipe.seeds:
        cells = [_cell(composition.picture(column, seed), width) for column in recipe.columns]
        rows.append(_beside([_text([_label(seed)], CAPTION, label, FAINT), *cells]))
    across = rows[0].width
    prompt = _text(recipe.prompt.split(), HEADING, across, INK)
    note = _text(_note(composition).split(), CAPTION, across, FAINT)
    return _framed(_below([prompt, *rows, note]))


def _label(seed: int) -> str:
    return f"seed {seed}"


def _note(composition: Composition) -> str:
    recipe = composition.recipe
    places = [f"{{{k}}} = {one.concept.trigger}" for k, one in enumerate(composition.concepts)]
    drawn = f"{recipe.sampler}, {recipe.steps} steps, guidance {recipe.guidance:g}"
    drawn += "" if recipe.strength == 1 else f", strength {recipe.strength:g}"
    model = bases.called(recipe.base)
    return f"{', '.join(places)}. {model}, {drawn}. Text and image alignment by {composition.scorer}."


def _cell(picture: Picture | None, width: int) -> Image.Image:
    """A picture enlarged to `width`, its scores under it."""
    if picture is None:
        return Image.new("RGB", (width, width), PAPER)
    height = round(width * picture.image.height / picture.image.width)
    enlarged = picture.image.resize((width, height), Image.Resampling.LANCZOS)
    scores = {"text": picture.score.text, **picture.score.images}
    caption = [f"{name} {value:z.2f}" for name, value in scores.items() if value is not None]
    caption += [FLAGGED] if picture.flagged else []
    return _below([enlarged, _text(caption, CAPTION, width, FAINT, between="   ")], gap=GAP // 3)


@lru_cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _length(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1


def _text(pieces: Sequence[str], size: int, width: int, ink: str, between: str = " ") -> Image.Image:
    """Text in lines of at most `width` pixels, broken between its pieces; a longer piece is cut off."""
    lines: list[str] = []
    for piece in (_fitting(piece, size, width) for piece in pieces):
        if lines and _length(lines[-1] + between + piece, size) <= width:
            lines[-1] += between + piece
        else:
            lines.append(piece)
    step = round(1.4 * size)
    block = Image.new("RGB", (width, step * max(1, len(lines))), PAPER)
    draw = ImageDraw.Draw(block)
    for k, line in enumerate(lines):
        draw.text((0, k * step), line, ink, _font(size))
    return block


def _fitting(piece: str, size: int, width: int) -> str:
    """The piece, its end replaced by an ellipsis where it is longer than `width` pixels."""
    if _length(piece, size) <= width:
        return piece
    kept = piece
    while kept and _length(kept + "…", size) > width:
        kept = kept[:-1]
    return kept + "…"


def _beside(blocks: Sequence[Image.Image]) -> Image.Image:
    return _set(blocks, "x", GAP)


def _below(blocks: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    return _set(blocks, "y", gap)


def _set(blocks: Sequence[Image.Image], axis: Literal["x", "y"], gap: int) -> Image.Image:
    """The blocks in a row or a column, aligned at the left and the top."""
    along, across = (0, 1) if axis == "x" else (1, 0)
    size = [0, 0]
    size[along] = sum(block.size[along] for block in blocks) + gap * (len(blocks) - 1)
    size[across] = max(block.size[across] for block in blocks)
    sheet, at = Image.new("RGB", (size[0], size[1]), PAPER), 0
    for block in blocks:
        sheet.paste(block, (at, 0) if axis == "x" else (0, at))
        at += block.size[along] + gap
    return sheet


def _framed(sheet: Image.Image) -> Image.Image:
    framed = Image.new("RGB", (sheet.width + 2 * MARGIN, sheet.height + 2 * MARGIN), PAPER)
    framed.paste(sheet, (MARGIN, MARGIN))
    return framed
