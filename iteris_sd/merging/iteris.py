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
    base: Tensor | None = None,
    alpha: float = 1e-4,
    alpha_merged: float | None = None,
    weights: Literal["adaptive", "uniform"] = "adaptive",
    adaptive_on: Literal["adapter", "full"] = "adapter",
    mix: float = 0.0,
    coefficients: Sequence[float] | None = None,
) -> Solution:
    """Merge the adapters of one layer by eqs. 6 to 8; exact, rank Σ r_n.

    ``alpha`` regularises C, ``alpha_merged`` S, with ``alpha`` if not given. ``adaptive_on``: what W_n of eq. 8 is,
    the adapter ΔW_n (the paper's text) or W0 + ΔW_n (the authors' code; ``base`` is W0, (out, in)). ``mix``: ρ of
    X̃ ← (1−ρ)X̃ + ρX (the authors' code, ``reg_ceof``).

    A term whose adaptive weight is 0/0 (ΔW_n or X_n ΔW_nᵀ vanishes), or whose coefficient is 0, is dropped
    and reported; with no term left the result is zero. Raises UserError when the system is singular (α too
    small) or not finite.
    """
    full = base if adaptive_on == "full" else None
    lambdas, dropped = weigh(adapters, moments, weights, coefficients, full)
    kept = [n for n in range(len(adapters)) if n not in dropped]
    if not kept:
        return Solution(LowRank.concatenate([a.scaled(0.0) for a in adapters]), lambdas, dropped)
    mixed = {n: moments[n].mixed(mix) for n in kept}
    ridge = alpha if alpha_merged is None else alpha_merged
    A = torch.stack([lambdas[n] * regularised(mixed[n].merged, ridge) for n in kept]).sum(0)
    terms = [(adapters[n], lambdas[n] * regularised(mixed[n].cross, alpha)) for n in kept]
    merged, condition = solve_terms(A, terms)
    return Solution(merged, lambdas, dropped, condition=condition)


def weigh(
    adapters: Sequence[LowRank],
    moments: Sequence[Moments],
    weights: Literal["adaptive", "uniform"],
    coefficients: Sequence[float] | None,
    base: Tensor | None = None,
) -> tuple[tuple[float, ...], dict[int, str]]:
    """λ_n of every term, 0 for the dropped ones, and the reason of each drop."""
    coefficients = coefficients if coefficients is not None else (1.0,) * len(adapters)
    lambdas, dropped = [], {}
    for n, (adapter, m, coefficient) in enumerate(zip(adapters, moments, coefficients, strict=True)):
        weight = adaptive_weight(adapter, m.own, base) if weights == "adaptive" else 1.0
        if not coefficient:
            dropped[n] = "its coefficient is 0"
        elif not weight:
            dropped[n] = "its weight change, or what that does to its own samples, vanishes"
        lambdas.append(coefficient * weight)
    return tuple(lambdas), dropped


def regularised(M: Tensor, alpha: float) -> Tensor:
    """M + α‖M‖_F I (eq. 7)."""
    return M + alpha * M.norm() * torch.eye(len(M), dtype=M.dtype, device=M.device)
