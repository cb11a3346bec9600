"""The dialect of pivotal tuning (cloneofsimo's lora): ``unet:12:up``, layers counted in the order of the first modules.

Made for Stable Diffusion 1 alone. The U-Net's blocks come in the order down, up, mid; in each transformer block the
layers are those of `_BLOCK`, in each layer of the text encoder those of `_TEXT`. Learned tokens are keys of their own,
as ``<s1>``. There is no alpha.
"""

import re
from collections.abc import Iterator

from iteris_sd.formats.layout import Claim

NAME = "pivotal tuning"

_KEY = re.compile(r"(?P<component>unet|text_encoder):(?P<index>\d{1,3}):(?P<role>down|up)")
_TOKEN = re.compile(r"<[^<>\s]{1,100}>")
_BLOCK = (
    *(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    *(f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
)
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
_TEXT_LAYERS = 12


def claim(key: str) -> Claim | None:
    """A factor of the layer with that number, or a token."""
    if _TOKEN.fullmatch(key):
        return Claim(key, "token")
    found = _KEY.fullmatch(key)
    names = {"unet": _UNET_NAMES, "text_encoder": _TEXT_NAMES}[found["component"]] if found else ()
    if found is None or int(found["index"]) >= len(names):
        return None
    return Claim(names[int(found["index"])], "down" if found["role"] == "down" else "up")


def _unet() -> Iterator[str]:
    places = [f"down_blocks.{b}.attentions.{a}" for b in (0, 1, 2) for a in (0, 1)]
    places += [f"up_blocks.{b}.attentions.{a}" for b in (1, 2, 3) for a in (0, 1, 2)]
    for place in [*places, "mid_block.attentions.0"]:
        for layer in _BLOCK:
            yield f"unet.{place}.transformer_blocks.0.{layer}"


_UNET_NAMES = tuple(_unet())
_TEXT_NAMES = tuple(
    f"text_encoder.encoder.layers.{k}.self_attn.{layer}" for k in range(_TEXT_LAYERS) for layer in _TEXT
)
