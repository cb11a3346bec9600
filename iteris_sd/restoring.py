"""Recipes out of what people hand on: a link, a drawn picture, a file. All of it comes from strangers.

A link's text is a letter and base64url of zlib of JSON. The JSON leaves out values that are defaults, so a link that
was made before a default changes would mean something else after it: then the letter must change, too.
"""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe

_LETTER = "a"
_QUERY = re.compile(r"[A-Za-z0-9_-]+")
_PNG = b"\x89PNG\r\n\x1a\n"
_ENTRY = "iteris_sd"  # the text entry that `export.picture_png` writes


def to_query(recipe: Recipe) -> str:
    """The recipe as short text of letters, digits, `-` and `_`, for a link. Raises UserError when it is too long."""
    said = recipe.model_dump(exclude_defaults=True)
    packed = zlib.compress(_compact(said), level=9)
    text = _LETTER + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    if len(text) > limits.MAX_QUERY_CHARS:
        raise UserError(
            f"The recipe takes {len(text)} characters, and a link holds {limits.MAX_QUERY_CHARS}; hand it on as a file."
        )
    return text


def from_query(text: str) -> Recipe:
    """The recipe in a text of `to_query`. Raises UserError when it is none, or asks for what is not there."""
    if len(text) > limits.MAX_QUERY_CHARS:
        raise UserError(
            f"The link has {len(text)} characters; one with a recipe has at most {limits.MAX_QUERY_CHARS}."
        )
    if not _QUERY.fullmatch(text):
        raise UserError("The link holds no recipe; copy it again, from its beginning to its end.")
    if text[0] != _LETTER:
        raise UserError(
            f"The link's recipe begins with {text[0]!r}, where {_LETTER!r} is expected; it was made by another version "
            "of this program, or is not whole."
        )
    return _recipe(_data(_inflated(text[1:]), "The link"))


def from_picture(path: Path) -> Recipe:
    """The recipe that a drawn PNG carries; no pixel is decoded.

    Raises UserError when it cannot be read, is no PNG, one without a recipe, or with a broken one.
    """
    content = _read(path)
    if not content.startswith(_PNG):
        raise UserError(f"{path.name} is no PNG; choose a picture as it was saved here.")
    return _drawn(content, path.name)


def from_file(path: Path) -> Recipe:
    """The recipe in a drawn PNG, or in a recipe.json. Raises UserError when the file is neither, as `from_picture`."""
    content = _read(path)
    if content.startswith(_PNG):
        return _drawn(content, path.name)
    if not content[:512].lstrip().startswith(b"{"):
        raise UserError(
            f"{path.name} is neither a PNG nor a recipe.json; choose a picture that was drawn here, or a recipe."
        )
    return _recipe(_data(content, path.name))


def _read(path: Path) -> bytes:
    """A file's bytes, if they are not too many for a picture."""
    most = limits.MAX_DRAWN_BYTES
    try:
        if not path.is_file():
            raise UserError(f"There is no file {path.name}; choose another one.")
        if (size := path.stat().st_size) > most:
            raise UserError(f"{path.name} has {size:,} bytes; a drawn picture has at most {most:,}.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror or error}).") from error


def _drawn(png: bytes, name: str) -> Recipe:
    """The recipe in a PNG that was drawn here; `name` begins a complaint."""
    entries = _text_entries(png, name)
    if _ENTRY not in entries:
        found = "A1111's parameters, but no recipe" if "parameters" in entries else "no recipe"
        raise UserError(
            f"{name} carries {found}; choose a single picture that was drawn here and not saved again by another "
            "program."
        )
    facts = _data(entries[_ENTRY].encode("utf-8", "replace"), name)
    if not isinstance(facts.get("recipe"), dict):
        raise UserError(f"{name} carries a broken recipe; choose another picture of the same composition.")
    return _recipe(facts["recipe"])


def _text_entries(png: bytes, name: str) -> dict[str, str]:
    """The text entries that stand before a PNG's pixels; Pillow bounds what compressed ones unpack to."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            return {str(key): value for key, value in picture.info.items() if isinstance(value, str)}
    except Exception as error:  # a decoder that meets a broken file fails in ways of its own
        raise UserError(f"{name} is a damaged PNG; choose another picture.") from error


def _inflated(text: str) -> bytes:
    """The bytes in a link's text, and no more of them than a recipe has."""
    unpack = zlib.decompressobj()
    try:
        packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        content = unpack.decompress(packed, limits.MAX_RECIPE_BYTES + 1)
    except (ValueError, zlib.error) as error:
        raise UserError("The link's recipe is damaged; copy the whole link again.") from error
    if len(content) > limits.MAX_RECIPE_BYTES:
        raise UserError(
            f"The link unpacks to more than a recipe's {limits.MAX_RECIPE_BYTES} bytes; do not trust it."
        )
    if not unpack.eof or unpack.unused_data:
        raise UserError("The link's recipe is not whole; copy the whole link again.")
    return content


def _data(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `content`; `where` it was found begins a complaint."""
    most = limits.MAX_RECIPE_BYTES
    if len(content) > most:
        raise UserError(
            f"{where} is too large to hold a recipe: {len(content):,} bytes, and {most:,} at most."
        )
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} carries a broken recipe: it is not valid JSON.") from error
    if not isinstance(data, dict):
        raise UserError(f"{where} carries no recipe: a JSON object is expected, found {type(data).__name__}.")
    return data


def _recipe(data: Mapping[str, Any]) -> Recipe:
    """The recipe of plain values that a stranger, or another version of this program, has written."""
    fields, version = Recipe.model_fields, data.get("version")
    newest = fields["version"].default
    if isinstance(version, int) and version > newest:
        raise UserError(
            f"The recipe is of version {str(version)[:9]}, and this program knows {newest}; update it."
        )
    if unknown := [name for name in data if name not in fields]:
        raise UserError(
            f"The recipe speaks of {unknown[0][:40]!r}, which is not known here; it may need a newer version of this "
            "program."
        )
    try:
        _compact(data)
        return Recipe.of(data)
    except UserError as error:
        told, most = str(error), limits.MAX_TOLD_CHARS
        raise UserError(told if len(told) <= most else f"{told[:most]}…") from error
    except (RecursionError, OverflowError) as error:
        raise UserError("The recipe holds a value that is too large, or nested too deeply.") from error


def _compact(data: Mapping[str, Any]) -> bytes:
    """Plain values as the shortest JSON."""
    try:
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:  # half of a pair of UTF-16, which no file or link can hold
        raise UserError("The recipe holds a broken character; write its prompts and names again.") from error
