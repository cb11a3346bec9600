"""Small pictures inside the page itself."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from iteris_sd.concepts import open_picture
from iteris_sd.errors import UserError


def data_uri(picture: Image.Image) -> str:
    """A picture as a WebP data URI."""
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


@lru_cache(maxsize=256)
def thumbnail(path: Path, changed: int, side: int) -> str:
    """A small square copy of a picture as a data URI; made anew when the file was `changed` (nanoseconds).

    Raises OSError when it is too large, or no picture of a kind that a concept has.
    """
    try:
        picture = open_picture(path)
    except UserError as error:
        raise OSError(str(error)) from error
    return data_uri(picture.resize((side, side), Image.Resampling.LANCZOS))
