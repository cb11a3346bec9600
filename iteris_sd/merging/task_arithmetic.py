"""Task arithmetic: a scaled sum of weight changes (Editing models with task arithmetic, arXiv 2212.04089).

| symbol | shape     | meaning                                            |
|--------|-----------|----------------------------------------------------|
| λ      | scalar    | scale of the whole                                 |
| c_n    | scalar    | coefficient of concept n; below 0 it is negated    |
| ΔW     | (out, in) | ΔW = λ Σ c_n ΔW_n                                  |
"""

from collections.abc import Sequence

from iteris_sd.lora import LowRank
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, weighted_sum


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments] | None = None,
    *,
    scale: float = 1.0,
    coefficients: Sequence[float] | None = None,
) -> Solution:
    """Sum the adapters of one layer; exact, rank Σ r_n. Raises UserError when one is not finite."""
    return weighted_sum(adapters, [scale * c for c in coefficients or [1.0] * len(adapters)])
