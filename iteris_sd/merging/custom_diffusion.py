"""Custom Diffusion's merging of cross-attention K and V: constrained least squares (arXiv 2212.04488, eq. 4).

| symbol | shape     | meaning                                                                            |
|--------|-----------|------------------------------------------------------------------------------------|
| C_n    | (s, in)   | text states of concept n's own words, in its own model                             |
| K_n    | (in, in)  | C_nᵀC_n                                                                            |
| G      | (in, in)  | C_regᵀC_reg, of the text states of generic captions in the base model, regularised |
| ε      | scalar    | ``slack`` · tr ΣK_n / tr G                                                         |
| ΔW     | (out, in) | min ‖ΔW C_regᵀ‖²_F subject to ΔW C_nᵀ = ΔW_n C_nᵀ for all n                        |

The paper solves for the full weight with W0; in terms of ΔW its base drops out. The constraint depends on C_n through
K_n alone, as the limit ε → 0 of ΔWᵀ = (Σ K_n + ε G)⁻¹ Σ K_n ΔW_nᵀ. A small ε instead of the limit also answers where
two concepts ask different things of the same words. The paper merges what Custom Diffusion trains, K and V; other
layers of the LoRAs are averaged.
"""

from collections.abc import Sequence

import torch

from iteris_sd.lora import LowRank
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, regularised_sum, solve_terms

RIDGE = 1e-6  # of G: captions are many and alike


def solve(
    adapters: Sequence[LowRank], moments: Sequence[Moments], *, generic: Moments, slack: float = 1e-4
) -> Solution:
    """Merge the adapters of one layer from the moments of the concepts' own words; exact, rank Σ r_n.

    ``generic``: the moments of generic captions. Raises UserError when the system is singular or not finite.
    """
    K = torch.stack([m.own for m in moments]).sum(0)
    G = regularised_sum([(1.0, generic.own)], RIDGE)
    A = K + slack * K.trace() / G.trace() * G
    terms = [(a.up, m.own @ a.down.to(A).T) for a, m in zip(adapters, moments, strict=True)]
    merged, condition = solve_terms(A, terms)
    return Solution(merged, weights=(1.0,) * len(adapters), condition=condition)
