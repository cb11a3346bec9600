"""SSR-Merge, subspace signal routing: least squares in the LoRAs' joint rank space (arXiv 2606.10617).

| symbol | shape     | meaning                                                                              |
|--------|-----------|--------------------------------------------------------------------------------------|
| D, U   |           | all down_n stacked, (Σr, in); all up_n side by side, (out, Σr)                       |
| E_n    | (Σr, Σr)  | picks concept n's rows: ΔW_n = U E_n D                                               |
| ΔW     | (out, in) | U R D, R the minimiser of Σ_n ‖X_n ΔW_nᵀ − X_n ΔWᵀ‖²_F: routing times decorrelation  |

The regularisation is that of IterIS in rank space, with which it shares the solve.
"""

from collections.abc import Sequence

from iteris_sd.lora import LowRank
from iteris_sd.merging import rank_space
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution


def solve(adapters: Sequence[LowRank], moments: Sequence[Moments], *, alpha: float = 1e-4) -> Solution:
    """Merge the adapters of one layer by SSR-Merge; exact, rank Σ r_n. Raises UserError as IterIS does."""
    own = [Moments(m.own, m.own, m.own, m.count, rounding=m.rounding) for m in moments]
    return rank_space.solve(adapters, own, alpha=alpha, weights="uniform")
