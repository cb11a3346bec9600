"""KnOTS: weight changes aligned in a shared basis by SVD, and TIES there (arXiv 2410.19735).

| symbol | shape       | meaning                                                                             |
|--------|-------------|-------------------------------------------------------------------------------------|
| H      | (out, N in) | [ΔW_1 … ΔW_N] = U diag(σ) [V_1ᵀ … V_Nᵀ], live directions only                       |
| U, σ   | (out, k), k | shared by all concepts                                                              |
| V_nᵀ   | (k, in)     | what belongs to concept n                                                           |
| T      | (k, in)     | the V_nᵀ merged by TIES                                                             |
| ΔW     | (out, in)   | ΔW = λ U diag(σ) T, rank k ≤ Σ r_n, exact                                           |

The paper merges V_nᵀ ("shared" σ); the authors' code merges diag(σ) V_nᵀ and ends in ΔW = λ U T ("merged" σ).

H is never formed: with down_nᵀ = Q_n R_n it is [up_n R_nᵀ]_n · blockdiag(Q_nᵀ), and the second factor has
orthonormal rows. So the decomposition of the first, (out, Σ r_n), gives U, σ and W, and V_nᵀ = W_nᵀ Q_nᵀ.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from iteris_sd.lora import LowRank
from iteris_sd.merging import ties
from iteris_sd.merging.decomposing import Decomposition, widen
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution
from iteris_sd.merging.sparsifying import trim

_ROUNDING = 1e-12  # of entries of orthonormal rows; what is nothing must have no sign


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    density: float = 0.2,
    majority_sign: Literal["total", "count"] = "total",
    scale: float = 1.0,
    sigma: Literal["shared", "merged"] = "shared",
) -> Solution:
    """Merge the adapters of one layer by KnOTS-TIES; exact. Raises UserError when an adapter is not finite."""
    wide = [widen(adapter) for adapter in adapters]
    Q, R = zip(*(torch.linalg.qr(adapter.down.T) for adapter in wide), strict=True)
    blocks = [adapter.up @ r.T for adapter, r in zip(wide, R, strict=True)]
    joint = Decomposition.of(torch.cat(blocks, dim=1))
    W = joint.Vh.split([block.shape[1] for block in blocks], dim=1)
    V = [_live(w @ q.T) for w, q in zip(W, Q, strict=True)]
    if sigma == "merged":
        V = [joint.s[:, None] * v for v in V]
    T = ties.merge(torch.stack([trim(v, density) for v in V]), majority_sign)
    up = joint.U * joint.s if sigma == "shared" else joint.U
    merged = LowRank(T, scale * up).padded(max(1, len(T)))
    return Solution(merged, weights=(scale,) * len(adapters))


def _live(V: Tensor) -> Tensor:
    return torch.where(V.abs() < _ROUNDING, 0.0, V)
