"""TSV-Merge: each task's strongest singular vectors, made orthogonal to the other tasks' (arXiv 2412.00081).

| symbol     | shape               | meaning                                                              |
|------------|---------------------|----------------------------------------------------------------------|
| k_n        | scalar              | ⌊share · rank of ΔW_n⌋, one at least; share is 1/N in the paper      |
| U_n, s_n   | (out, k_n), k_n     | the k_n largest singular values of ΔW_n and their vectors            |
| Û, Ŝ, V̂    | (·, K), K = Σ k_n   | [U_1 … U_N], [s_1 … s_N], [V_1 … V_N]                                |
| U⊥, V⊥     | (·, K)              | Û (ÛᵀÛ)^(-1/2), V̂ (V̂ᵀV̂)^(-1/2): the nearest orthonormal columns      |
| ΔW         | (out, in)           | ΔW = λ U⊥ diag(Ŝ) V⊥ᵀ, rank K, exact                                 |

The paper counts a share of all min(out, in) singular values; a LoRA has r_n that are not zero, and the share is
taken of those.
"""

from collections.abc import Sequence

import torch

from iteris_sd.lora import LowRank
from iteris_sd.merging.decomposing import Decomposition, decompose, orthogonalised
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    share: float | None = None,
    scale: float = 1.0,
) -> Solution:
    """Merge the adapters of one layer by TSV-Merge; exact. Raises UserError when an adapter is not finite."""
    found = [decompose(adapter) for adapter in adapters]
    kept = [task.first(_kept(len(task.s), len(adapters), share)) for task in found]
    U = orthogonalised(torch.cat([task.U for task in kept], dim=1))
    V = orthogonalised(torch.cat([task.Vh.T for task in kept], dim=1))
    s = torch.cat([task.s for task in kept])
    merged = Decomposition(U, s, V.T).low_rank()
    return Solution(merged.scaled(scale), weights=(scale,) * len(adapters))


def _kept(rank: int, tasks: int, share: float | None) -> int:
    """k_n of a task of this rank."""
    return max(1, rank // tasks if share is None else int(share * rank))
