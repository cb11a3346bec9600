"""Singular value decompositions of adapters without forming them, and of dense results, cut to a rank.

| symbol    | shape                     | meaning                                                        |
|-----------|---------------------------|----------------------------------------------------------------|
| ΔW        | (out, in)                 | up @ down, an adapter of rank r, or a dense result             |
| U, s, Vh  | (out, k), (k,), (k, in)   | its decomposition over the live directions, s descending       |
| ΔW_k      | (out, in)                 | its best approximation of rank k (Eckart and Young, 1936)      |

Live directions are those with s > ``DEAD`` · s_max. The others are rounding: their singular vectors are
arbitrary, and a method that treats all directions alike (KnOTS, TSV-Merge, Iso-C) must not see them.

The decomposition of up @ down: with up = Q_u R_u and downᵀ = Q_d R_d, it is that of the small core R_u R_dᵀ
between Q_u and Q_dᵀ. Everything here is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_sd.lora import LowRank
from iteris_sd.merging.solving import Solution, check_finite

DEAD = 1e-12  # far above the rounding of float64 (1e-16), far below that of stored adapters (1e-7 at best)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """ΔW = U diag(s) Vh over its live directions; of zero there are none."""

    U: Tensor
    s: Tensor
    Vh: Tensor

    @staticmethod
    def of(M: Tensor) -> "Decomposition":
        """The decomposition of a matrix."""
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        live = int((s > DEAD * s[:1]).sum())
        return Decomposition(U[:, :live], s[:live], Vh[:live])

    def first(self, rank: int) -> "Decomposition":
        """ΔW_k with k = ``rank``, or all there is where that is less."""
        return Decomposition(self.U[:, :rank], self.s[:rank], self.Vh[:rank])

    def truncation(self, rank: int) -> float:
        """‖ΔW − ΔW_k‖_F / ‖ΔW‖_F with k = ``rank``; 0 for zero."""
        return float(self.s[rank:].norm() / self.s.norm()) if len(self.s) else 0.0

    def low_rank(self) -> LowRank:
        """ΔW as an adapter, the two factors of equal size; of rank 1 at least, so that zero can be stored."""
        root = self.s.sqrt()
        return LowRank(root[:, None] * self.Vh, self.U * root).padded(max(1, len(root)))


def widen(adapter: LowRank) -> LowRank:
    """The adapter in float64. Raises UserError when it is not finite."""
    check_finite([adapter])
    return adapter.wide()


def dense(adapter: LowRank) -> Tensor:
    """ΔW (out, in) in float64. Raises UserError when it is not finite."""
    return widen(adapter).delta()


def decompose(adapter: LowRank) -> Decomposition:
    """The decomposition of an adapter from its factors alone. Raises UserError when it is not finite."""
    wide = widen(adapter)
    Q_u, R_u = torch.linalg.qr(wide.up)
    Q_d, R_d = torch.linalg.qr(wide.down.T)
    core = Decomposition.of(R_u @ R_d.T)
    return Decomposition(Q_u @ core.U, core.s, core.Vh @ Q_d.T)


def orthogonalised(A: Tensor) -> Tensor:
    """The orthonormal columns nearest to those of A (orthogonal Procrustes): A (AᵀA)^(-1/2), on A's live directions."""
    found = Decomposition.of(A)
    return found.U @ found.Vh


def cut(found: Decomposition, rank: int, weights: Sequence[float]) -> Solution:
    """ΔW_k with k = ``rank`` as a solution, its truncation reported."""
    return Solution(found.first(rank).low_rank(), tuple(weights), truncation=found.truncation(rank))


def cut_dense(D: Tensor, adapters: Sequence[LowRank], rank: int | None, weights: Sequence[float]) -> Solution:
    """A dense result made of ``adapters`` as a solution of ``rank``, Σ r_n unless given, its truncation reported."""
    return cut(Decomposition.of(D), rank or sum(adapter.rank for adapter in adapters), weights)
