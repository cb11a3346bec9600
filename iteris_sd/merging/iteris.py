"""IterIS, the solve for one layer (CVPR 2025, arXiv 2411.15231); the iteration lives in ``calibration``.

| symbol | shape     | meaning                                                                     |
|--------|-----------|-----------------------------------------------------------------------------|
| X_n    | (m, in)   | inputs reaching the layer in model n (base + LoRA n) on concept n's samples |
| X̃_n    | (m, in)   | inputs reaching it in the merged model on the same samples                  |
| C_n    | (in, in)  | X̃_nᵀX_n, regularised: C_n + α‖C_n‖_F I  (eq. 7)                             |
| S_n    | (in, in)  | X̃_nᵀX̃_n, regularised: S_n + α‖S_n‖_F I  (eq. 7)                             |
| λ_n    | scalar    | ‖ΔW_n‖²_F / ‖X_n ΔW_nᵀ‖²_F  (eq. 8), times the concept's coefficient        |
| ΔW     | (out, in) | ΔWᵀ = (Σ λ_n S_n)⁻¹ Σ λ_n C_n ΔW_nᵀ  (eq. 6), the minimiser of eq. 5        |
| W0     | (out, in) | the base weight                                                             |

``objective="full"`` asks for the same of W0 + ΔW, in place of ΔW alone: Σ λ_n ‖X_n (W0 + ΔW_n)ᵀ − X̃_n (W0 + ΔW)ᵀ‖²_F.
Its minimiser is ΔWᵀ = (Σ λ_n S_n)⁻¹ [Σ λ_n C_n ΔW_nᵀ + Σ λ_n (C_n − S_n) W0ᵀ]. It also mends what W0 makes of the
drift from X to X̃, is no longer of low rank, and is cut to a rank by SVD.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from iteris_sd.lora import LowRank
from iteris_sd.merging.decomposing import Decomposition, cut
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import (
    Solution,
    adaptive_weight,
    energies,
    regularised_sum,
    size_over_energy,
    solve_terms,
)


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
    objective: Literal["adapter", "full"] = "adapter",
    rank: int | None = None,
    coefficients: Sequence[float] | None = None,
) -> Solution:
    """Merge the adapters of one layer by eqs. 6 to 8; exact, rank Σ r_n, but for ``objective="full"``.

    ``alpha`` regularises C, ``alpha_merged`` S, with ``alpha`` if not given. ``adaptive_on``: what W_n of eq. 8 is,
    the adapter ΔW_n (the paper's text) or W0 + ΔW_n (the authors' code; ``base`` is W0, (out, in)). ``mix``: ρ of
    X̃ ← (1−ρ)X̃ + ρX (the authors' code, ``reg_ceof``). ``objective``: whether ΔW alone is matched (the authors' default,
    ``with_pretrain_matrix: 0``) or W0 + ΔW, cut to ``rank``; if not given, to the number of directions that the ΔW_n
    together have, Σ r_n at most.

    An adapter of rank 0 stands for a concept that does not touch the layer and speaks for leaving it alone. A term
    whose adaptive weight is 0/0 (ΔW_n or X_n ΔW_nᵀ vanishes), or whose coefficient is 0, is dropped
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
    A = regularised_sum([(lambdas[n], mixed[n].merged) for n in kept], ridge)
    terms = [
        (adapters[n].up, lambdas[n] * _right(mixed[n].cross, alpha, adapters[n].down.to(A))) for n in kept
    ]
    if objective == "full":
        assert base is not None
        drift = regularised_sum([(lambdas[n], mixed[n].cross) for n in kept], alpha) - A
        everything = torch.eye(len(base), dtype=A.dtype, device=A.device)
        whole, condition = solve_terms(A, [*terms, (everything, drift @ base.to(A).T)])
        found = cut(Decomposition.of(whole.delta()), rank or _span([adapters[n] for n in kept]), lambdas)
        return replace(found, dropped=dropped, condition=condition)
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
        weight = 1.0
        if weights == "adaptive":
            weight = adaptive_weight(adapter, m, base) if adapter.rank else _absent_weight(adapters, m, base)
        if not coefficient:
            dropped[n] = "its coefficient is 0"
        elif not weight:
            dropped[n] = "its weight change, or what that does to its own samples, vanishes"
        lambdas.append(coefficient * weight)
    return tuple(lambdas), dropped


def _span(adapters: Sequence[LowRank]) -> int:
    """How many directions the outputs of these adapters have together; one at least."""
    ups = torch.cat([a.up for a in adapters], dim=1).double()
    return max(1, len(Decomposition.of(ups).s))


def _absent_weight(adapters: Sequence[LowRank], m: Moments, base: Tensor | None) -> float:
    """λ_n of a concept that does not touch the layer, where eq. 8 is 0/0: from what the others' ΔW_k do to its inputs,
    Σ_k ‖ΔW_k‖²_F / Σ_k ‖X_n ΔW_kᵀ‖²_F; from W0 where the base weight is given. Ours: the paper leaves it open."""
    if base is not None:
        return size_over_energy(base.to(m.own), m)
    parts = [energies(adapter, m) for adapter in adapters]
    norm, energy, noise = (sum(one) for one in zip(*parts, strict=True))
    return norm / energy if energy > noise else 0.0


def _right(C: Tensor, alpha: float, down: Tensor) -> Tensor:
    """(C + α‖C‖_F I) downᵀ, (in, r)."""
    return C @ down.T + alpha * C.norm() * down.T
