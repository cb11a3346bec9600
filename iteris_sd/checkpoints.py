"""Base models at a path: what a diffusers folder or a single-file checkpoint is, told without loading it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from iteris_sd import bases, limits, weights
from iteris_sd.errors import UserError

if TYPE_CHECKING:
    from iteris_sd.formats.header import Header

_UNET = "model.diffusion_model."
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_READER = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_TEXT = "cond_stage_model.transformer."
_PARTS = {"text encoder": _TEXT, "VAE": "first_stage_model."}
_OTHERS = {
    "conditioner.": "Stable Diffusion XL",
    f"{_UNET}label_emb.": "Stable Diffusion XL",
    f"{_UNET}joint_blocks.": "Stable Diffusion 3",
    f"{_UNET}double_blocks.": "Flux",
    "double_blocks.": "Flux",
}  # how a tensor's name begins -> what it is of
_CHANNELS = 4  # of Stable Diffusion's latents
_EDITORS = {"8": "a model that edits pictures (InstructPix2Pix)", "9": "a model for inpainting"}
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack")
_NO_PICKLES = (
    "a pickle can run any code when it is opened, so none is read. If you trust it, open the folder once with "
    "diffusers' from_pretrained(…, use_safetensors=False) and write it with save_pretrained(…)"
)


def opened(text: str) -> bases.Base:
    """The base model that a terminal's user means: a known name, an allowed id on the Hub, or a path.

    One at a path is known from then on by that path. Raises UserError when there is none, or when it is of another
    family than this project's models.
    """
    path = Path(os.path.expanduser(text))
    if text in bases.BASES or not path.exists():
        return _known(text, path)
    path = path.absolute()
    base = _folder(path) if path.is_dir() else _single_file(path)
    bases.add(base)
    return base


def _known(text: str, path: Path) -> bases.Base:
    """The base of this name, which is not at a path; of what looks like a path UserError says that it is not there."""
    try:
        return bases.find(text)
    except UserError as error:
        if path.suffix or len(path.parts) > 1:
            raise UserError(f"There is no file or folder {path}. {error}") from error
        raise


def _folder(path: Path) -> bases.Base:
    index, unet = _json(path / "model_index.json"), _json(path / "unet" / "config.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise UserError(
            f"{path} holds a {index.get('_class_name')}; a StableDiffusionPipeline is needed as the base model."
        )
    base = _of_width(path, unet.get("cross_attention_dim"), bases.TEXT_WIDTHS)
    if name := weights.lacking(path):
        raise UserError(f"{path} has no {name}, which a base model needs; download the whole folder again.")
    vae = _json(path / "vae" / "config.json")
    _check_channels(path, unet.get("in_channels", _CHANNELS), vae.get("latent_channels", _CHANNELS))
    for part, stem in weights.NETWORKS.items():
        _check_weights(path / part, stem)
    if weights.variant(path) is None and not all(
        _is_plain(path / part, stem) for part, stem in weights.NETWORKS.items()
    ):
        raise UserError(
            f"{path} has the weights of some parts as {weights.HALF} only and of others not; download all of either."
        )
    schedule = _json(path / "scheduler" / "scheduler_config.json")
    return _predicting(base, schedule.get("prediction_type", "epsilon"))


def _single_file(path: Path) -> bases.Base:
    from iteris_sd.formats.header import read_header

    try:
        header = read_header(path)
        header.check_size(limits.MAX_CHECKPOINT_BYTES)
    except UserError as error:
        message = str(error)
        raise UserError(
            f"{path.name} cannot be the base model: {message[:1].lower()}{message[1:]}"
        ) from error
    entries = header.entries
    if _READER not in entries:
        for start, other in _OTHERS.items():
            if any(key.startswith(start) for key in entries):
                raise UserError(_refusal(path, other))
        raise UserError(
            f"{path.name} is no checkpoint of Stable Diffusion: it does not hold {_READER!r}. If it is a LoRA, pick it "
            "as a concept."
        )
    base = _of_width(path, entries[_READER].shape[-1], {768: "sd15"})
    if _FIRST in entries:
        _check_channels(path, (*entries[_FIRST].shape, 0, 0)[1], _CHANNELS)
    for part, start in _PARTS.items():
        if not any(key.startswith(start) for key in entries):
            raise UserError(f"{path.name} has no {part} ({start}…); choose a whole checkpoint.")
    return _predicting(base, _schedule(path, header).get("prediction_type", "epsilon"))


def text_encoder(keys: Iterable[str]) -> dict[str, str]:
    """A single file's keys of the text encoder, by what transformers called each tensor when SD v1.5 was published.

    NovelAI's lineage lacks the level `text_model.` in its keys.
    """
    ours = {key.removeprefix(_TEXT): key for key in keys if key.startswith(_TEXT)}
    return {f"text_model.{name.removeprefix('text_model.')}": key for name, key in ours.items()}


def noise_schedule(path: Path) -> Mapping[str, Any]:
    """What a single-file checkpoint says of its noise schedule beyond SD v1.5's, as diffusers' settings.

    Raises UserError when the file, or the settings beside it, cannot be read.
    """
    from iteris_sd.formats.header import read_header

    return _schedule(path, read_header(path))


def _schedule(path: Path, header: Header) -> Mapping[str, Any]:
    """What `noise_schedule` says, by a header that was read.

    Velocity as the target is told by a metadata entry (modelspec), by an empty tensor `v_pred` (ComfyUI), or by the
    settings beside the file (A1111); a schedule that ends in pure noise by an empty tensor `ztsnr`.
    """
    said = header.metadata.get("modelspec.prediction_type") == "v" or "v_pred" in header.entries
    if not (said or _parameterization(path.with_suffix(".yaml")) == "v"):
        return {}
    if "ztsnr" in header.entries:  # arXiv 2305.08891: then drawing must begin at the last timestep
        ends = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {"prediction_type": "v_prediction", **ends}
    return {"prediction_type": "v_prediction"}


def _parameterization(path: Path) -> Any:
    """What a checkpoint's own settings call its target; None where they say nothing, or are not there."""
    if not path.is_file():
        return None
    if path.stat().st_size > limits.MAX_CONFIG_BYTES:
        raise UserError(
            f"{path} has more than {limits.MAX_CONFIG_BYTES:,} bytes; settings are a page of text."
        )
    try:
        data = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"{path}, the settings of the checkpoint, cannot be read; mend or remove it."
        ) from error
    for name in ("model", "params", "parameterization"):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _predicting(base: bases.Base, kind: Any) -> bases.Base:
    """The base with what its U-Net predicts, by diffusers' name for it."""
    return replace(base, prediction="v" if kind == "v_prediction" else "epsilon")


def _check_channels(path: Path, channels: Any, latents: Any) -> None:
    """Raise UserError when a U-Net reads anything but latents of so many channels."""
    if channels != latents:
        kind = _EDITORS.get(str(channels), "a model of another kind")
        raise UserError(
            f"{path.name} is {kind}: its U-Net reads {channels} channels; choose a model that draws from text alone, "
            f"whose U-Net reads {latents}."
        )


def _check_weights(part: Path, stem: str) -> None:
    """Raise UserError when a folder has no weights, whole or in shards, that are read; say which there are."""
    plain, half = f"{stem}.safetensors", f"{stem}.{weights.HALF}.safetensors"
    there = sorted(file.name for file in part.iterdir() if file.suffix in _WEIGHTS)
    if half in there or _is_plain(part, stem):
        return
    found = f"there is {', '.join(there)}" if there else "there are no weights"
    pickles = any(not name.endswith(".safetensors") for name in there)
    advice = _NO_PICKLES if pickles else "rename what is meant, or download the whole folder again"
    raise UserError(f"{part} has no {plain} or {half}; {found}: {advice}.")


def _is_plain(part: Path, stem: str) -> bool:
    """Whether a folder's plain weights are there, whole or in shards."""
    return (part / f"{stem}.safetensors").is_file() or (part / f"{stem}.safetensors.index.json").is_file()


def _of_width(path: Path, width: Any, known: Mapping[int, str]) -> bases.Base:
    """The base at `path`, of the family whose text states have this width."""
    width = width if isinstance(width, int) else str(width)
    if width not in known:
        raise UserError(
            _refusal(path, bases.STRANGERS.get(width, f"a model whose text states are {width} wide"))
        )
    family = bases.BASES[known[width]]
    title = path.name if path.is_dir() else path.stem
    return bases.like(family, name=str(path), title=title, source=str(path), download="")


def _refusal(path: Path, what: str) -> str:
    return f"{path.name} is {what}; this project composes with Stable Diffusion 1 and models made from it."


def _json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path.parent} is no base model in diffusers' layout: {path.name} cannot be read ({error.strerror})."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object.")
    return data
