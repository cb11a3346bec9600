"""Pictures through the autoencoder, computed once for one autoencoder and kept: their latents, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from iteris_sd.storybook import data
from iteris_sd.storybook.machine import Machine
from iteris_sd.storybook.pictures import to_tensor, to_uint8
from iteris_sd.storybook.run import Run

_BATCH = 64


def opened(run: Run) -> AutoencoderKL:
    """The autoencoder in `assets`, frozen. Raises FileNotFoundError, and says what to do, if there is none."""
    folder = run.storybook / "vae"
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no autoencoder at {folder}; run `--stage vae` first.")
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    return vae.to(run.machine.device, memory_format=torch.channels_last).requires_grad_(False)


def encoded(runs: Path, vae: AutoencoderKL, scenes: data.Scenes, machine: Machine) -> Tensor:
    """Scaled latents of all scenes, (n, c, 16, 16) float16."""

    def latents(pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mean.float().mul(vae.config.scaling_factor).half()

    path = runs / "scenes" / f"latents_{scenes.first}_{len(scenes)}_{_fingerprint(vae)}.npy"
    return torch.from_numpy(_kept(path, scenes.pixels, latents, vae, machine))


def rebuilt(runs: Path, name: str, vae: AutoencoderKL, pixels: np.ndarray, machine: Machine) -> np.ndarray:
    """What the autoencoder makes of pictures (n, 128, 128, 3) uint8: the best that a generated picture can be."""

    def back(seen: Tensor) -> Tensor:
        return to_uint8(vae.decode(vae.encode(seen).latent_dist.mean).sample.float()).permute(0, 2, 3, 1)

    path = runs / "scenes" / f"rebuilt_{name}_{len(pixels)}_{_fingerprint(vae)}.npy"
    return _kept(path, pixels, back, vae, machine)


def _kept(
    path: Path, pixels: np.ndarray, work: Callable[[Tensor], Tensor], vae: AutoencoderKL, machine: Machine
) -> np.ndarray:
    """The work done on all pictures, from the file if it is there."""
    if not path.exists():
        print(f"{len(pixels):,} pictures through the autoencoder, once, into {path}", flush=True)
        blocks = []
        for k in range(0, len(pixels), _BATCH):
            part = to_tensor(pixels[k : k + _BATCH]).to(vae.device, memory_format=torch.channels_last)
            with torch.no_grad(), machine.autocast():
                blocks.append(work(part).cpu().numpy())
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(blocks))
        partial.rename(path)
    kept: np.ndarray = np.load(path, mmap_mode="c")
    return kept


def _fingerprint(vae: AutoencoderKL) -> str:
    """Tells autoencoders apart by their weights."""
    weights = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in vae.parameters()))
    return weights.hexdigest()[:12]
