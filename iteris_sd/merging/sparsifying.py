"""Making weight changes sparse before they are merged: by magnitude, or at random.

| symbol  | shape | meaning                                                                |
|---------|-------|------------------------------------------------------------------------|
| D       | any   | a weight change ΔW_n, or its coordinates in some basis                  |
| density | [0,1] | share of the entries that trimming keeps, one at least                 |
| p       | [0,1) | probability of an entry to be dropped; the others grow by 1 / (1 − p)  |

The papers trim over all of a model's parameters at once; here each layer is trimmed by itself, as PEFT does.
"""

from hashlib import blake2b

import torch
from torch import Tensor

from iteris_sd.lora import LowRank

EQUAL = 1e-9  # relative difference below which two entries are the same but for float64 rounding


def trim(D: Tensor, density: float) -> Tensor:
    """D with only its largest entries, round(density · entries) of them and one at least.

    Entries that are as large as the last of them, up to rounding, stay too, so that no order decides between equals.
    (Magnitude pruning, arXiv 1506.02626; the first step of TIES, arXiv 2306.01708.)
    """
    if not D.numel():
        return D
    kept = max(1, round(density * D.numel()))
    size = D.abs()
    threshold = size.flatten().kthvalue(D.numel() - kept + 1).values
    return torch.where(size >= threshold * (1 - EQUAL), D, 0.0)


def drop_and_rescale(D: Tensor, p: float, seed: int) -> Tensor:
    """M ⊙ D / (1 − p) with M ~ Bernoulli(1 − p) drawn on the CPU, the same on every device (DARE, arXiv 2311.03099)."""
    draw = torch.rand(D.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where((draw >= p).to(D.device), D / (1 - p), 0.0)


def seed_for(adapter: LowRank, seed: int) -> int:
    """A seed of this adapter's own, from ``seed``, the adapter's shape and the signs of its factors.

    So each layer of each concept gets its own mask, whatever the order or the number of concepts. Signs, since
    they stay when a concept's weight, the dtype, the device, or the scale of up against down changes.
    """
    digest = blake2b(f"{seed} {adapter.shape} {adapter.rank}".encode(), digest_size=8)
    for factor in (adapter.down, adapter.up):
        digest.update((factor > 0).cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")
