"""Second moments of a layer's inputs: all that the data-driven methods need to know of the samples.

| symbol | shape    | meaning                                                                |
|--------|----------|------------------------------------------------------------------------|
| X      | (m, in)  | inputs reaching the layer in the concept's own model, on its samples   |
| X̃      | (m, in)  | inputs reaching it in the merged model, on the same samples            |
| own    | (in, in) | XᵀX                                                                    |
| cross  | (in, in) | X̃ᵀX, C in the formulae                                                 |
| merged | (in, in) | X̃ᵀX̃, S in the formulae                                                 |

Moments are kept and added up in float64. So are the products they are made of, unless a method's regularisation is far
above the rounding of float32 (``registry.Method.exact``): with α at 1e-7 the rounding of a Gram matrix is as large as
its regularisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 192  # columns at a time; wide enough for products at full speed


@dataclass(frozen=True, eq=False)
class Moments:
    """XᵀX, X̃ᵀX and X̃ᵀX̃ over ``count`` input rows, and ``apart`` = ‖X̃ − X‖²_F; they add up over batches."""

    own: Tensor
    cross: Tensor
    merged: Tensor
    count: int
    apart: float = 0.0

    @staticmethod
    def of(X: Tensor, X_merged: Tensor | None = None, *, exact: bool = True) -> "Moments":
        """Moments of the inputs X and X̃, each (…, in) and paired row by row; X̃ = X unless given.

        ``exact``: products in float64; else in the inputs' own dtype, float32 at least.
        """
        X = _rows(X, exact)
        own = _wide(_gram(X))
        if X_merged is None:
            return Moments(own, own, own, len(X))
        X_merged = _rows(X_merged, exact)
        apart = float(_wide((X_merged - X).square().sum(dim=0)).sum())
        return Moments(own, _wide(X_merged.T @ X), _wide(_gram(X_merged)), len(X), apart)

    def __add__(self, other: "Moments") -> "Moments":
        own = self.own + other.own
        count = self.count + other.count
        if self.merged is self.own and other.merged is other.own:
            return Moments(own, own, own, count)
        apart = self.apart + other.apart
        return Moments(own, self.cross + other.cross, self.merged + other.merged, count, apart)

    def mixed(self, share: float) -> "Moments":
        """The moments with X̃ replaced by (1−ρ)X̃ + ρX, ρ = ``share`` (the authors' code, ``reg_ceof``)."""
        if not share or self.merged is self.own:
            return self
        rest = 1.0 - share
        both = rest * share * (self.cross + self.cross.T)
        merged = rest**2 * self.merged + both + share**2 * self.own
        cross = rest * self.cross + share * self.own
        return Moments(self.own, cross, merged, self.count, rest**2 * self.apart)


def _gram(X: Tensor) -> Tensor:
    """XᵀX, of which a large one's lower half is not computed but mirrored."""
    width = X.shape[1]
    if width <= BLOCK:
        return X.T @ X
    G = X.new_empty(width, width)
    for k in range(0, width, BLOCK):
        end = k + BLOCK
        G[k:end, k:] = X[:, k:end].T @ X[:, k:]
        G[end:, k:end] = G[k:end, end:].T
    return G


def _rows(x: Tensor, exact: bool) -> Tensor:
    """Inputs (…, in) as rows (m, in), in float64 or in their own dtype, float32 at least."""
    rows = x.detach().flatten(0, -2)
    return _wide(rows) if exact else rows.to(torch.promote_types(rows.dtype, torch.float32))


def _wide(x: Tensor) -> Tensor:
    """x in float64; on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()
