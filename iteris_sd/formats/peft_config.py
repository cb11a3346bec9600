"""PEFT's own settings of a LoRA: what ``adapter_config.json`` says, and what that makes of each layer's scale."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats import naming, patterns
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
    alphas = _patterns(config)
    return {
        name: Scale(_alpha(name, config, alphas), bool(config.get("use_rslora", False))) for name in names
    }


def _patterns(config: Mapping[str, Any]) -> list[tuple[patterns.Pattern, Any]]:
    """The patterns of ``alpha_pattern`` with their alphas, in their order."""
    found = config.get("alpha_pattern") or {}
    if not isinstance(found, dict):
        raise UserError("Its settings hold an alpha_pattern that is not a table; its scale cannot be read.")
    if len(found) > limits.MAX_ALPHA_PATTERNS:
        raise UserError(
            f"Its settings hold {len(found):,} patterns of alpha; at most {limits.MAX_ALPHA_PATTERNS:,} are read."
        )
    return [(patterns.read(pattern), alpha) for pattern, alpha in found.items()]


def _alpha(name: str, config: Mapping[str, Any], alphas: list[tuple[patterns.Pattern, Any]]) -> float | None:
    """Alpha of a layer: that of the first pattern that names it, else ``lora_alpha``."""
    component, _, path = name.partition(".")
    # Text encoders have a ``text_model.`` or not, by the version of transformers that the LoRA was trained with.
    paths = (path, naming.TEXT_LAYOUT + path) if component == "text_encoder" else (path,)
    told = (alpha for pattern, alpha in alphas if any(map(pattern.names, paths)))
    alpha = next(told, config.get("lora_alpha"))
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise UserError(f"Its settings give the alpha of {path} as {str(alpha)[:40]!r}, which is no number.")
    return float(alpha)
