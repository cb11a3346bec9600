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
NETWORKS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}  # what each part's weights are called
_CHECKER = "safety_checker"
_SEES = "feature_extractor/preprocessor_config.json"  # what shrinks pictures for the checker
_SETTINGS = ("scheduler", "tokenizer", "feature_extractor")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # of a tokenizer, new and old
SAFETY = "ITERIS_SD_SAFETY"
_SWITCH = {
    **dict.fromkeys(("on", "1", "true", "yes"), True),
    **dict.fromkeys(("off", "0", "false", "no"), False),
}
HALF = "fp16"  # the variant that is fetched where there is one: half the bytes
_FORMER = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("runwayml/stable-diffusion-v1-5",)
}  # what repositories were called before they moved, and still are in older caches


def located(base: Base) -> Path | None:
    """The folder or single file with the whole weights, without any network; None when they are not here.

    A cached model is whole only with its safety checker, where that is wanted.
    """
    place = Path(base.source)
    if place.exists():
        return place
    names = (base.source, *_FORMER.get(base.source, ()))
    cached = (snapshot for name in names for snapshot in hub.snapshots(name))
    return next((one for one in cached if _is_whole(one) and (_is_checked(one) or not safety_wanted())), None)


def variant(folder: Path) -> str | None:
    """Which files of a diffusers folder hold its weights: "" the plain ones, "fp16" the halves; None: not all there."""
    for kind in ("", HALF):
        if all((folder / _weights(part, stem, kind)).is_file() for part, stem in NETWORKS.items()):
            return kind
    return None


def checker(folder: Path) -> str | None:
    """Which files of a diffusers folder hold its safety checker, as `variant`; it may be another.

    None: it has none, or not what prepares pictures for it.
    """
    if not all((folder / name).is_file() for name in (f"{_CHECKER}/config.json", _SEES)):
        return None
    first = variant(folder) or ""
    for kind in (first, HALF if first == "" else ""):
        if (folder / _weights(_CHECKER, "model", kind)).is_file():
            return kind
    return None


def safety_wanted() -> bool:
    """Whether pictures go through a model's safety checker: as ITERIS_SD_SAFETY says, else where strangers draw.

    Raises UserError when it says neither.
    """
    told = os.environ.get(SAFETY, "")
    if told and told.lower() not in _SWITCH:
        raise UserError(f"{SAFETY} is {told!r}; choose one of on, off.")
    return _SWITCH[told.lower()] if told else serving.public()


def safety(base: Base) -> str:
    """Whether a model's pictures go through its safety checker, in words; of one yet to be fetched, whether they will.

    Wanting it is not enough: a model at a path may have none.
    """
    if not safety_wanted():
        return "off"
    place = located(base)
    return "on" if place is None or _is_checked(place) else "off, this model has none"


def check_safe(base: Base) -> None:
    """Raise UserError when a safety checker is wanted of a model that is here and has none.

    The built-in model, which draws a world of its own, needs none.
    """
    place = located(base)
    if base.family != "storybook" and safety_wanted() and place is not None and not _is_checked(place):
        raise UserError(
            f"{base.title} has no safety checker, which a public page needs; choose another base model, or set "
            "ITERIS_SD_SAFETY=off if you do without."
        )


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
    """Of a repository's files, those that a pipeline is made of, its safety checker in whichever variant it has.

    Raises UserError when it has no safetensors, or no safety checker where that is wanted.
    """
    for kind in (HALF, ""):
        networks = [_weights(part, stem, kind) for part, stem in NETWORKS.items()]
        if all(name in files for name in networks):
            break
    else:
        raise UserError(
            "This repository has no weights as safetensors in diffusers' layout; choose another base model."
        )
    checkers = [_weights(_CHECKER, "model", one) for one in (kind, "" if kind else HALF)]
    checker = [name for name in checkers if name in files][:1]
    if safety_wanted() and not (checker and _SEES in files):
        raise UserError(
            "This repository has no safety checker as safetensors, and one is wanted here; choose another base model, "
            "or set ITERIS_SD_SAFETY=off."
        )
    settings = [name for name in files if _is_setting(name)]
    configs = [f"{part}/config.json" for part in (*NETWORKS, _CHECKER) if f"{part}/config.json" in files]
    return [INDEX, *settings, *configs, *networks, *checker]


def lacking(folder: Path) -> str | None:
    """A file that a pipeline is loaded from, its weights and safety checker apart, and a folder does not have."""
    settings = [INDEX, "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in NETWORKS)]
    if not any(all((folder / "tokenizer" / name).is_file() for name in names) for names in _VOCABULARIES):
        settings.append("tokenizer/tokenizer.json")
    return next((name for name in settings if not (folder / name).is_file()), None)


def _is_whole(folder: Path) -> bool:
    """Whether a cached snapshot has all that a pipeline is loaded from, its safety checker apart."""
    return variant(folder) is not None and lacking(folder) is None


def _is_checked(place: Path) -> bool:
    return place.is_dir() and checker(place) is not None


def _weights(part: str, stem: str, kind: str) -> str:
    return f"{part}/{stem}{'.' + kind if kind else ''}.safetensors"


def _is_setting(name: str) -> bool:
    path = PurePosixPath(name)
    return len(path.parts) == 2 and path.parts[0] in _SETTINGS and path.suffix in (".json", ".txt")
