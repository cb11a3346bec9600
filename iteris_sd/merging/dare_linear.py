"""DARE, then the average: drop entries at random, rescale the others (arXiv 2311.03099).

| symbol | shape     | meaning                                                                       |
|--------|-----------|-------------------------------------------------------------------------------|
| p      | scalar    | drop rate                                                                     |
| M_n    | (out, in) | Bernoulli(1 − p), seeded for each layer and concept by itself                 |
| D_n    | (out, in) | M_n ⊙ ΔW_n / (1 − p), whose expectation is ΔW_n                               |
| ΔW     | (out, in) | ΔW = λ · (1/N) Σ D_n                                                          |

λ = 1 averages, λ = N sums (the paper's task arithmetic with DARE at scale 1). The result is dense, and cut to a
rank.
"""

from collections.abc import Sequence

import torch

from iteris_sd.lora import LowRank
from iteris_sd.merging.decomposing import cut_dense, dense
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution
from iteris_sd.merging.sparsifying import drop_and_rescale, seed_for


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    p: float = 0.2,
    scale: float = 1.0,
    seed: int = 0,
    rank: int | None = None,
) -> Solution:
    """Average the thinned adapters of one layer, cut to ``rank``, Σ r_n unless given.

    Raises UserError when an adapter is not finite.
    """
    thinned = torch.stack([drop_and_rescale(dense(a), p, seed_for(a, seed)) for a in adapters])
    share = scale / len(adapters)
    return cut_dense(share * thinned.sum(0), adapters, rank, [share] * len(adapters))
