"""Which base model a LoRA file's metadata name, where trainers have written it and it is clear."""

import re
from collections.abc import Mapping

_KEYS = (
    "ss_base_model_version",
    "modelspec.architecture",
)  # kohya's, and that of Stability's model specification
_NAMES = (
    ("Stable Diffusion 1", re.compile(r"(sd_?v?1|stable-diffusion-v1)")),
    ("Stable Diffusion 2", re.compile(r"(sd_?v?2|stable-diffusion-v2)")),
    ("Stable Diffusion XL", re.compile(r"(sd_?xl|stable-diffusion-xl)")),
    ("Stable Diffusion 3", re.compile(r"(sd_?v?3|stable-diffusion-v?3)")),
    ("Flux", re.compile(r"flux")),
    ("Storybook", re.compile(r"storybook$")),
)
STRANGERS = ("Stable Diffusion 2", "Stable Diffusion XL", "Stable Diffusion 3", "Flux")


def named(metadata: Mapping[str, str]) -> str:
    """The base model that the metadata name; "" where they name none that is known here, or several."""
    told = [metadata[key].lower() for key in _KEYS if key in metadata]
    found = {name for name, pattern in _NAMES for text in told if pattern.match(text)}
    if metadata.get("ss_v2", "").lower() == "true":  # kohya's scripts, whatever else they say
        found = {"Stable Diffusion 2"}
    return found.pop() if len(found) == 1 else ""
