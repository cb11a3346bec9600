"""Learned tokens (textual inversion): how files name them, and which can be used in a prompt.

| key                                                    | token           | written by                              |
|--------------------------------------------------------|-----------------|-----------------------------------------|
| ``<cat-toy>``, any word                                | that word       | diffusers                               |
| ``emb_params``, ``emp_params``, ``string_to_param.*``  | the file's name | A1111 and kohya, OneTrainer, converters |
| ``clip_l``                                             | the file's name | diffusers' advanced training            |
| ``bundle_emb.<token>.clip_l``, ``….string_to_param.*`` | the word in it  | OneTrainer, A1111, inside a LoRA        |
"""

import re
from collections.abc import Iterable

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats.header import Header

_NAMED_AS_FILE = ("emb_params", "emp_params", "string_to_param.*", "clip_l")
_BUNDLED = re.compile(r"bundle_emb\.(?P<token>.+)\.(?:string_to_param\.\*|clip_l)")
_START = r"^(?:bundle_emb\..+\.)?"
_STRANGERS = (
    (
        _START + r"clip_g(_out)?$",
        "a token for Stable Diffusion XL; this project composes with Stable Diffusion 1",
    ),
    (
        _START + r"(t5|t5xxl)(_out)?$",
        "a token for a model with another text encoder (Flux, Stable Diffusion 3 and the like); this project composes "
        "with Stable Diffusion 1",
    ),
    (
        _START + r"(clip_l|em[bp]_params)_out$",
        "an output embedding, which is added behind the text encoder, where no other tool can use it; train the token "
        "again without it",
    ),
)
_OTHERS = (
    (
        r"(\.lora[._]|lora_(A|B|up|down)\b|\.(alpha|hada_\w+|lokr_\w+)$|^(unet|text_encoder):\d"
        r"|^(lora|lycoris)_(unet|te\d?)_|^(base_model|diffusion_model|unet|text_encoders?)\.)",
        "a LoRA, not a learned token; give it as the concept's LoRA",
    ),
    (r"\.(weight|bias)$", "a part of a model, not a learned token"),
)


def bundled(key: str) -> str | None:
    """The token whose vectors a key inside a LoRA file holds; None if it is none."""
    found = _BUNDLED.fullmatch(key)
    return found["token"] if found is not None else None


def refuse(keys: Iterable[str], kinds: Iterable[tuple[str, str]] = _STRANGERS) -> None:
    """Raise UserError, "it is …", when a key is that of a token for another kind of model."""
    for pattern, what in kinds:
        key = next((key for key in keys if re.search(pattern, key)), None)
        if key is not None:
            raise UserError(f"it is {what} (it holds {key!r}).")


def meant(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant as learned tokens and nothing else, usable or not."""
    keys = list(keys)
    return not any(re.search(pattern, key) for pattern, _ in _OTHERS for key in keys)


def named(header: Header, stem: str) -> dict[str, str]:
    """Token -> key of its vectors, of a file of nothing but tokens that is called ``stem``.

    Raises UserError when it holds too many, two of one name, or other things than tokens for Stable Diffusion 1.
    """
    keys = list(header.entries)
    refuse(keys, (*_STRANGERS, *_OTHERS))
    if len(keys) > limits.MAX_TOKENS:
        raise UserError(f"it holds {len(keys)} tensors; at most {limits.MAX_TOKENS} tokens are read.")
    found: dict[str, str] = {}
    for key in keys:
        token = stem if key in _NAMED_AS_FILE else bundled(key) or key
        if (other := found.setdefault(token, key)) != key:
            raise UserError(f"it holds the token {token!r} twice, as {other!r} and as {key!r}.")
    return found


def check(token: str, key: str, header: Header) -> None:
    """Raise UserError when a token's name or the tensor of its vectors cannot be used."""
    shape = header.entries[key].shape
    vectors, dim = shape if len(shape) == 2 else (1, *shape) if len(shape) == 1 else (0, 0)
    if not 1 <= dim <= limits.MAX_WIDTH:
        raise UserError(f"the token's tensor {key!r} has shape {shape}; (vectors, width) is expected.")
    if not 1 <= vectors <= limits.MAX_TOKEN_VECTORS:
        raise UserError(
            f"its token has {vectors} vectors; from 1 to {limits.MAX_TOKEN_VECTORS} are read, as a prompt has no room "
            "for more."
        )
    if not 1 <= len(token) <= limits.MAX_TOKEN_CHARS or not token.isprintable() or token != token.strip():
        raise UserError(f"the name of its token, {token[:40]!r}, cannot be used in a prompt.")
    header.check_type(key)
