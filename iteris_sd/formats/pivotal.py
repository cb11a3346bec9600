"""The dialect of pivotal tuning (cloneofsimo's lora): ``unet:12:up``, layers counted in the order of the first modules.

Made for Stable Diffusion 1 alone. The U-Net's blocks come in the order down, up, mid. Which layers of a block are
counted, and in which order, is told by the file:

| trained with            | told by                     | layers, in this order                                      |
|-------------------------|-----------------------------|------------------------------------------------------------|
| diffusers of its time   | layer 4 widens, as ff does  | attn1, ff, attn2                                           |
| later diffusers         | layer 4 does not            | attn1, attn2, ff                                           |
| ``--use_extended_lora`` | the classes in the metadata | then conv1, time_emb_proj, conv2, conv_shortcut of resnets |

In each layer of the text encoder they are those of `_TEXT`. Learned tokens are keys of their own, as ``<s1>``, or any
word that the metadata tell as ``<embed>``. There is no alpha.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from iteris_sd.formats.header import Header
from iteris_sd.formats.layout import Claim

_KEY = re.compile(r"(?P<component>unet|text_encoder):(?P<index>\d{1,3}):(?P<role>down|up)")
_TOKEN = re.compile(r"<[^<>\s]{1,100}>")
_EMBED = "<embed>"  # what the metadata say of a learned token
_HEADS = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
_TEXT_LAYERS = 12
_TEXT_NAMES = tuple(
    f"text_encoder.encoder.layers.{k}.self_attn.{layer}" for k in range(_TEXT_LAYERS) for layer in _TEXT
)


@dataclass(eq=False)
class Pivotal:
    """The dialect as one file speaks it: the layers of each component by their number, and its tokens."""

    names: Mapping[str, tuple[str, ...]]
    tokens: frozenset[str]
    NAME: str = "pivotal tuning"

    def claim(self, key: str) -> Claim | None:
        """A factor of the layer with that number, or a token."""
        if key in self.tokens or _TOKEN.fullmatch(key):
            return Claim(key, "token")
        found = _KEY.fullmatch(key)
        names = self.names[found["component"]] if found else ()
        if found is None or int(found["index"]) >= len(names):
            return None
        return Claim(names[int(found["index"])], "down" if found["role"] == "down" else "up")


def spoken(header: Header) -> Pivotal:
    """The dialect as the file with this header speaks it."""
    down, up = header.entries.get("unet:4:down"), header.entries.get("unet:4:up")
    # A GEGLU widens by eight; no attention widens at all.
    later = down is not None and up is not None and up.shape[:1] != (8 * down.shape[1],)
    extended = '"ResnetBlock2D"' in header.metadata.get("unet", "") or "unet:144:up" in header.entries
    tokens = frozenset(key for key in header.entries if header.metadata.get(key) == _EMBED)
    return Pivotal({"unet": tuple(_unet(later, extended)), "text_encoder": _TEXT_NAMES}, tokens)


def _unet(later: bool, extended: bool) -> Iterator[str]:
    attn1, attn2 = ([f"{attn}.{head}" for head in _HEADS] for attn in ("attn1", "attn2"))
    widening = ["ff.net.0.proj"]
    layers = [*attn1, *attn2, *widening] if later else [*attn1, *widening, *attn2]
    for block, attentions, resnets in _blocks():
        for number in range(attentions):
            yield from (f"unet.{block}.attentions.{number}.transformer_blocks.0.{layer}" for layer in layers)
        for number, has_shortcut in enumerate(resnets if extended else ()):
            shortcut = ("conv_shortcut",) if has_shortcut else ()
            for layer in ("conv1", "time_emb_proj", "conv2", *shortcut):
                yield f"unet.{block}.resnets.{number}.{layer}"


def _blocks() -> Iterator[tuple[str, int, tuple[bool, ...]]]:
    """Each block with how many attentions it has, and which of its residual blocks change the number of channels."""
    for number, attentions, widens in ((0, 2, False), (1, 2, True), (2, 2, True), (3, 0, False)):
        yield f"down_blocks.{number}", attentions, (widens, False)
    for number, attentions in ((0, 0), (1, 3), (2, 3), (3, 3)):
        yield f"up_blocks.{number}", attentions, (True,) * 3
    yield "mid_block", 1, (False, False)
