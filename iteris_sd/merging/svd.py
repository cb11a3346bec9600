"""SVD truncation: the best approximation of the average, or the sum, of chosen rank (Eckart and Young, 1936).

| symbol | shape     | meaning                                                        |
|--------|-----------|----------------------------------------------------------------|
| S      | (out, in) | (1/N) Σ ΔW_n, or Σ ΔW_n                                        |
| k      | scalar    | the rank of the result; the largest r_n unless given           |
| ΔW     | (out, in) | Σ_{i ≤ k} s_i u_i v_iᵀ over the k largest singular values of S |

The decomposition comes from the joint factors; S is never formed.
"""

from collections.abc import Sequence
from typing import Literal

from iteris_sd.lora import LowRank
from iteris_sd.merging.decomposing import cut, decompose, widen
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, weighted_sum


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    of: Literal["average", "sum"] = "average",
    rank: int | None = None,
) -> Solution:
    """Cut the average or sum of one layer's adapters to ``rank``. Raises UserError when one is not finite."""
    weights = [1 / len(adapters) if of == "average" else 1.0] * len(adapters)
    joint = weighted_sum([widen(adapter) for adapter in adapters], weights).adapter
    return cut(decompose(joint), rank or max(adapter.rank for adapter in adapters), weights)
