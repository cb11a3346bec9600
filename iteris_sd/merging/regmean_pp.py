"""RegMean++: RegMean on the inputs that the merged model itself produces (arXiv 2508.03121).

| symbol | shape     | meaning                                                                    |
|--------|-----------|----------------------------------------------------------------------------|
| G̃_n    | (in, in)  | X̃ᵀX̃ of concept n, off-diagonal entries times ``factor``                    |
| ΔW     | (out, in) | ΔWᵀ = (Σ G̃_n)⁻¹ Σ G̃_n ΔW_nᵀ                                                |

Unlike IterIS it asks that ΔW does to X̃ what ΔW_n would do to X̃, not what ΔW_n does to X.

The authors' code takes inputs from the merged model at the beginning of each transformer block only, and inside it from
the block with ΔW_n; they divide each Gram matrix by its rows, which matters where concepts have different numbers of
samples. Here every layer sees what the merged model gives it.
"""

from collections.abc import Sequence

from iteris_sd.lora import LowRank
from iteris_sd.merging import regmean
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution


def solve(adapters: Sequence[LowRank], moments: Sequence[Moments], *, factor: float = 0.1) -> Solution:
    """Merge the adapters of one layer by RegMean++; exact, rank Σ r_n. Raises UserError as RegMean does."""
    seen = [Moments(m.merged, m.merged, m.merged, m.count) for m in moments]
    return regmean.solve(adapters, seen, factor=factor)
