"""Dotted names with kohya's factors: ComfyUI's LoraSave, and the common naming (OMI) that OneTrainer writes.

| component    | ComfyUI                                          | OMI                    |
|--------------|--------------------------------------------------|------------------------|
| U-Net        | ``diffusion_model.input_blocks.1.1.…``           | ``unet.input_blocks…`` |
| text encoder | ``text_encoders.clip_l.transformer.text_model…`` | ``clip_l.text_model…`` |

Behind the module come ``lora_up.weight`` and ``lora_down.weight``; ComfyUI writes no alpha, scale 1.
"""

import re

from iteris_sd.formats import naming
from iteris_sd.formats.layout import ROLES, Claim

NAME = "ComfyUI"

_KEY = re.compile(
    r"(?P<prefix>diffusion_model|unet|text_encoders\.clip_l\.transformer|clip_l|text_encoder)\.(?P<path>.+)"
    r"\.(?P<role>alpha|lora_(?:down|up|mid|A|B)\.weight)"
)
_UNET = ("diffusion_model", "unet")


def claim(key: str) -> Claim | None:
    """A factor or alpha of a module by its dotted path, original spelling or diffusers'."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    component = "unet" if found["prefix"] in _UNET else "text_encoder"
    name = naming.canonical(component, found["path"])
    if naming.component_of(name.partition(".")[2]) != component:
        return None
    return Claim(name, ROLES[found["role"].partition(".")[0]])
