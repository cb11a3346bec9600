"""RegMean: match each LoRA's outputs on its own inputs (arXiv 2212.09849, eq. 2, off-diagonal scaling).

| symbol | shape     | meaning                                                     |
|--------|-----------|-------------------------------------------------------------|
| G_n    | (in, in)  | XᵀX of concept n, off-diagonal entries times ``factor``     |
| ΔW     | (out, in) | ΔWᵀ = (Σ G_n)⁻¹ Σ G_n ΔW_nᵀ                                 |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from iteris_sd.lora import LowRank
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, solve_terms


def solve(adapters: Sequence[LowRank], moments: Sequence[Moments], *, factor: float = 0.1) -> Solution:
    """Merge the adapters of one layer by RegMean; exact, rank Σ r_n.

    Raises UserError when the system is singular (``factor`` 1 with fewer input rows than widths) or not
    finite.
    """
    grams = [shrink(m.own, factor) for m in moments]
    A = torch.stack(grams).sum(0)
    terms = [(a.up, G @ a.down.to(G).T) for a, G in zip(adapters, grams, strict=True)]
    merged, condition = solve_terms(A, terms)
    return Solution(merged, weights=(1.0,) * len(adapters), condition=condition)


def shrink(G: Tensor, factor: float) -> Tensor:
    """G (in, in) with its off-diagonal entries times ``factor``."""
    return factor * G + (1 - factor) * torch.diag(G.diagonal())
