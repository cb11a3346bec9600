"""What diffusers wrote before PEFT: ``….to_q.lora.down.weight``, and before that ``….processor.to_q_lora.down.weight``.

Prefixes ``unet.`` and ``text_encoder.`` may be missing. Scale 1 unless an alpha is there.

| age    | U-Net                                        | text encoder                                       |
|--------|----------------------------------------------|----------------------------------------------------|
| older  | ``attn1.to_q.lora.down.weight``              | ``self_attn.q_proj.lora_linear_layer.down.weight`` |
| oldest | ``attn1.processor.to_q_lora.down.weight``    | ``self_attn.to_q_lora.down.weight``                |
"""

import re

from iteris_sd.formats import naming
from iteris_sd.formats.layout import Claim, Role

NAME = "older diffusers"

_PREFIX = r"(?:(?P<component>unet|text_encoder)\.)?"
_FACTOR = re.compile(_PREFIX + r"(?P<path>.+?)\.(?:lora|lora_linear_layer)\.(?P<role>down|up)\.weight")
_OLDEST = re.compile(
    _PREFIX + r"(?P<path>.+?)(?:\.processor)?\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<role>down|up)\.weight"
)
_ALPHA = re.compile(_PREFIX + r"(?P<path>.+?)(?:\.lora)?\.alpha")
_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def claim(key: str) -> Claim | None:
    """A factor with or without the component's prefix."""
    for pattern in (_FACTOR, _OLDEST, _ALPHA):
        found = pattern.fullmatch(key)
        if found is None:
            continue
        component = found["component"] or naming.component_of(found["path"])
        if component is None:
            return None
        path = found["path"]
        if pattern is _OLDEST:
            layer = found["layer"]
            path += f".{_TEXT_LAYERS[layer] if component == 'text_encoder' else layer}"
        if path.endswith(".to_out"):
            path += ".0"
        role: Role = "alpha" if pattern is _ALPHA else "down" if found["role"] == "down" else "up"
        return Claim(naming.canonical(component, path), role)
    return None
