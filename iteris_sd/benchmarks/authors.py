"""IterIS as its authors' code does it, written plainly from the equations of arXiv 2411.15231 for comparison.

Dense ΔW; the features of every layer kept; float32 Gram matrices, each layer its own; a dense solve in float64 for
all `out` columns; one inference of the merged model per iteration, none after the last.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from iteris_sd.benchmarks.problems import Problem

Features = dict[str, Tensor]


def solves(problem: Problem, alpha: float) -> Generator[Mapping[str, Tensor], None, None]:
    """The merged ΔW (layer name -> (out, in)) after the first solve, after one iteration, after two, and so on."""
    deltas = [{name: adapter.delta() for name, adapter in lora.items()} for lora in problem.loras]
    concepts = range(len(deltas))
    X = [_features(problem, n, deltas[n]) for n in concepts]
    X_merged = X
    while True:
        merged = {
            name: _closed_form(
                [X[n][name] for n in concepts],
                [X_merged[n][name] for n in concepts],
                [dense[name] for dense in deltas],
                alpha,
            )
            for name in problem.modules
        }
        yield merged
        X_merged = [_features(problem, n, merged) for n in concepts]


def _closed_form(
    X: Sequence[Tensor], X_merged: Sequence[Tensor], deltas: Sequence[Tensor], alpha: float
) -> Tensor:
    """Eqs. 6 to 8, in the features' precision up to the solve."""
    eye = torch.eye(X[0].shape[1], dtype=X[0].dtype, device=X[0].device)
    left, right = torch.zeros_like(eye), torch.zeros_like(deltas[0].T)
    for x, y, dW in zip(X, X_merged, deltas, strict=True):
        weight = dW.square().sum() / (x @ dW.T).square().sum()
        C, S = y.T @ x, y.T @ y
        left += weight * (S + alpha * S.norm() * eye)
        right += weight * (C + alpha * C.norm() * eye) @ dW.T
    return torch.linalg.solve(left.double(), right.double()).T.to(X[0].dtype)


@torch.no_grad()
def _features(problem: Problem, concept: int, deltas: Mapping[str, Tensor]) -> Features:
    """The inputs (rows, in) of every layer in the model with these weight changes, on one concept's samples."""
    kept: dict[str, list[Tensor]] = {name: [] for name in problem.modules}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept[name].append(args[0].flatten(0, -2))

    handles = [m.register_forward_pre_hook(partial(keep, name)) for name, m in problem.modules.items()]
    batch = problem.batches[concept]
    try:
        with _patched(problem.modules, deltas):
            for k in range(0, len(batch[0]), problem.micro_batch):
                unread = problem.run(*(rows[k : k + problem.micro_batch] for rows in batch))
                for name, x in unread.items():  # no layer follows: their outputs are not computed here either
                    kept[name].append(x.flatten(0, -2))
    finally:
        for handle in handles:
            handle.remove()
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in kept.items()}


@contextmanager
def _patched(modules: Mapping[str, nn.Module], deltas: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: module.get_parameter("weight").data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.get_parameter("weight").data = before[name] + deltas[name]
        yield
    finally:
        for name, module in modules.items():
            module.get_parameter("weight").data = before[name]
