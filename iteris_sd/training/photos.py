"""Photos of a concept: read from a folder, cut square, and encoded to latents once.

| symbol  | shape        | meaning                                     |
|---------|--------------|---------------------------------------------|
| pixels  | (n, 3, s, s) | photos in [-1, 1]                           |
| latents | (n, c, h, w) | the autoencoder's means, scaled for the U-Net |
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from iteris_sd import limits
from iteris_sd.concepts import PICTURES, open_picture
from iteris_sd.errors import UserError
from iteris_sd.files import visible


def read_photos(folder: str | Path) -> list[Image.Image]:
    """All photos of a folder, by name, upright and in RGB.

    Raises UserError when there is no such folder, no photo or too many in it, or one cannot be opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder with the concept's photos.")
    paths = sorted(path for path in visible(folder.iterdir()) if path.suffix.lower() in PICTURES)
    if not 1 <= len(paths) <= limits.MAX_PHOTOS:
        raise UserError(
            f"{folder.name} holds {len(paths)} photos ({', '.join(PICTURES)}); "
            f"from 1 to {limits.MAX_PHOTOS} are needed."
        )
    return [open_picture(path) for path in paths]


def to_pixels(photo: Image.Image, size: int) -> Tensor:
    """The photo's middle square as (3, size, size) in [-1, 1]."""
    square = ImageOps.fit(photo.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return pil_to_tensor(square).float().div(127.5).sub(1.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, photos: Sequence[Image.Image], size: int) -> Tensor:
    """Latents of the photos, (n, c, h, w), on the autoencoder's device."""
    pixels = [to_pixels(photo, size).to(vae.device, vae.dtype)[None] for photo in photos]
    means = torch.cat([vae.encode(one).latent_dist.mean for one in pixels])
    shift = vae.config.get("shift_factor") or 0.0
    return (means - shift) * vae.config.scaling_factor
