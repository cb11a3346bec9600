"""The diffusers/PEFT dialect: ``unet.<module>.lora_A.weight`` is down, ``lora_B`` is up, scale 1 unless told.

The text encoder's keys carry ``text_encoder.text_model.``, which our layer names leave out. A model of its own
(``unet.save_lora_adapter``) saves its keys without ``unet.``. A scale other than 1 travels either as ``<module>.alpha``
or as JSON under ``lora_adapter_metadata`` (diffusers ≥ 0.33), with PEFT's settings (``peft_config``) for each
component: ``unet.lora_alpha``, or ``lora_alpha`` where the keys have no prefix either.
"""

import json
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from iteris_sd.errors import UserError
from iteris_sd.formats import naming, peft_config
from iteris_sd.formats.layout import Claim, Role, Scale
from iteris_sd.lora import LoRA

NAME = "diffusers"

_KEY = re.compile(
    r"(?:(?P<component>unet|text_encoder)\.(?:base_model\.model\.)?)?(?P<path>.+?)"
    r"(?:\.lora)?\.(?P<role>lora_[AB](?:\.[\w-]+)?\.weight|alpha)"
)
_ROLES: Mapping[str, Role] = {"A": "down", "B": "up"}
_CONFIG = "lora_adapter_metadata"
_COMPONENTS = ("unet", "text_encoder")


def claim(key: str) -> Claim | None:
    """A PEFT factor of the U-Net or the text encoder, or an alpha."""
    found = _KEY.fullmatch(key)
    component = found and (found["component"] or naming.component_of(found["path"]))
    if found is None or component is None:
        return None
    name = naming.canonical(component, found["path"])
    return Claim(name, "alpha" if found["role"] == "alpha" else _ROLES[found["role"][5]])


def scales(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Scale]:
    """What the metadata says of each layer's scale. Raises UserError when it cannot be read."""
    if _CONFIG not in metadata:
        return {}
    try:
        config = json.loads(metadata[_CONFIG])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Its metadata entry {_CONFIG} is not JSON; the LoRA's scale cannot be read."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"Its metadata entry {_CONFIG} is not a table; the LoRA's scale cannot be read.")
    prefixed = any(key.startswith(f"{component}.") for key in config for component in _COMPONENTS)
    found: dict[str, Scale] = {}
    for component in _COMPONENTS:
        start = f"{component}."
        own = {key.removeprefix(start): value for key, value in config.items() if key.startswith(start)}
        told = own if prefixed else config
        if told:
            found |= peft_config.scales([name for name in names if name.startswith(start)], told)
    return found


def name_tensors(lora: LoRA) -> dict[str, Tensor]:
    """The LoRA's factors under this dialect's keys."""
    return {
        f"{stem(name)}.{key}": tensor
        for name in lora
        for key, tensor in zip(("lora_A.weight", "lora_B.weight"), lora.tensors(name), strict=True)
    }


def stem(name: str) -> str:
    """A layer's name in the file."""
    component, _, path = name.partition(".")
    return f"text_encoder.{naming.TEXT_LAYOUT}{path}" if component == "text_encoder" else name
