"""What a method returns for one layer, and what methods share: the weighted sum, λ, and the least-squares solve.

| symbol   | shape       | meaning                                                               |
|----------|-------------|-----------------------------------------------------------------------|
| ΔW_n     | (out, in)   | up_n @ down_n, LoRA n at this layer                                   |
| A        | (in, in)    | left side of the normal equations, symmetric positive definite        |
| B_n      | (in, in)    | right side of term n: ΔWᵀ = A⁻¹ Σ_n B_n ΔW_nᵀ                         |
| R_n      | (in, r_n)   | B_n down_nᵀ, all that is needed of B_n                                |
| λ_n      | scalar      | weight of term n in the objective Σ_n λ_n ‖X_n ΔW_nᵀ − X̃_n ΔWᵀ‖²_F    |

B_n ΔW_nᵀ = R_n up_nᵀ has rank r_n, so ΔW = Σ_n up_n · [A⁻¹ R_n]ᵀ: keep the up_n, solve for Σ r_n columns only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from iteris_sd.errors import UserError
from iteris_sd.lora import LowRank, inner, working_dtype
from iteris_sd.merging.moments import Moments

_ROUNDINGS = 8  # a sum of products in blocks is off by a few roundings of its size


@dataclass(frozen=True, eq=False)
class Solution:
    """One layer's merged adapter, the weight of each term, and why terms were dropped (index -> reason).

    ``truncation``: ‖ΔW − ΔW_k‖_F / ‖ΔW‖_F where the method's own ΔW was cut to the k directions of ``adapter``;
    None for methods that cut nothing. ``condition``: the condition number of the system solved, if one was.
    """

    adapter: LowRank
    weights: tuple[float, ...]
    dropped: Mapping[int, str] = field(default_factory=dict)
    truncation: float | None = None
    condition: float | None = None


def weighted_sum(adapters: Sequence[LowRank], weights: Sequence[float]) -> Solution:
    """Σ w_n ΔW_n, exact, rank Σ r_n; a concept of weight 0 is reported as dropped.

    Raises UserError when an adapter is not finite.
    """
    check_finite(adapters)
    dtype = working_dtype(adapters)
    scaled = [a.to(dtype=dtype).scaled(w) for a, w in zip(adapters, weights, strict=True)]
    dropped = {n: "its coefficient is 0" for n, weight in enumerate(weights) if not weight}
    return Solution(LowRank.concatenate(scaled), tuple(weights), dropped)


def regularised_sum(terms: Sequence[tuple[float, Tensor]], alpha: float) -> Tensor:
    """Σ λ_n (M_n + α‖M_n‖_F I), without forming the terms (eq. 7 of arXiv 2411.15231)."""
    total = torch.zeros_like(terms[0][1])
    for weight, M in terms:
        total.add_(M, alpha=weight)
        total.diagonal().add_(weight * alpha * M.norm())
    return total


def check_finite(adapters: Sequence[LowRank]) -> None:
    """Raise UserError when a factor holds infinities or NaN."""
    if not all(bool(factor.isfinite().all()) for a in adapters for factor in (a.down, a.up)):
        raise UserError("one of the LoRAs is not finite there; check the LoRA files.")


def solve_terms(A: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[LowRank, float]:
    """ΔW with ΔWᵀ = A⁻¹ Σ_n R_n up_nᵀ for terms (up_n, R_n), R_n in float64; exact, rank Σ r_n, by Cholesky.

    Also A's condition number, as `condition` estimates it. Raises UserError when A or the result is not finite, or A
    is singular to working precision.
    """
    if not bool(A.isfinite().all()):
        raise UserError("the moments of its inputs are not finite; use float32 or other samples.")
    ups = torch.cat([up.to(A) for up, _ in terms], dim=1)
    L = _cholesky(A)
    solved = LowRank(torch.cholesky_solve(torch.cat([R for _, R in terms], dim=1), L).T, ups)
    if not bool(solved.down.isfinite().all() and solved.up.isfinite().all()):
        raise UserError("its solution is not finite; check the LoRA files, or raise the regularisation.")
    return solved, condition(A, L)


def condition(A: Tensor, L: Tensor) -> float:
    """λ_max / λ_min of A = L Lᵀ, estimated from below by power iterations on A and on A⁻¹, from several starts at
    once: a few products, no eigenvalues."""
    steps, starts = 5, 4
    n = torch.arange(len(A), dtype=A.dtype, device=A.device)[:, None]
    frequencies = torch.arange(1, starts + 1, dtype=A.dtype, device=A.device)
    grown = shrunk = torch.cos(
        n * frequencies + frequencies
    )  # waves: neither alike nor at right angles to much
    for _ in range(steps):
        grown, shrunk = A @ grown, torch.cholesky_solve(shrunk, L)
        top, bottom = grown.norm(dim=0), shrunk.norm(dim=0)
        grown, shrunk = grown / top, shrunk / bottom
    return float(top.max() * bottom.max())


def _cholesky(A: Tensor) -> Tensor:
    """L with L Lᵀ = A. Raises UserError when A is not positive definite to working precision."""
    L, info = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal()
    limit = len(A) * torch.finfo(A.dtype).eps
    if int(info) or not bool((pivots.min() / pivots.max()) ** 2 > limit):
        raise UserError(
            f"its {len(A)} × {len(A)} system is singular; use more samples, or raise the regularisation."
        )
    return L


def adaptive_weight(adapter: LowRank, m: Moments, base: Tensor | None = None) -> float:
    """λ = ‖W‖²_F / ‖X Wᵀ‖²_F (eq. 8 of arXiv 2411.15231); 0 where W is ΔW and ΔW or X ΔWᵀ vanishes to rounding.

    W is ΔW, or ``base`` + ΔW where the base weight (out, in) is given.
    """
    if base is not None:
        return size_over_energy(base.to(m.own) + adapter.to(m.own.device, m.own.dtype).delta(), m)
    norm, energy, noise = energies(adapter, m)
    if energy <= noise or norm <= _vanishing(adapter):
        return 0.0
    return norm / energy  # not a number where a factor is none: the solve refuses it


def size_over_energy(W: Tensor, m: Moments) -> float:
    """‖W‖²_F / ‖X Wᵀ‖²_F of a dense W (out, in); 0 where W has no effect on the inputs."""
    energy = float(((W @ m.own) * W).sum())
    return 0.0 if energy <= 0 else float(W.square().sum()) / energy


def energies(adapter: LowRank, m: Moments) -> tuple[float, float, float]:
    """‖ΔW‖²_F, ‖X ΔWᵀ‖²_F, and how far the rounding of XᵀX may put the latter off."""
    # An error E of XᵀX changes the energy by ⟨ΔWᵀΔW, E⟩, thus by ‖ΔWᵀΔW‖ ‖E‖ at most.
    noise = _ROUNDINGS * m.rounding * m.own.norm().item() * _gram_norm(adapter)
    return inner(adapter, adapter).item(), inner(adapter, adapter, m.own).item(), noise


def _vanishing(adapter: LowRank) -> float:
    """What is left of ‖ΔW‖² where its factors cancel to rounding."""
    exact = adapter.wide()
    size = float(exact.down.square().sum()) * float(exact.up.square().sum())
    return torch.finfo(torch.float64).eps * max(adapter.shape) * size


def _gram_norm(adapter: LowRank) -> float:
    """‖ΔWᵀΔW‖_F from the factors."""
    exact = adapter.wide()
    both = (exact.up.T @ exact.up) @ (exact.down @ exact.down.T)
    return max(0.0, (both * both.T).sum().item()) ** 0.5


@dataclass(frozen=True)
class Misses:
    """How far a merge is from what each term wants.

    ``balance``: λ_n ‖X_n ΔW_nᵀ − X̃_n ΔWᵀ‖² of every term (the paper's Fig. 3c). ``residual``: their sum over
    Σ λ_n ‖X_n ΔW_nᵀ‖² (eq. 5, relative); None where that is zero.
    """

    balance: tuple[float, ...]
    residual: float | None


def misses(
    adapters: Sequence[LowRank], moments: Sequence[Moments], weights: Sequence[float], merged: LowRank
) -> Misses:
    """Measure a merge of one layer."""
    wanted = [w * inner(a, a, m.own).item() for a, m, w in zip(adapters, moments, weights, strict=True)]
    apart = [
        want - 2 * w * inner(merged, a, m.cross).item() + w * inner(merged, merged, m.merged).item()
        for want, a, m, w in zip(wanted, adapters, moments, weights, strict=True)
    ]
    balance = tuple(max(0.0, value) for value in apart)
    return Misses(balance, sum(balance) / sum(wanted) if sum(wanted) > 0 else None)
