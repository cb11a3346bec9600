"""Pictures to tensors and back, and contact sheets of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_image(tensor: Tensor) -> Image.Image:
    """(3, h, w) in [-1, 1] to a picture."""
    pixels = tensor.clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def contact_sheet(pictures: Sequence[Image.Image], columns: int, path: Path) -> None:
    """Paste equally large pictures into one, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * width, k // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
