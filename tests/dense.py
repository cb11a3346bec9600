"""The data-free methods as their papers print them: dense, float64, TIES entry by entry."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_n ΔW_n."""
    total = torch.zeros_like(deltas[0])
    for weight, dW in zip(weights, deltas, strict=True):
        total += weight * dW
    return total


def trimmed(dW: Tensor, density: float) -> Tensor:
    """The largest share of the entries and those equal to its last; the others 0."""
    kept = max(1, round(density * dW.numel()))
    smallest = sorted((abs(entry) for entry in dW.flatten().tolist()), reverse=True)[kept - 1]
    return dW.clone().apply_(lambda entry: entry if abs(entry) >= smallest * (1 - 1e-9) else 0.0)


def ties(deltas: Sequence[Tensor], density: float, majority_sign: str) -> Tensor:
    """Algorithm 1 of arXiv 2306.01708 at λ = 1, each entry by itself."""
    merged = torch.zeros_like(deltas[0])
    tasks = [trimmed(dW, density) for dW in deltas]
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            merged[i, j] = _ties_entry([float(task[i, j]) for task in tasks], majority_sign)
    return merged


def _ties_entry(entries: Sequence[float], majority_sign: str) -> float:
    positive = [entry for entry in entries if entry > 0]
    negative = [entry for entry in entries if entry < 0]
    lead: float = len(positive) - len(negative) if majority_sign == "count" else 0
    lead = lead or sum(entries)
    agreeing = positive if lead > 0 else negative if lead < 0 else []
    return sum(agreeing) / len(agreeing) if agreeing else 0.0


def dare(dW: Tensor, kept: Tensor, p: float) -> Tensor:
    """arXiv 2311.03099: entries that the mask does not keep are 0, the others grow by 1 / (1 − p)."""
    return kept.double() * dW / (1 - p)


def knots(deltas: Sequence[Tensor], density: float, majority_sign: str, sigma: str) -> Tensor:
    """arXiv 2410.19735 at λ = 1: SVD of the weight changes side by side, TIES on the parts of V."""
    U, s, Vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    live = int(torch.linalg.matrix_rank(torch.cat(list(deltas), dim=1)))
    U, S, Vh = U[:, :live], torch.diag(s[:live]), Vh[:live]
    parts = Vh.split([dW.shape[1] for dW in deltas], dim=1)
    if sigma == "merged":
        return U @ ties([S @ part for part in parts], density, majority_sign)
    return U @ S @ ties(parts, density, majority_sign)


def tsv(deltas: Sequence[Tensor], share: float | None) -> Tensor:
    """arXiv 2412.00081 at λ = 1: truncated SVD of each task, Procrustes on the vectors side by side."""
    U, s, V = [], [], []
    for dW in deltas:
        u, values, vh = torch.linalg.svd(dW)
        rank = int(torch.linalg.matrix_rank(dW))
        kept = max(1, int(rank / len(deltas) if share is None else share * rank))
        U.append(u[:, :kept])
        s.append(values[:kept])
        V.append(vh[:kept].T)
    left, right = procrustes(torch.cat(U, dim=1)), procrustes(torch.cat(V, dim=1))
    return left @ torch.diag(torch.cat(s)) @ right.T


def procrustes(A: Tensor) -> Tensor:
    """The nearest matrix to A with orthonormal columns (rows, where it is wide): P Qᵀ for A = P D Qᵀ."""
    P, _, Qh = torch.linalg.svd(A, full_matrices=False)
    return P @ Qh


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """arXiv 2502.04959 at scale 1, the mean and the directions being those of singular values above 0."""
    total = weighted(deltas, [1.0] * len(deltas))
    U, s, Vh = torch.linalg.svd(total, full_matrices=False)
    live = int(torch.linalg.matrix_rank(total))
    return s[:live].mean() * U[:, :live] @ Vh[:live]


def cut(dW: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    U, s, Vh = torch.linalg.svd(dW, full_matrices=False)
    return U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]
