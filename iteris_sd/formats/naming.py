"""How modules of Stable Diffusion are called: canonical names, and the spellings of other tools.

A canonical name is ``unet.`` or ``text_encoder.`` and the module's path as diffusers and transformers have it, without
``text_model.``: ``unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k``.

| spelling   | example                                                             | used by                         |
|------------|---------------------------------------------------------------------|---------------------------------|
| dotted     | ``down_blocks.0.attentions.1``                                      | diffusers, PEFT                 |
| underscore | ``down_blocks_0_attentions_1``                                      | kohya's sd-scripts, A1111       |
| original   | ``input_blocks_2_1`` or ``input_blocks.2.1`` for the same           | the first Stable Diffusion code |
"""

import re

TEXT_LAYOUT = "text_model."
_TEXT = re.compile(r"(text_model\.)?(encoder\.layers\.\d+|embeddings|final_layer_norm)\b")
_UNET = re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding)\b")

_WORDS = (
    "down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 "
    "to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut "
    "time_emb_proj time_embedding linear_1 linear_2 text_model encoder layers self_attn q_proj k_proj v_proj "
    "out_proj mlp fc1 fc2"
)
# Longest first: "proj_in" is one word, and not "proj" and "in".
_LONGEST_FIRST = sorted(_WORDS.split(), key=len, reverse=True)
_UNDERSCORED = re.compile("(?:^|_)(" + "|".join([*_LONGEST_FIRST, r"\d+"]) + ")(?=_|$)")

_INNER = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_ORIGINAL = re.compile(
    r"(?P<half>input|output)_blocks_(?P<block>\d+)_(?P<place>\d)_(?P<rest>.+)|middle_block_(?P<middle>\d)_(?P<inner>.+)"
)
_COMPILED = re.compile(r"_orig_mod[._]")  # torch.compile wraps a module in one of this name
_DOTTED_ORIGINAL = re.compile(r"((input|output)_blocks|middle_block|time_embed|out)\.\d")


def canonical(component: str, path: str) -> str:
    """The canonical name of a dotted path in a component, original spelling included.

    diffusers before 0.24 wrote the component twice.
    """
    while path.startswith(f"{component}."):
        path = path.removeprefix(f"{component}.")
    if component == "text_encoder":
        path = path.removeprefix(TEXT_LAYOUT)
    elif _DOTTED_ORIGINAL.match(path):
        path = dotted(path.replace(".", "_")) or path
    return f"{component}.{path}"


def uncompiled(key: str) -> str:
    """The key that a tensor would have, had its model not been compiled."""
    return _COMPILED.sub("", key)


def component_of(path: str) -> str | None:
    """The component that a dotted path of diffusers' without prefix must stand in; None where it tells nothing."""
    return "text_encoder" if _TEXT.match(path) else "unet" if _UNET.match(path) else None


def dotted(path: str) -> str | None:
    """The dotted path for one with underscores, original spelling included; None if it is no such path."""
    words, end = [], 0
    path = _modern(path)
    while end < len(path):
        found = _UNDERSCORED.match(path, end)
        if found is None:
            return None
        words.append(found[1])
        end = found.end()
    return ".".join(words) or None


def underscored(name: str) -> tuple[str, str]:
    """Component and path, with underscores, of a canonical name; the text encoder's with ``text_model``."""
    component, _, path = name.partition(".")
    path = f"{TEXT_LAYOUT}{path}" if component == "text_encoder" else path
    return component, path.replace(".", "_")


def _modern(path: str) -> str:
    """The name that diffusers gives to a module of the original U-Net of Stable Diffusion 1; others stay."""
    if path in _OUTER:
        return _OUTER[path]
    found = _ORIGINAL.fullmatch(path)
    if found is None:
        return path
    if found["middle"] is not None:
        kind = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}.get(found["middle"])
        return path if kind is None else f"mid_block_{kind}_{_INNER.get(found['inner'], found['inner'])}"
    rest, place = _INNER.get(found["rest"], found["rest"]), int(found["place"])
    half = "down" if found["half"] == "input" else "up"
    block, layer = divmod(int(found["block"]) - (half == "down"), 3)
    if half == "down" and layer == 2 and (place, rest) == (0, "op"):
        return f"down_blocks_{block}_downsamplers_0_conv"
    if half == "up" and place > 0 and rest == "conv":
        return f"up_blocks_{block}_upsamplers_0_conv"
    kind = {0: "resnets", 1: "attentions"}.get(place)
    return path if kind is None else f"{half}_blocks_{block}_{kind}_{layer}_{rest}"
