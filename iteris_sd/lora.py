"""The value everything passes along: {layer name: LowRank(down, up)} and its algebra.

Row-vector convention, as in torch: a linear layer computes ``x @ W.T``.

| symbol | shape              | meaning                                        |
|--------|--------------------|------------------------------------------------|
| down   | (r, in)            | first factor of the adapter                    |
| up     | (out, r)           | second factor, scale already applied           |
| ΔW     | (out, in)          | ``up @ down``, what the adapter adds to W0     |
| M      | (in, in)           | a second moment of layer inputs, such as XᵀX   |

A layer's name is ``<component>.<module path>``, components being ``unet`` and ``text_encoder``:
``unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k``,
``text_encoder.encoder.layers.0.self_attn.q_proj`` (no ``text_model.``, whatever the file or the module says).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

TARGETS: Mapping[str, "re.Pattern[str]"] = MappingProxyType(
    {
        "all": re.compile(r".*"),
        "text_encoder": re.compile(r"text_encoder\..*"),
        "cross_attention": re.compile(r".*\.attn2\.to_[kv]"),
        "text": re.compile(r"text_encoder\..*|.*\.attn2\.to_[kv]"),
    }
)  # parts of a model that can be meant; the last three see nothing but text

_BLOCKS = {
    "text_encoder.": "text_encoder",
    "unet.mid_block": "mid",
    "unet.up_blocks": "up",
    "unet.conv_out": "up",
}


def block(name: str) -> str:
    """The part of the model that a layer belongs to: text_encoder, down, mid or up.

    What the U-Net does before its blocks counts as down.
    """
    return next((block for start, block in _BLOCKS.items() if name.startswith(start)), "down")


@dataclass(frozen=True, eq=False)
class LowRank:
    """An exact low-rank change of one layer's weight: ΔW = up @ down.

    Raises ValueError when the two factors do not fit each other.
    """

    down: Tensor
    up: Tensor

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise ValueError(
                f"expected (r, in) and (out, r), got {tuple(self.down.shape)} and {tuple(self.up.shape)}"
            )

    @property
    def rank(self) -> int:
        """r, the number of rows of ``down`` (an upper bound on the rank of ΔW)."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of ΔW."""
        return self.up.shape[0], self.down.shape[1]

    @staticmethod
    def nothing(like: "LowRank") -> "LowRank":
        """ΔW = 0 of rank 0, in the shape and dtype of another adapter."""
        return LowRank(like.down[:0], like.up[:, :0])

    def delta(self) -> Tensor:
        """ΔW itself, (out, in), which takes far more memory than its factors."""
        return self.up @ self.down

    def apply(self, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output: ``x @ ΔW.T``, (…, in) -> (…, out)."""
        return (x @ self.down.T) @ self.up.T

    def scaled(self, c: float) -> "LowRank":
        """c·ΔW."""
        return LowRank(self.down, self.up * c)

    def padded(self, rank: int) -> "LowRank":
        """The same ΔW written with ``rank`` ≥ r rows, the new ones zero."""
        extra = rank - self.rank
        return LowRank(
            torch.nn.functional.pad(self.down, (0, 0, 0, extra)), torch.nn.functional.pad(self.up, (0, extra))
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LowRank":
        """The same adapter on another device or in another dtype.

        Into float16 the factors come equally large: below 6e-5 it loses digits, and trained ups are often that small.
        """
        if dtype == torch.float16 != self.up.dtype:
            self = self.balanced()
        return LowRank(self.down.to(device=device, dtype=dtype), self.up.to(device=device, dtype=dtype))

    def wide(self) -> "LowRank":
        """The same adapter in float64; on the CPU where the device has none."""
        return LowRank(wide(self.down), wide(self.up))

    def balanced(self) -> "LowRank":
        """The same ΔW with factors of about one size in the root mean square; as it is where one of them is zero."""
        sizes = [
            float(factor.detach().float().square().mean().sqrt()) if factor.numel() else 0.0
            for factor in (self.down, self.up)
        ]
        if not min(sizes) > 0:
            return self
        share = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)  # a power of two costs no digit
        return LowRank(self.down * share, self.up / share)

    @staticmethod
    def concatenate(adapters: "Sequence[LowRank]") -> "LowRank":
        """Σ ΔW_n exactly, rank Σ r_n. Raises ValueError when the shapes differ or nothing is given."""
        shapes = {adapter.shape for adapter in adapters}
        if len(shapes) != 1:
            raise ValueError(f"adapters of one layer must agree in shape, got {sorted(shapes)}")
        return LowRank(torch.cat([a.down for a in adapters]), torch.cat([a.up for a in adapters], dim=1))


def inner(a: LowRank, b: LowRank, M: Tensor | None = None) -> Tensor:
    """tr(ΔW_a M ΔW_bᵀ) from the factors alone, M being the identity unless given; a float64 scalar.

    With ``a is b`` and M = XᵀX this is ‖X ΔWᵀ‖²_F; without M it is the Frobenius inner product.
    """
    device = a.down.device if M is None else M.device
    a, b = a.to(device).wide(), b.to(device).wide()
    left = a.down if M is None else a.down @ wide(M)
    return ((left @ b.down.T) * (a.up.T @ b.up)).sum()


def wide(x: Tensor) -> Tensor:
    """x in float64; on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@dataclass(frozen=True, eq=False)
class LoRA(Mapping[str, LowRank]):
    """One adapter per layer, a read-only mapping from layer name to LowRank.

    ``kernels``: (height, width) of the kernel where the layer is a convolution; its ``down`` is then (r, channels,
    height, width), flattened. Those of layers that are not there are forgotten.
    """

    layers: Mapping[str, LowRank]
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        kernels = {name: kernel for name, kernel in self.kernels.items() if name in self.layers}
        object.__setattr__(self, "kernels", MappingProxyType(kernels))

    def __reduce__(self) -> tuple[Any, ...]:  # read-only views cannot be pickled
        return LoRA, (dict(self.layers), dict(self.kernels))

    def __getitem__(self, name: str) -> LowRank:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """down and up of a layer as files hold them: with kernels, (r, in, h, w) and (out, r, 1, 1), if it has one."""
        adapter, kernel = self.layers[name], self.kernels.get(name)
        if kernel is None:
            return adapter.down, adapter.up
        return adapter.down.unflatten(1, (-1, *kernel)), adapter.up[:, :, None, None]

    def scaled(self, c: float) -> "LoRA":
        """c·ΔW in every layer: a concept's *weight*."""
        if c == 1.0:
            return self
        return LoRA({name: adapter.scaled(c) for name, adapter in self.items()}, self.kernels)

    def scaled_by_block(self, weights: Mapping[str, float]) -> "LoRA":
        """ΔW times the weight of each layer's `block`; layers of a block with the weight 0 are left out."""
        if all(weight == 1.0 for weight in weights.values()):
            return self
        kept = {name: (adapter, weights[block(name)]) for name, adapter in self.items()}
        return LoRA({name: adapter.scaled(w) for name, (adapter, w) in kept.items() if w}, self.kernels)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LoRA":
        """The same LoRA on another device or in another dtype."""
        return LoRA({name: adapter.to(device, dtype) for name, adapter in self.items()}, self.kernels)

    def parts(self) -> dict[str, "LoRA"]:
        """The LoRA split by component: {"unet": …, "text_encoder": …}, names unchanged."""
        components = dict.fromkeys(name.partition(".")[0] for name in self)
        return {
            c: LoRA({n: a for n, a in self.items() if n.partition(".")[0] == c}, self.kernels)
            for c in components
        }


def working_dtype(adapters: Sequence[LowRank]) -> torch.dtype:
    """The dtype a result made from these adapters is kept in: theirs, and float32 at least."""
    return reduce(torch.promote_types, (t.dtype for a in adapters for t in (a.down, a.up)), torch.float32)
