"""Linear merging: the average of the weight changes, ΔW = (1/N) Σ_n ΔW_n (Model soups, arXiv 2203.05482).

It averages ΔW_n = up_n @ down_n, not the two factors apart, which would add cross terms up_1 @ down_2.
"""

from collections.abc import Sequence

from iteris_sd.lora import LowRank
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, weighted_sum


def solve(adapters: Sequence[LowRank], moments: Sequence[Moments] | None = None) -> Solution:
    """Average the adapters of one layer; exact, rank Σ r_n. ``moments`` is not looked at."""
    return weighted_sum(adapters, [1 / len(adapters)] * len(adapters))
