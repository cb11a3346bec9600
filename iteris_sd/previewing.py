"""What a picture looks like while it is still being drawn: cheap and rough.

Where the decoder is cheap, on a GPU or for small pictures, it decodes what the finished latents are taken to be by now.
Elsewhere a linear map from a latent's four channels to red, green and blue stands in for it, fitted by least squares on
the last picture that was finished: before the first, there is nothing to show.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from iteris_sd import memory, rendering
from iteris_sd.backbone import Backbone

EVERY = 0.4  # seconds between two looks
SHARE = 10  # a look may take one part in so many of the time, so that drawing is not slowed much
SIDE = 256  # pixels of a preview at most
_CHEAP = 256  # latent pixels that a CPU decodes in a moment: those of Storybook


class Previewer:
    """Looks at latents now and then. Where a safety checker is on it shows nothing, since nothing has been checked."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._map: Tensor | None = None  # (channels + 1, 3)
        self._next = 0.0  # when to look again
        self._blind = backbone.pipeline.safety_checker is not None

    def look(self, latents: Tensor) -> tuple[Image.Image, ...]:
        """Previews of latents (n, c, h, w), or none when it is too early for the next."""
        since = time.monotonic()
        if self._blind or since < self._next:
            return ()
        try:
            seen = self._seen(latents)
            self._next = time.monotonic() + max(EVERY, SHARE * (time.monotonic() - since))
            return seen
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            self._blind = True  # a picture matters more than its preview
            return ()

    def _seen(self, latents: Tensor) -> tuple[Image.Image, ...]:
        waits = memory.waits(self._backbone.vae)  # in main memory, while the U-Net is on the GPU
        on_gpu = self._backbone.device.type != "cpu" and not waits
        if on_gpu or latents.shape[-2:].numel() <= _CHEAP:
            return tuple(_small(drawn.image) for drawn in rendering.decode(self._backbone, latents))
        if self._map is None:
            return ()
        places = torch.nn.functional.pad(latents.float().movedim(1, -1), (0, 1), value=1.0)
        pixels = (places @ self._map).clamp(0, 255).byte().cpu().numpy()
        return tuple(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in pixels)

    def learn(self, drawn: Sequence[rendering.Drawn]) -> None:
        """Fit the linear map on a finished picture and the latents it was decoded from."""
        fine = [one for one in drawn if not one.flagged]
        if self._blind or not fine:
            return
        latents = fine[-1].latents.float().cpu()
        _, height, width = latents.shape
        small = fine[-1].image.convert("RGB").resize((width, height), Image.Resampling.BOX)
        colours = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(-1, 3).float()
        places = torch.nn.functional.pad(latents.flatten(1).T, (0, 1), value=1.0)
        self._map = torch.linalg.lstsq(places, colours, driver="gelsd").solution.to(fine[-1].latents.device)


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((SIDE, SIDE))
    return picture
