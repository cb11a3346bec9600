"""Pictures to tensors and back, and contact sheets of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_image(tensor: Tensor) -> Image.Image:
    """(3, h, w) in [-1, 1] to a picture."""
    return Image.fromarray(to_uint8(tensor).permute(1, 2, 0).cpu().numpy())


def to_uint8(tensor: Tensor) -> Tensor:
    """Values in [-1, 1] to 0 … 255."""
    return tensor.clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)


def contact_sheet(pictures: Sequence[Image.Image], columns: int, path: Path) -> None:
    """Paste equally large pictures into one, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * width, k // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def disturbed(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Light, tint, softness and grain of (n, 3, h, w) changed a little, as generated pictures differ from drawn."""
    n, side = len(pixels), int(torch.randint(32, 84, (), generator=rng))
    gain = 1 + 0.1 * torch.randn(n, 1, 1, 1, generator=rng)
    pixels = pixels * gain + 0.05 * torch.randn(n, 3, 1, 1, generator=rng)
    soft = torch.rand(n, generator=rng) < 0.4
    if soft.any():
        small = F.interpolate(pixels[soft], size=side, mode="bilinear", antialias=True)
        pixels[soft] = F.interpolate(small, size=pixels.shape[-1], mode="bilinear")
    grain = 0.08 * torch.rand(n, 1, 1, 1, generator=rng)
    return pixels + grain * torch.randn(pixels.shape, generator=rng)
