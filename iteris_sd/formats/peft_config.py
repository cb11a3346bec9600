"""PEFT's own settings of a LoRA: what ``adapter_config.json`` says, and what that makes of each layer's scale."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from iteris_sd.errors import UserError
from iteris_sd.formats.layout import Scale

_UNSUPPORTED = {"use_dora": "DoRA", "use_bdlora": "BD-LoRA"}


def scales(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Scale]:
    """The scale of each layer of a component by its PEFT settings: ``lora_alpha``, ``alpha_pattern``, ``use_rslora``.

    Raises UserError when the settings are not PEFT's, or are of something other than a plain LoRA.
    """
    for setting, what in _UNSUPPORTED.items():
        if config.get(setting):
            raise UserError(f"It is a {what}, by its settings; only plain LoRA can be merged.")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"It is an adapter of PEFT's kind {kind!r}; only LORA can be merged.")
    return {
        name: Scale(_alpha(name.partition(".")[2], config), bool(config.get("use_rslora", False)))
        for name in names
    }


def _alpha(path: str, config: Mapping[str, Any]) -> float | None:
    """Alpha of the module at ``path``: that of the first pattern that ends it, else ``lora_alpha``."""
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            module = _plain(pattern)
            if path == module or path.endswith(f".{module}"):
                alpha = value
                break
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise UserError(f"Its settings give the alpha of {path} as {alpha!r}, which is no number.")
    return alpha


def _plain(pattern: str) -> str:
    """A pattern as the module name it spells; PEFT takes regular expressions, tools write names."""
    return re.sub(r"\\(.)", r"\1", pattern).removeprefix("^").removesuffix("$").removeprefix("text_model.")
