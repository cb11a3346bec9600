"""DINO, a second image encoder beside CLIP, for pictures like photographs.

CLIP learnt from captions and sees first of all what kind of thing a picture shows; DINO (arXiv 2104.14294) learnt
without any and keeps apart individuals of one kind. Its cosines are DreamBooth's measure of subject fidelity, DINO-I
(arXiv 2208.12242): ViT-S/16, class token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from iteris_sd import hub
from iteris_sd.errors import UserError
from iteris_sd.generators import finish

if TYPE_CHECKING:
    from transformers import ViTImageProcessor, ViTModel

MODEL = "facebook/dino-vits16"  # on the Hub
TITLE = "DINO ViT-S/16 (224 px)"
FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
SWITCH = "ITERIS_SD_DINO"
_BATCH = 16  # pictures at once


@dataclass(frozen=True, eq=False)
class Dino:
    """A vision transformer and what prepares pictures for it, ready to embed."""

    model: ViTModel
    processor: ViTImageProcessor
    device: torch.device

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings of one picture or more, (n, d) float32 on the CPU: the class token's last state."""
        return torch.cat([self._embed(pictures[k : k + _BATCH]) for k in range(0, len(pictures), _BATCH)])

    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        prepared = self.processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")
        states = self.model(prepared["pixel_values"].to(self.device)).last_hidden_state
        return torch.nn.functional.normalize(states[:, 0].float(), dim=-1).cpu()


def load(device: torch.device, *, usual: bool) -> Dino | None:
    """DINO where it takes part, else None; `usual`: whether it does, unless told otherwise, when its weights are here.

    ITERIS_SD_DINO decides otherwise: "off" leaves it out, "on" takes it, and fetches what is not in the Hub's cache.
    Raises UserError for another word, when what was asked for cannot be had, and when what is here cannot be loaded.
    """
    told = os.environ.get(SWITCH, "")
    if told not in ("", "on", "off"):
        raise UserError(f"{SWITCH} is {told!r}; choose one of on, off.")
    if told == "off" or not (told or usual):
        return None
    folder = hub.cached(MODEL, FILES)
    if folder is None:
        if not told:
            return None
        folder = _fetched()
    try:
        return opened(folder, device)
    except UserError:
        if told:
            raise
        return None  # nobody asked for it


def opened(folder: Path, device: torch.device) -> Dino:
    """DINO from a folder that holds `FILES`, without any network. Raises UserError when it cannot be loaded."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # ours is the only one
    try:
        model, told = transformers.ViTModel.from_pretrained(
            folder,
            add_pooling_layer=False,  # DINO has none
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        processor = transformers.ViTImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file: each library raises its own
        raise _broken(folder, str(error).strip() or type(error).__name__) from error
    if told["missing_keys"]:  # they would be random, and nobody would see
        raise _broken(folder, f"it has no {min(told['missing_keys'])}")
    return Dino(model.eval().requires_grad_(False).to(device), processor, device)


def _fetched() -> Path:
    try:
        return finish(hub.fetch(MODEL, FILES, hub.listing(MODEL).revision))
    except UserError as error:
        raise UserError(
            f"{SWITCH} is on and {TITLE} cannot be had: {error} Or set {SWITCH} to off to score without it."
        ) from error


def _broken(folder: Path, why: str) -> UserError:
    return UserError(
        f"{TITLE} at {folder} cannot be loaded: {why.rstrip('.')}; remove that folder to fetch it anew, or set "
        f"{SWITCH} to off."
    )
