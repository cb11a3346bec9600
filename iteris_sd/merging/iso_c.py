"""Iso-C: the sum of weight changes with all its singular values made equal (arXiv 2502.04959).

| symbol  | shape                   | meaning                                                               |
|---------|-------------------------|-----------------------------------------------------------------------|
| U, s, V | (out, k), k, (in, k)    | Σ ΔW_n = U diag(s) Vᵀ over its k ≤ Σ r_n live directions              |
| ΔW      | (out, in)               | ΔW = λ · mean(s) · U Vᵀ, rank k, exact                                |

The paper takes the mean over all min(out, in) directions of a fine-tuned layer and lets every one of them live. A sum
of LoRAs has Σ r_n at most; the others have no singular vectors of their own, so here they stay out of both.
"""

from collections.abc import Sequence

from iteris_sd.lora import LowRank
from iteris_sd.merging.decomposing import Decomposition, decompose
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, weighted_sum


def solve(
    adapters: Sequence[LowRank], moments: Sequence[Moments] | None = None, *, scale: float = 1.0
) -> Solution:
    """Merge the adapters of one layer by Iso-C; exact. Raises UserError when an adapter is not finite."""
    joint = decompose(weighted_sum(adapters, [1.0] * len(adapters)).adapter)
    flat = joint.s.mean().expand(len(joint.s))
    merged = Decomposition(joint.U, flat, joint.Vh).low_rank()
    return Solution(merged.scaled(scale), weights=(scale,) * len(adapters))
