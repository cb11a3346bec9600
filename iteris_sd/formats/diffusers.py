"""The diffusers/PEFT dialect: ``unet.<module>.lora_A.weight`` is down, ``lora_B`` is up, scale 1 unless told.

The text encoder's keys carry ``text_encoder.text_model.``, which our layer names leave out. A scale other
than 1 travels either as ``<module>.alpha`` or as JSON under ``lora_adapter_metadata`` (diffusers ≥ 0.33),
with PEFT's ``r``, ``lora_alpha``, ``alpha_pattern`` and ``use_rslora``.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from iteris_sd.errors import UserError
from iteris_sd.formats.layout import Layout, Pair
from iteris_sd.lora import LoRA

NAME = "diffusers"

_KEY = re.compile(
    r"(?P<component>unet|text_encoder)\.(?P<path>.+)\.(?P<role>lora_A\.weight|lora_B\.weight|alpha)"
)
_CONFIG = "lora_adapter_metadata"


def matches(keys: Iterable[str]) -> bool:
    """Whether any key is a PEFT factor of the U-Net or the text encoder."""
    return any((m := _KEY.fullmatch(key)) and m["role"] != "alpha" for key in keys)


def parse(keys: Iterable[str], metadata: Mapping[str, str]) -> Layout:
    """Sort the keys into layers. Raises UserError for a factor without partner or an unknown key."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"It holds {key!r}, which is no plain LoRA factor; only plain LoRA can be merged."
            )
        path = match["path"].removeprefix("text_model.")
        roles = found.setdefault(f"{match['component']}.{path}", {})
        if roles.setdefault(match["role"], key) != key:
            raise UserError(f"It holds the layer {path!r} twice, with and without text_model.")
    config = _config(metadata)
    return Layout({name: _pair(name, roles, config) for name, roles in found.items()})


def name_tensors(lora: LoRA) -> dict[str, Any]:
    """The LoRA's factors under this dialect's keys."""
    tensors = {}
    for name, adapter in lora.items():
        component, _, path = name.partition(".")
        stem = f"text_encoder.text_model.{path}" if component == "text_encoder" else name
        down, up = adapter.down, adapter.up
        if name in lora.kernels:
            down, up = down.unflatten(1, (-1, *lora.kernels[name])), up[:, :, None, None]
        tensors[f"{stem}.lora_A.weight"] = down
        tensors[f"{stem}.lora_B.weight"] = up
    return tensors


def _pair(name: str, roles: Mapping[str, str], config: Mapping[str, Any]) -> Pair:
    for role, other in (("lora_A.weight", "lora_B.weight"), ("lora_B.weight", "lora_A.weight")):
        if role not in roles:
            found = roles.get(other) or roles["alpha"]
            raise UserError(
                f"It holds {found!r} without the {role} that belongs to it; the file is incomplete."
            )
    component, _, path = name.partition(".")
    return Pair(
        down=roles["lora_A.weight"],
        up=roles["lora_B.weight"],
        alpha_key=roles.get("alpha"),
        alpha=_alpha(config, component, path),
        rank_stabilised=bool(config.get(f"{component}.use_rslora", False)),
    )


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The PEFT settings in the file's metadata, keys ``<component>.<setting>``; empty without them."""
    try:
        config = json.loads(metadata.get(_CONFIG, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Its metadata entry {_CONFIG} is not JSON; the LoRA's scale cannot be read."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"Its metadata entry {_CONFIG} is not a table; the LoRA's scale cannot be read.")
    return config


def _alpha(config: Mapping[str, Any], component: str, path: str) -> float | None:
    """PEFT's alpha for the module at ``path``: the first pattern that ends it, else ``lora_alpha``."""
    alpha = config.get(f"{component}.lora_alpha")
    patterns = config.get(f"{component}.alpha_pattern") or {}
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            module = pattern.removeprefix("^").removeprefix("text_model.")
            if path == module or path.endswith(f".{module}"):
                alpha = value
                break
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise UserError(
            f"Its metadata gives the alpha of {component}.{path} as {alpha!r}, which is no number."
        )
    return alpha
