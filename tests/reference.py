"""IterIS as the paper prints it: dense, float64, features kept (eqs. 5 to 8, Algorithm 1)."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module, Any], None]


def closed_form(
    X: Sequence[Tensor],
    X_merged: Sequence[Tensor],
    deltas: Sequence[Tensor],
    alpha: float,
    coefficients: Sequence[float] | None = None,
) -> Tensor:
    """ΔW = ((Σ λ S)⁻¹ Σ λ C ΔWₙᵀ)ᵀ with the regularisation of eq. 7 and the weights of eq. 8."""
    eye = torch.eye(X[0].shape[1], dtype=torch.float64)
    left, right = torch.zeros_like(eye), torch.zeros(X[0].shape[1], deltas[0].shape[0], dtype=torch.float64)
    for x, x_merged, dW, c in zip(X, X_merged, deltas, coefficients or [1.0] * len(X), strict=True):
        weight = c * (dW**2).sum() / ((x @ dW.T) ** 2).sum()
        C, S = x_merged.T @ x, x_merged.T @ x_merged
        left += weight * (S + alpha * torch.linalg.norm(S) * eye)
        right += weight * (C + alpha * torch.linalg.norm(C) * eye) @ dW.T
    return torch.linalg.solve(left, right).T


def algorithm_1(
    model: nn.Module,
    run: Run,
    deltas: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Any],
    alpha: float,
    iterations: int,
) -> dict[str, Tensor]:
    """Algorithm 1 with ``iterations`` refinements after the first solve; module path -> ΔW.

    ``deltas[n]``: the dense LoRA n; ``batches[n]``: the samples of concept n, given to ``run(model, batch)``.
    A layer that one LoRA touches keeps it.
    """
    names = list(dict.fromkeys(name for d in deltas for name in d))
    X = [layer_inputs(patched(model, d), run, b, names) for d, b in zip(deltas, batches, strict=True)]
    X_merged = X
    for _ in range(iterations + 1):
        merged = {}
        for name in names:
            who = [n for n, d in enumerate(deltas) if name in d]
            own, other = [X[n][name] for n in who], [X_merged[n][name] for n in who]
            dense = [deltas[n][name] for n in who]
            merged[name] = closed_form(own, other, dense, alpha) if len(who) > 1 else dense[0]
        X_merged = [layer_inputs(patched(model, merged), run, b, names) for b in batches]
    return merged


def patched(model: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with each ΔW added to its layer's weight."""
    copy = deepcopy(model)
    for name, dW in deltas.items():
        weight = copy.get_parameter(f"{name}.weight").data
        weight += dW.view_as(weight)
    return copy


def layer_inputs(model: nn.Module, run: Run, batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The inputs (rows, in) that reach each layer when the model runs on the batch; of a convolution, its patches."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.__setitem__(name, as_rows(module, args[0]))

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(record(name))
    with torch.no_grad():
        run(model, batch)
    return seen


def as_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer as rows (rows, in): patches cut out one by one where it is a convolution."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)
    assert not isinstance(module.padding, str)
    (kh, kw), (sh, sw), (ph, pw) = module.kernel_size, module.stride, module.padding
    x = nn.functional.pad(x, (pw, pw, ph, ph))
    places = [(i, j) for i in range(0, x.shape[2] - kh + 1, sh) for j in range(0, x.shape[3] - kw + 1, sw)]
    return torch.stack([x[:, :, i : i + kh, j : j + kw].flatten(1) for i, j in places], 1).flatten(0, 1)
