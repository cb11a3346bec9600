"""What a LoRA file holds, before it is merged: what it touches, how strongly, and how much it overlaps with another.

| symbol   | shape  | meaning                                                                                      |
|----------|--------|----------------------------------------------------------------------------------------------|
| Q_a, Q_b | (n, k) | orthonormal bases of the inputs that two LoRAs read at a layer, or of the outputs they write |
| cos θ_i  | (k,)   | singular values of Q_aᵀQ_b: the cosines of the principal angles between the two              |
| overlap  | scalar | mean of cos²θ_i, i ≤ min(k_a, k_b): 0 where the two never meet, 1 where one holds the other  |

Two random LoRAs of ranks r_a and r_b overlap by max(r_a, r_b) / n; what is above that is where merging must compromise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from iteris_sd import formats
from iteris_sd.bases import STRANGERS
from iteris_sd.formats import base_model
from iteris_sd.lora import LoRA, inner
from iteris_sd.merging.decomposing import decompose

FAMILIES = {768: "Stable Diffusion 1", 128: "Storybook", **STRANGERS}


@dataclass(frozen=True)
class Part:
    """One component of the model as a LoRA changes it: how many layers, and the ranks that occur."""

    layers: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Overlap:
    """How two LoRAs meet in the layers that both touch: means over layers.

    ``inputs``, ``outputs``: overlap of what they read and of what they write; ``chance``: what random LoRAs of these
    ranks would have in the inputs. ``nearest``: the largest cosine of a principal angle of any layer's inputs.
    ``cosine``: of the two weight changes themselves, above 0 where they pull alike.
    """

    layers: int
    inputs: float
    outputs: float
    chance: float
    nearest: float
    cosine: float


@dataclass(frozen=True)
class Description:
    """A LoRA file: its dialect and family, its parts by component, ‖ΔW‖_F by block, tokens, metadata."""

    file: str
    format: str
    family: str
    parts: Mapping[str, Part]
    blocks: Mapping[str, float]
    tokens: Mapping[str, int]
    metadata: Mapping[str, str]


def describe(path: Path) -> Description:
    """Describe a LoRA file. Raises UserError when it cannot be read."""
    found = formats.read(path)
    parts = {
        name: Part(len(part), tuple(sorted({adapter.rank for adapter in part.values()})))
        for name, part in found.lora.parts().items()
    }
    tokens = {token: len(vectors) for token, vectors in found.tokens.items()}
    told = family(found.lora, found.metadata)
    return Description(path.name, found.dialect, told, parts, blocks(found.lora), tokens, found.metadata)


def family(lora: LoRA, metadata: Mapping[str, str] | None = None) -> str:
    """The family of base models, told by the width of the text states that a LoRA reads, else by its metadata;
    "unknown" where nothing tells."""
    return FAMILIES.get(text_width(lora) or 0) or base_model.named(metadata or {}) or "unknown"


def text_width(lora: LoRA) -> int | None:
    """The width of the text states that a LoRA reads; None where it touches no layer that tells."""
    widths = {
        adapter.shape[1]
        for name, adapter in lora.items()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
        or (name.startswith("text_encoder.") and "self_attn" in name)
    }
    return max((width for width in widths if width in FAMILIES), default=None)


def blocks(lora: LoRA) -> dict[str, float]:
    """‖ΔW‖_F of all layers of each block together, in the order of the file."""
    squares: dict[str, float] = {}
    for name, adapter in lora.items():
        block = _block(name)
        squares[block] = squares.get(block, 0.0) + max(0.0, inner(adapter, adapter).item())
    return {block: square**0.5 for block, square in squares.items()}


def _block(name: str) -> str:
    """`unet.down_blocks.0`, `unet.mid_block`, `text_encoder.layers.3`."""
    words = [word for word in name.split(".") if word not in ("encoder", "text_model")]
    numbered = next((k for k, word in enumerate(words) if word.isdigit()), 1)
    return ".".join(words[: min(numbered, 2) + 1]) if "mid_block" not in words else ".".join(words[:2])


def overlap(one: LoRA, other: LoRA) -> Overlap | None:
    """How two LoRAs meet; None where they touch no layer of one shape together."""
    shared = [n for n in one if n in other and one[n].shape == other[n].shape]
    met = [(decompose(one[n]), decompose(other[n]), n) for n in shared]
    met = [(a, b, n) for a, b, n in met if len(a.s) and len(b.s)]
    if not met:
        return None
    inputs = [_cosines(a.Vh.T, b.Vh.T) for a, b, _ in met]
    outputs = [_cosines(a.U, b.U) for a, b, _ in met]
    chance = [max(len(a.s), len(b.s)) / a.Vh.shape[1] for a, b, _ in met]
    return Overlap(
        layers=len(met),
        inputs=_mean(float(c.square().mean()) for c in inputs),
        outputs=_mean(float(c.square().mean()) for c in outputs),
        chance=_mean(chance),
        nearest=max(float(c.max()) for c in inputs),
        cosine=_mean(float(inner(one[n], other[n])) / float(a.s.norm() * b.s.norm()) for a, b, n in met),
    )


def _cosines(A: Tensor, B: Tensor) -> Tensor:
    """Cosines of the principal angles between the columns of A and of B, each orthonormal (Björck and Golub, 1973)."""
    return torch.linalg.svdvals(A.T @ B).clamp(max=1.0)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
