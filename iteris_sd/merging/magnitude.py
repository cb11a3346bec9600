"""Magnitude pruning, then the average (pruning: arXiv 1506.02626; of weight changes: arXiv 2311.03099).

| symbol | shape     | meaning                                                            |
|--------|-----------|--------------------------------------------------------------------|
| D_n    | (out, in) | ΔW_n with only its largest entries, a share ``density`` of them    |
| ΔW     | (out, in) | ΔW = λ · (1/N) Σ D_n                                               |

The result is dense, and cut to a rank.
"""

from collections.abc import Sequence

import torch

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
    scale: float = 1.0,
    rank: int | None = None,
) -> Solution:
    """Average the pruned adapters of one layer, cut to ``rank``, Σ r_n unless given.

    Raises UserError when an adapter is not finite.
    """
    trimmed = torch.stack([trim(dense(adapter), density) for adapter in adapters])
    share = scale / len(adapters)
    return cut_dense(share * trimmed.sum(0), adapters, rank, [share] * len(adapters))
