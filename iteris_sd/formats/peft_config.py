"""PEFT's own settings of a LoRA: what ``adapter_config.json`` says, and what that makes of each layer's scale."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats import naming, patterns
from iteris_sd.formats.layout import Scale

_UNSUPPORTED = {"use_dora": "DoRA", "use_bdlora": "BD-LoRA"}
_DEFAULT_ALPHA = 8  # PEFT's own, for settings that leave it out
_CONVERTED = ("pissa", "corda", "olora", "lora_ga")
_QUANTISED = "loftq"


def scales(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Scale]:
    """The scale of each layer of a component by its PEFT settings: ``lora_alpha``, ``alpha_pattern``, ``use_rslora``.

    Raises UserError when the settings are not PEFT's, are of something other than a plain LoRA, or hold patterns that
    would take long.
    """
    names = list(names)
    for setting, what in _UNSUPPORTED.items():
        if config.get(setting):
            raise UserError(f"It is a {what}, by its settings; only plain LoRA can be merged.")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"It is an adapter of PEFT's kind {kind!r}; only LORA can be merged.")
    _check_start(config)
    alphas = _patterns(config)
    _check_work(alphas, names)
    return {
        name: Scale(_alpha(name, config, alphas), bool(config.get("use_rslora", False))) for name in names
    }


def _check_start(config: Mapping[str, Any]) -> None:
    """Raise UserError when the training began with a changed base model, from which ΔW is then counted.

    EVA, orthogonal, MiCA and Gaussian starts leave the base model as it is (PEFT's ``LoraLayer.update_layer``).
    """
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CONVERTED):
        raise UserError(
            f"It was trained with init_lora_weights={start[:40]!r}, which changes the base model's weights, so that it "
            "fits no other base; convert it to a plain LoRA where it was trained: PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion."
        )
    if start == _QUANTISED:
        raise UserError(
            "It was trained with init_lora_weights='loftq', which quantises the base model's weights, so that it fits "
            "no other base; PEFT converts no such adapter: train it again without."
        )


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


def _check_work(alphas: list[tuple[patterns.Pattern, Any]], names: list[str]) -> None:
    """Raise UserError when so many patterns for so many layers would take long."""
    work = sum(pattern.work for pattern, _ in alphas) * sum(len(_paths(name)) for name in names)
    if work > limits.MAX_PATTERN_WORK:
        raise UserError(
            f"Its settings hold {len(alphas):,} patterns of alpha for {len(names):,} layers, {work:,} characters to "
            f"compare, and at most {limits.MAX_PATTERN_WORK:,} are; write plain names of modules there, which count as "
            "one character each, or fewer."
        )


def _alpha(name: str, config: Mapping[str, Any], alphas: list[tuple[patterns.Pattern, Any]]) -> float:
    """Alpha of a layer: that of the first pattern that names it, else ``lora_alpha``."""
    paths = _paths(name)
    told = (alpha for pattern, alpha in alphas if any(map(pattern.names, paths)))
    alpha = next(told, config.get("lora_alpha", _DEFAULT_ALPHA))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise UserError(f"Its settings give the alpha of {name} as {str(alpha)[:40]!r}, which is no number.")
    return float(alpha)


def _paths(name: str) -> tuple[str, ...]:
    """The paths of a layer's module that patterns may mean.

    Text encoders have a ``text_model.`` or not, by the version of transformers that the LoRA was trained with.
    """
    component, _, path = name.partition(".")
    return (path, naming.TEXT_LAYOUT + path) if component == "text_encoder" else (path,)
