"""Where a base model's weights are: in the project, at a path, in the Hub's cache, or yet to be fetched."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from pathlib import Path, PurePosixPath

from iteris_sd import hub, serving
from iteris_sd.bases import Base, find
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError

INDEX = "model_index.json"
_NETWORKS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}  # what each part's weights are called
_CHECKER = {"safety_checker": "model"}
_SETTINGS = ("scheduler", "tokenizer", "feature_extractor")
HALF = "fp16"  # the variant that is fetched where there is one: half the bytes


def located(base: Base) -> Path | None:
    """The folder or single file with the whole weights, without any network; None when they are not here."""
    place = Path(base.source)
    if place.exists():
        return place
    cached = hub.cached(base.source, [INDEX])
    return cached if cached is not None and variant(cached) is not None else None


def variant(folder: Path) -> str | None:
    """Which files of a diffusers folder hold its weights: "" the plain ones, "fp16" the halves; None: not all there."""
    for kind in ("", HALF):
        if all((folder / _weights(part, stem, kind)).is_file() for part, stem in _NETWORKS.items()):
            return kind
    return None


def checked(folder: Path, kind: str) -> bool:
    """Whether a diffusers folder has the weights of a safety checker, of the same variant."""
    return all((folder / _weights(part, stem, kind)).is_file() for part, stem in _CHECKER.items())


def safety_wanted() -> bool:
    """Whether pictures go through a model's safety checker: as ITERIS_SD_SAFETY says, else where strangers draw."""
    return os.environ.get("ITERIS_SD_SAFETY", "on" if serving.public() else "off") != "off"


def usual(library: Library) -> str:
    """The base model to begin with: Stable Diffusion v1.5 where it is here, with a GPU and concepts for it."""
    if not library.of_base("sd15") or located(find("sd15")) is None:
        return "storybook"
    import torch

    return "sd15" if torch.cuda.is_available() else "storybook"


def fetch(base: Base) -> Generator[tuple[int, int], None, Path]:
    """Download what `base` needs into the Hub's cache; yield bytes done and bytes in all, return the folder.

    Raises UserError when it cannot be had: no network, no such repository, no room on the disk.
    """
    found = hub.listing(base.source)
    return (yield from hub.fetch(found.repo, needed(found.files), found.revision))


def needed(files: Mapping[str, int]) -> list[str]:
    """Of a repository's files, those that a pipeline is made of. Raises UserError when it has no safetensors."""
    stems = {**_NETWORKS, **_CHECKER}
    for kind in (HALF, ""):
        wanted = {part: _weights(part, stem, kind) for part, stem in stems.items()}
        if all(wanted[part] in files for part in _NETWORKS):
            break
    else:
        raise UserError(
            "This repository has no weights as safetensors in diffusers' layout; choose another base model."
        )
    settings = [name for name in files if _is_setting(name)]
    configs = [f"{part}/config.json" for part in stems if f"{part}/config.json" in files]
    return [INDEX, *settings, *configs, *(name for name in wanted.values() if name in files)]


def _weights(part: str, stem: str, kind: str) -> str:
    return f"{part}/{stem}{'.' + kind if kind else ''}.safetensors"


def _is_setting(name: str) -> bool:
    path = PurePosixPath(name)
    return len(path.parts) == 2 and path.parts[0] in _SETTINGS and path.suffix in (".json", ".txt")
