"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, or two such in ``unet`` and
``text_encoder``. Keys are ``base_model.model.<module>.lora_A.weight``; the scale stands in the settings.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats import naming
from iteris_sd.formats.impostors import PICKLE
from iteris_sd.formats.layout import Claim
from iteris_sd.formats.peft_files import COMPONENTS, CONFIG, PICKLED, WEIGHTS
from iteris_sd.lora import LoRA

NAME = "PEFT"

_KEY = re.compile(
    r"(?:base_model\.model\.)(?:(?P<component>unet|text_encoder)\.)?(?P<path>.+)\.lora_(?P<role>[AB])(?:\.[\w-]+)?\.weight"
)


def claim(key: str) -> Claim | None:
    """A factor under PEFT's own prefix."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    component = found["component"] or naming.component_of(found["path"])
    if component is None:
        return None
    return Claim(naming.canonical(component, found["path"]), "down" if found["role"] == "A" else "up")


def places(folder: Path) -> list[Path]:
    """The folders in ``folder``, itself included, that hold the settings of an adapter."""
    return [place for place in (folder, *(folder / c for c in COMPONENTS)) if (place / CONFIG).is_file()]


def adapters(folder: Path) -> list[Path]:
    """The folders in ``folder`` that hold an adapter, weights and all. Raises UserError when there is none, or one has
    no weights that are read."""
    found = places(folder)
    for place in found:
        if not (place / WEIGHTS).is_file():
            pickled = (place / PICKLED).is_file()
            raise UserError(
                f"its weights are {PICKLED}, a PyTorch pickle; {PICKLE} as {WEIGHTS}."
                if pickled
                else f"it has {CONFIG} and no {WEIGHTS} beside it; save the adapter there again."
            )
    if not found:
        raise UserError(
            f"there is no {CONFIG} in it nor in its folders {' and '.join(COMPONENTS)}, and not one .safetensors file "
            "alone; name a file, or a folder that a LoRA was saved into."
        )
    return found


def config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in ``folder``. Raises UserError when they cannot be read."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"its scale stands in {CONFIG}, which is not beside it; put it there, or name its folder."
        )
    try:
        if path.stat().st_size > limits.MAX_CONFIG_BYTES:
            raise UserError(f"its {CONFIG} has more than {limits.MAX_CONFIG_BYTES:,} bytes.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"its {CONFIG} cannot be read ({type(error).__name__}).") from error
    if not isinstance(found, dict):
        raise UserError(f"its {CONFIG} is not a table.")
    return found


def name_tensors(lora: LoRA) -> dict[str, Tensor]:
    """The factors of one component's LoRA under this dialect's keys."""
    tensors = {}
    for name in lora:
        path = _path(name)
        down, up = lora.tensors(name)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up
    return tensors


def settings(lora: LoRA, base: str | None) -> Mapping[str, Any]:
    """What ``adapter_config.json`` says of one component's LoRA, all of whose ranks are alike: scale 1."""
    rank = max(adapter.rank for adapter in lora.values())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({_path(name) for name in lora}),
        "inference_mode": True,
    }


def _path(name: str) -> str:
    """The module's path as transformers 5 and diffusers have it: text encoders without ``text_model.``."""
    return name.partition(".")[2]
