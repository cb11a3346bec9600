"""IterIS within the space that the LoRAs' down matrices span: a system of Σ r_n unknowns instead of ``in``.

| symbol     | shape     | meaning                                                                    |
|------------|-----------|----------------------------------------------------------------------------|
| D          | (Σr, in)  | all down_n, stacked                                                        |
| Q          | (k, in)   | orthonormal rows that span those of D, k ≤ Σ r_n                           |
| X_n Qᵀ     | (m, k)    | what of a layer's inputs the LoRAs can see at all                          |
| ΔW         | (out, in) | up_cat R D, R the least-squares solution of eq. 5 among all (Σr, Σr)       |

Since ΔW_n = (ΔW_n Qᵀ) Q, eqs. 6 to 8 of arXiv 2411.15231 hold as they are for X_n Qᵀ, X̃_n Qᵀ and ΔW_n Qᵀ; their
solution times Q is ΔW. With X̃ = X and λ = 1 this is SSR-Merge (arXiv 2606.10617). Q instead of D as coordinates
makes the regularisation independent of how a LoRA's size is shared between its two factors.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from iteris_sd.lora import LowRank
from iteris_sd.merging import iteris
from iteris_sd.merging.decomposing import Decomposition, decompose
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments],
    *,
    alpha: float = 1e-4,
    weights: Literal["adaptive", "uniform"] = "adaptive",
    coefficients: Sequence[float] | None = None,
) -> Solution:
    """Merge the adapters of one layer by IterIS in rank space; exact, rank Σ r_n. Raises UserError as IterIS does."""
    Q = _rows(adapters).to(moments[0].own)
    found = iteris.solve(
        [LowRank(a.down.to(Q) @ Q.T, a.up.to(Q)) for a in adapters],
        [_seen(m, Q) for m in moments],
        alpha=alpha,
        weights=weights,
        coefficients=coefficients,
    )
    merged = LowRank(found.adapter.down @ Q.to(found.adapter.down), found.adapter.up)
    return Solution(merged, found.weights, found.dropped, condition=found.condition)


def _rows(adapters: Sequence[LowRank]) -> Tensor:
    """Q: of each adapter its live right singular vectors, of all these an orthonormal basis; one row at least."""
    width = adapters[0].shape[1]
    live = Decomposition.of(torch.cat([decompose(a).Vh for a in adapters])).Vh
    return live if len(live) else torch.eye(1, width, dtype=live.dtype, device=live.device)


def _seen(m: Moments, Q: Tensor) -> Moments:
    """The moments of X Qᵀ and X̃ Qᵀ."""
    own = Q @ m.own @ Q.T
    cross, merged = (own, own) if m.same else (Q @ m.cross @ Q.T, Q @ m.merged @ Q.T)
    return Moments(own, cross, merged, m.count, rounding=m.rounding)
