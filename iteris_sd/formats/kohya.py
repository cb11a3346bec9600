"""The dialect of kohya's sd-scripts, A1111 and ComfyUI: ``lora_unet_…``, ``lora_te_…``, an alpha for each module.

Convolutions (LoCon) come with kernels in ``lora_down``, or in ``lora_mid`` where the factorisation is Tucker's. A1111
and OneTrainer bundle learned tokens as ``bundle_emb.<token>.…``. Prefixes that a tool has put twice, LyCORIS' own
``lycoris_…`` without a component, and module names of the original Stable Diffusion code, are understood.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from iteris_sd.formats import naming
from iteris_sd.formats.layout import ROLES, Claim
from iteris_sd.formats.tokens import bundled
from iteris_sd.lora import LoRA

NAME = "kohya"

_KEY = re.compile(
    r"(?:(?:(?:lora_|lycoris_|base_model_model_)*(?P<component>unet|te|te1|text_encoder)_)+|lycoris_)"
    r"(?:base_model_model_)?(?P<path>[a-z0-9_]+?)"
    r"\.(?P<role>alpha|(?:lora_down|lora_up|lora_mid|lora_A|lora_B)(?:\.[\w-]+)?\.weight)"
)
_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


def claim(key: str) -> Claim | None:
    """A factor or alpha of a module whose path has underscores for dots, or a bundled token."""
    token = bundled(key)
    if token is not None:
        return Claim(token, "token")
    found = _KEY.fullmatch(key)
    path = naming.dotted(found["path"]) if found is not None else None
    if found is None or path is None:
        return None
    component = naming.component_of(path)
    told = found["component"]
    if component is None or (told is not None and (told == "unet") != (component == "unet")):
        return None
    return Claim(naming.canonical(component, path), ROLES[found["role"].partition(".")[0]])


def name_tensors(lora: LoRA, tokens: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The LoRA's factors under this dialect's keys, alpha = rank, and with them the tokens, if any."""
    tensors = {}
    for name, adapter in lora.items():
        component, path = naming.underscored(name)
        stem = f"{_PREFIXES[component]}_{path}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = lora.tensors(name)
        tensors[f"{stem}.alpha"] = torch.tensor(float(adapter.rank))
    for token, vectors in (tokens or {}).items():
        tensors[f"bundle_emb.{token}.string_to_param.*"] = torch.atleast_2d(vectors)
    return tensors
