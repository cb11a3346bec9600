"""Gradient fusion of Mix-of-Show: RegMean's objective, descended by L-BFGS from the base model (arXiv 2305.18292).

| symbol | shape     | meaning                                                                           |
|--------|-----------|-----------------------------------------------------------------------------------|
| f      | scalar    | Σ_n ‖X_n ΔW_nᵀ − X_n ΔWᵀ‖²_F, divided so that its first gradient has 1-norm ≤ 1     |
| U      | (out, k)  | orthonormal basis of the outputs of all ΔW_n, k ≤ Σ r_n                           |
| Y      | (k, in)   | ΔW = U Y; from ΔW = 0 no gradient leaves that form, so nothing is lost by it      |

L-BFGS magnifies rounding from step to step: after dozens, another order of the concepts gives a ΔW that serves as well
but agrees to three digits only. Stopping after few steps is what regularises it: inputs that the samples hardly show
stay as in the base model. The authors divide f by the number of entries; dividing by the gradient's size makes the
first step, and thus all, independent of the units of ΔW and X.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from iteris_sd.errors import UserError
from iteris_sd.lora import LowRank
from iteris_sd.merging.decomposing import Decomposition, widen
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution

HISTORY = 25  # steps that L-BFGS remembers, as in the authors' code


def solve(adapters: Sequence[LowRank], moments: Sequence[Moments], *, steps: int = 50) -> Solution:
    """Merge the adapters of one layer by ``steps`` steps of L-BFGS; rank Σ r_n at most.

    Raises UserError when adapters or samples are not finite.
    """
    if not all(bool(m.own.isfinite().all()) for m in moments):
        raise UserError("the moments of its inputs are not finite; use float32 or other samples.")
    wide = [widen(adapter).to(m.own.device) for adapter, m in zip(adapters, moments, strict=True)]
    U = _outputs(wide)
    targets = [(U.T @ a.up) @ a.down for a in wide]
    Y = _descended(targets, [m.own for m in moments], steps)
    return Solution(LowRank(Y, U), weights=(1.0,) * len(adapters))


def _outputs(adapters: Sequence[LowRank]) -> Tensor:
    """U, from the deltas alone: it does not depend on their order, nor on how they are factored."""
    factors = [a.up @ torch.linalg.qr(a.down.T).R.T for a in adapters]
    U = Decomposition.of(torch.cat(factors, dim=1)).U
    return U if U.shape[1] else torch.eye(len(U), 1, dtype=U.dtype, device=U.device)


def _descended(targets: Sequence[Tensor], grams: Sequence[Tensor], steps: int) -> Tensor:
    """Y after ``steps`` steps on Σ_n tr((Y − T_n) G_n (Y − T_n)ᵀ) from 0; T_n (k, in), G_n (in, in)."""
    first = 2 * torch.stack([T @ G for T, G in zip(targets, grams, strict=True)]).sum(0)
    size = float(first.norm()) * first.numel() ** 0.5
    Y = torch.zeros_like(targets[0], requires_grad=True)
    if not size:
        return Y.detach()
    optimizer = torch.optim.LBFGS(
        [Y],
        max_iter=steps,
        max_eval=10 * steps,
        history_size=HISTORY,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        apart = [Y.detach() - T for T in targets]
        pulls = [E @ G for E, G in zip(apart, grams, strict=True)]
        Y.grad = 2 * torch.stack(pulls).sum(0) / size
        return torch.stack([(E * P).sum() for E, P in zip(apart, pulls, strict=True)]).sum() / size

    optimizer.step(evaluate)
    return Y.detach()
