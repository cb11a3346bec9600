"""Learned tokens (textual inversion): how files name them, and which can be used in a prompt.

| key                                                    | token           | written by                              |
|--------------------------------------------------------|-----------------|-----------------------------------------|
| ``<cat-toy>``, any word                                | that word       | diffusers                               |
| ``emb_params``, ``emp_params``                         | the file's name | A1111 and kohya, OneTrainer             |
| ``string_to_param.*``, ``string_to_param``, ``*``      | the file's name | A1111's pickles, converted              |
| ``clip_l``, ``text_encoders_0``                        | the file's name | diffusers' advanced training            |
| ``bundle_emb.<token>.…``, with one of these behind it  | the word in it  | OneTrainer, A1111, inside a LoRA        |
"""

import re
from collections.abc import Iterable

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats.header import Header

_NAMED_AS_FILE = (
    "emb_params",
    "emp_params",
    "string_to_param.*",
    "string_to_param",
    "*",
    "clip_l",
    "text_encoders_0",
)
_WITHIN = "|".join(map(re.escape, _NAMED_AS_FILE)) + "|<[^<>]+>"
_BUNDLED = re.compile(rf"bundle_emb\.(?P<token>.+?)\.(?:{_WITHIN})")
_START = r"^(?:bundle_emb\..+\.)?"
_STRANGERS = (
    (
        _START + r"(clip_g(_out)?|text_encoders_1)$",
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
        r"|^lora_(unet|te\d?)_|^lycoris_\w+\.|^(base_model|diffusion_model|unet|text_encoders?)\."
        r"|\.(diff|diff_b|w_norm|b_norm|on_input|oft_\w+)$)",
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
    if token in _NAMED_AS_FILE or not meant([token]) or any(re.search(p, token) for p, _ in _STRANGERS):
        raise UserError(
            f"its token would be called {token!r}, as parts of models are, and other tools would take it for one; give "
            "the file another name, or train the token under another."
        )
    header.check_type(key)
