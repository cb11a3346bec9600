"""Base models at a path: what a diffusers folder or a single-file checkpoint is, told without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iteris_sd import bases, limits
from iteris_sd.errors import UserError

_READER = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_TEXT = "cond_stage_model.transformer."


def opened(text: str) -> bases.Base:
    """The base model that a terminal's user means: a known name, an allowed id on the Hub, or a path.

    One at a path is known from then on by that path. Raises UserError when there is none, or when it is of another
    family than this project's models.
    """
    path = Path(text)
    if text in bases.BASES or not path.exists():
        return bases.find(text)
    path = path.absolute()
    base = _folder(path) if path.is_dir() else _single_file(path)
    bases.add(base)
    return base


def _folder(path: Path) -> bases.Base:
    index, unet = _json(path / "model_index.json"), _json(path / "unet" / "config.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise UserError(
            f"{path} holds a {index.get('_class_name')}; a StableDiffusionPipeline is needed as the base model."
        )
    return _of_width(path, unet.get("cross_attention_dim"), bases.TEXT_WIDTHS)


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
        if any(key.startswith("conditioner.") for key in entries):
            raise UserError(_refusal(path, "Stable Diffusion XL"))
        raise UserError(
            f"{path.name} is no checkpoint of Stable Diffusion: it does not hold {_READER!r}. If it is a LoRA, pick it "
            "as a concept."
        )
    base = _of_width(path, entries[_READER].shape[-1], {768: "sd15"})
    if not any(key.startswith(_TEXT) for key in entries):
        raise UserError(f"{path.name} has no text encoder ({_TEXT}…); choose a whole checkpoint.")
    return base


def _of_width(path: Path, width: Any, known: Mapping[int, str]) -> bases.Base:
    """The base at `path`, of the family whose text states have this width."""
    if width not in known:
        raise UserError(
            _refusal(path, bases.STRANGERS.get(width, f"a model whose text states are {width} wide"))
        )
    family = bases.BASES[known[width]]
    return bases.like(family, name=str(path), title=path.stem, source=str(path), download="")


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
