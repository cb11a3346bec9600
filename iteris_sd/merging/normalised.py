"""Normalised linear arithmetic: weights that sum to 1 (the NLA baseline of Mixture of LoRA experts, arXiv 2404.13628).

| symbol | shape     | meaning                                             |
|--------|-----------|-----------------------------------------------------|
| c_n    | scalar    | coefficient of concept n, 0 or more                 |
| ΔW     | (out, in) | ΔW = Σ w_n ΔW_n with w_n = c_n / Σ c                |

The sum of c runs over the concepts whose LoRA touches the layer.
"""

from collections.abc import Sequence

from iteris_sd.lora import LowRank
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, weighted_sum


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    coefficients: Sequence[float] | None = None,
) -> Solution:
    """Average the adapters of one layer by coefficients; exact, rank Σ r_n; zero where all coefficients are.

    Raises UserError when an adapter is not finite.
    """
    coefficients = coefficients or [1.0] * len(adapters)
    total = sum(coefficients)
    return weighted_sum(adapters, [c / total if total else 0.0 for c in coefficients])
