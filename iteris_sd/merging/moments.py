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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iteris_sd.lora import wide

BLOCK = 192  # columns at a time; wide enough for products at full speed on a CPU
GPU_BLOCK = 768  # and on a GPU, which wants fewer and larger ones
ROWS = 4096  # added up in float32 before they go into float64; rounding grows with their number


@dataclass(frozen=True, eq=False)
class Moments:
    """XᵀX, X̃ᵀX and X̃ᵀX̃ over ``count`` input rows, and ``apart`` = ‖X̃ − X‖²_F.

    ``rounding``: the machine epsilon of what the products were made in.
    """

    own: Tensor
    cross: Tensor
    merged: Tensor
    count: int
    apart: float = 0.0
    rounding: float = torch.finfo(torch.float64).eps

    @property
    def same(self) -> bool:
        """Whether X̃ was taken to be X."""
        return self.merged is self.own

    @staticmethod
    def of(X: Tensor, X_merged: Tensor | None = None, *, exact: bool = True) -> "Moments":
        """Moments of the inputs X and X̃, each (…, in) and paired row by row; X̃ = X unless given.

        ``exact``: products in float64; else in the inputs' own dtype, float32 at least.
        """
        sums = Sums(exact)
        sums.add(X, X_merged)
        return sums.total()

    def mixed(self, share: float) -> "Moments":
        """The moments with X̃ replaced by (1−ρ)X̃ + ρX, ρ = ``share`` (the authors' code, ``reg_ceof``)."""
        if not share or self.same:
            return self
        rest = 1.0 - share
        both = rest * share * (self.cross + self.cross.T)
        merged = rest**2 * self.merged + both + share**2 * self.own
        cross = rest * self.cross + share * self.own
        return replace(self, cross=cross, merged=merged, apart=rest**2 * self.apart)


class Sums:
    """Moments on their way: inputs are added batch by batch, in place. ``exact``: as `Moments.of` has it.

    Products that are not exact are added up in their own dtype over a few thousand rows, and those sums in float64.
    """

    def __init__(self, exact: bool = True) -> None:
        self._exact = exact
        self._sums: list[Tensor] = []  # XᵀX, X̃ᵀX and X̃ᵀX̃ in float64; of the symmetric ones the upper blocks
        self._rough: list[Tensor] = []  # what is not in them yet
        self._waiting = self._count = 0
        self._apart: Tensor | float = 0.0  # a number only at the end: a GPU would be waited for each time

    def add(self, X: Tensor, X_merged: Tensor | None = None) -> None:
        """Add the inputs X and X̃, each (…, in) and paired row by row; X̃ = X unless given, and then always so."""
        X = _rows(X, self._exact)
        self._rounding = torch.finfo(X.dtype).eps
        if not self._rough:
            shape = (X.shape[1], X.shape[1])
            self._rough = [X.new_zeros(shape) for _ in range(1 if X_merged is None else 3)]
        _add_gram(self._rough[0], X)
        if X_merged is not None:
            X_merged = _rows(X_merged, self._exact)
            self._rough[1].addmm_(X_merged.T, X)
            _add_gram(self._rough[2], X_merged)
            self._apart = self._apart + wide((X_merged - X).square().sum(dim=0)).sum()
        self._count += len(X)
        self._waiting += len(X)
        if self._waiting >= ROWS and not self._exact:
            self.settle()

    def settle(self) -> None:
        """Add what waits to the sums in float64, and give its memory back."""
        if not self._rough:
            return
        if self._sums:
            for total, rough in zip(self._sums, self._rough, strict=True):
                total += rough.to(total.device)
        else:
            self._sums = [wide(rough) for rough in self._rough]
        self._rough, self._waiting = [], 0

    def total(self) -> Moments:
        """The moments of all that was added; nothing may be added after it."""
        self.settle()
        for symmetric in self._sums[::2]:
            _mirror(symmetric)
        own, cross, merged = self._sums if len(self._sums) == 3 else self._sums * 3
        return Moments(own, cross, merged, self._count, float(self._apart), self._rounding)


def _add_gram(G: Tensor, X: Tensor) -> None:
    """G += XᵀX, but for the blocks below the diagonal."""
    block = _block(G)
    for k in range(0, X.shape[1], block):
        end = k + block
        G[k:end, k:].addmm_(X[:, k:end].T, X[:, k:])


def _mirror(G: Tensor) -> None:
    """Fill the blocks below the diagonal."""
    block = _block(G)
    for k in range(0, G.shape[1], block):
        end = k + block
        G[end:, k:end] = G[k:end, end:].T


def _block(G: Tensor) -> int:
    return BLOCK if G.device.type == "cpu" else GPU_BLOCK


def _rows(x: Tensor, exact: bool) -> Tensor:
    """Inputs (…, in) as rows (m, in), in float64 or in their own dtype, float32 at least."""
    rows = x.detach().flatten(0, -2)
    return wide(rows) if exact else rows.to(torch.promote_types(rows.dtype, torch.float32))
