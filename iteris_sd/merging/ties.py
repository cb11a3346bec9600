"""TIES-Merging: trim, elect a sign, average what agrees with it (arXiv 2306.01708, algorithm 1).

| symbol | shape     | meaning                                                                        |
|--------|-----------|--------------------------------------------------------------------------------|
| D_n    | (out, in) | ΔW_n with only its largest entries, a share ``density`` of them                |
| γ      | (out, in) | elected sign: sgn Σ D_n ("total"), or sgn Σ sgn D_n ("count")                  |
| A      | set       | at each entry, the concepts n with sgn D_n = γ                                 |
| ΔW     | (out, in) | λ times the mean of D_n over n ∈ A, entry by entry; 0 where A is empty         |

The paper elects by total; a count that ends in a draw is decided by it. Where the total is 0, so is ΔW; the authors'
code gives such entries the sign that most of the layer has. The result is dense, and cut to a rank.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from iteris_sd.lora import LowRank
from iteris_sd.merging.decomposing import cut_dense, dense
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution
from iteris_sd.merging.sparsifying import trim


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    density: float = 0.2,
    majority_sign: Literal["total", "count"] = "total",
    scale: float = 1.0,
    rank: int | None = None,
) -> Solution:
    """Merge the adapters of one layer by TIES, cut to ``rank``, Σ r_n unless given.

    Raises UserError when an adapter is not finite.
    """
    trimmed = torch.stack([trim(dense(adapter), density) for adapter in adapters])
    merged = scale * merge(trimmed, majority_sign)
    return cut_dense(merged, adapters, rank, [scale] * len(adapters))


def merge(D: Tensor, majority_sign: Literal["total", "count"]) -> Tensor:
    """The mean over the concepts that agree with the elected sign, (N, …) -> (…)."""
    agrees = D.sign() == elect(D, majority_sign)
    return torch.where(agrees, D, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def elect(D: Tensor, majority_sign: Literal["total", "count"]) -> Tensor:
    """γ, the sign of each entry that outweighs or outnumbers the other: (N, …) -> (…); 0 for a draw."""
    total = D.sum(0).sign()
    if majority_sign == "total":
        return total
    count = D.sign().sum(0).sign()
    return torch.where(count == 0, total, count)
