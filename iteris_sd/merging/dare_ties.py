"""DARE, then TIES: drop entries at random, rescale the others, elect signs (arXiv 2311.03099 with 2306.01708).

| symbol | shape     | meaning                                                                       |
|--------|-----------|-------------------------------------------------------------------------------|
| p      | scalar    | drop rate                                                                     |
| M_n    | (out, in) | Bernoulli(1 − p), seeded for each layer and concept by itself                 |
| D_n    | (out, in) | M_n ⊙ ΔW_n / (1 − p), trimmed to a share ``density`` of its entries           |
| ΔW     | (out, in) | λ times the mean of the D_n that agree with the elected sign, as in ``ties``  |

The authors trim after dropping; PEFT and mergekit let the drop stand in for it, which is density 1, the default.
The result is dense, and cut to a rank.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from iteris_sd.lora import LowRank
from iteris_sd.merging import ties
from iteris_sd.merging.decomposing import cut_dense, dense
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution
from iteris_sd.merging.sparsifying import drop_and_rescale, seed_for, trim


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    p: float = 0.2,
    density: float = 1.0,
    majority_sign: Literal["total", "count"] = "total",
    scale: float = 1.0,
    seed: int = 0,
    rank: int | None = None,
) -> Solution:
    """Merge the thinned adapters of one layer by TIES, cut to ``rank``, Σ r_n unless given.

    Raises UserError when an adapter is not finite.
    """
    thinned = [drop_and_rescale(dense(a), p, seed_for(a, seed)) for a in adapters]
    merged = scale * ties.merge(torch.stack([trim(D, density) for D in thinned]), majority_sign)
    return cut_dense(merged, adapters, rank, [scale] * len(adapters))
