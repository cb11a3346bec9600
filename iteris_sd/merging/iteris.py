"""IterIS, the solve for one layer (CVPR 2025, arXiv 2411.15231); the iteration lives in ``calibration``.

| symbol | shape     | meaning                                                                     |
|--------|-----------|-----------------------------------------------------------------------------|
| X_n    | (m, in)   | inputs reaching the layer in model n (base + LoRA n) on concept n's samples |
| X̃_n    | (m, in)   | inputs reaching it in the merged model on the same samples                  |
| C_n    | (in, in)  | X̃_nᵀX_n, regularised: C_n + α‖C_n‖_F I  (eq. 7)                             |
| S_n    | (in, in)  | X̃_nᵀX̃_n, regularised: S_n + α‖S_n‖_F I  (eq. 7)                             |
| λ_n    | scalar    | ‖ΔW_n‖²_F / ‖X_n ΔW_nᵀ‖²_F  (eq. 8), times the concept's coefficient        |
| ΔW     | (out, in) | ΔWᵀ = (Σ λ_n S_n)⁻¹ Σ λ_n C_n ΔW_nᵀ  (eq. 6), the minimiser of eq. 5        |
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from iteris_sd.lora import LowRank
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, adaptive_weight, solve_terms


def solve(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments],
    *,
    alpha: float = 1e-4,
    weights: Literal["adaptive", "uniform"] = "adaptive",
    coefficients: Sequence[float] | None = None,
) -> Solution:
    """Merge the adapters of one layer by eqs. 6 to 8; exact, rank Σ r_n.

    A term whose adaptive weight is 0/0 (ΔW_n or X_n ΔW_nᵀ vanishes), or whose coefficient is 0, is dropped
    and reported; with no term left the result is zero. Raises UserError when the system is singular (α too
    small) or not finite.
    """
    lambdas, dropped = weigh(adapters, moments, weights, coefficients)
    kept = [n for n in range(len(adapters)) if n not in dropped]
    if not kept:
        return Solution(LowRank.concatenate([a.scaled(0.0) for a in adapters]), lambdas, dropped)
    A = torch.stack([lambdas[n] * regularised(moments[n].merged, alpha) for n in kept]).sum(0)
    terms = [(adapters[n], lambdas[n] * regularised(moments[n].cross, alpha)) for n in kept]
    return Solution(solve_terms(A, terms), lambdas, dropped)


def weigh(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments],
    weights: Literal["adaptive", "uniform"],
    coefficients: Sequence[float] | None,
) -> tuple[tuple[float, ...], dict[int, str]]:
    """λ_n of every term, 0 for the dropped ones, and the reason of each drop."""
    coefficients = coefficients if coefficients is not None else (1.0,) * len(adapters)
    lambdas, dropped = [], {}
    for n, (adapter, m, coefficient) in enumerate(zip(adapters, moments, coefficients, strict=True)):
        weight = adaptive_weight(adapter, m.own) if weights == "adaptive" else 1.0
        if not coefficient:
            dropped[n] = "its coefficient is 0"
        elif not weight:
            dropped[n] = "its weight change, or what that does to its own samples, vanishes"
        lambdas.append(coefficient * weight)
    return tuple(lambdas), dropped


def regularised(M: Tensor, alpha: float) -> Tensor:
    """M + α‖M‖_F I (eq. 7)."""
    return M + alpha * M.norm() * torch.eye(len(M), dtype=M.dtype, device=M.device)
