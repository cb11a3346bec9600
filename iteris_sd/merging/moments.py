"""Second moments of a layer's inputs: all that the data-driven methods need to know of the samples.

| symbol | shape    | meaning                                                                |
|--------|----------|------------------------------------------------------------------------|
| X      | (m, in)  | inputs reaching the layer in the concept's own model, on its samples   |
| X̃      | (m, in)  | inputs reaching it in the merged model, on the same samples            |
| own    | (in, in) | XᵀX                                                                    |
| cross  | (in, in) | X̃ᵀX, C in the formulae                                                 |
| merged | (in, in) | X̃ᵀX̃, S in the formulae                                                 |

Moments are kept in float64: with α at 1e-7 the rounding of a float32 Gram matrix is as large as its
regularisation.
"""

from dataclasses import dataclass

from torch import Tensor

BLOCK = 192  # columns at a time; wide enough for products at full speed


@dataclass(frozen=True, eq=False)
class Moments:
    """XᵀX, X̃ᵀX and X̃ᵀX̃ over ``count`` input rows; they add up over batches."""

    own: Tensor
    cross: Tensor
    merged: Tensor
    count: int

    @staticmethod
    def of(X: Tensor, X_merged: Tensor | None = None) -> "Moments":
        """Moments of the inputs X and X̃, each (…, in) and paired row by row; X̃ = X unless given."""
        X = _wide(X)
        own = _gram(X)
        if X_merged is None:
            return Moments(own, own, own, len(X))
        X_merged = _wide(X_merged)
        return Moments(own, X_merged.T @ X, _gram(X_merged), len(X))

    def __add__(self, other: "Moments") -> "Moments":
        own = self.own + other.own
        count = self.count + other.count
        if self.merged is self.own and other.merged is other.own:
            return Moments(own, own, own, count)
        return Moments(own, self.cross + other.cross, self.merged + other.merged, count)

    def mixed(self, share: float) -> "Moments":
        """The moments with X̃ replaced by (1−ρ)X̃ + ρX, ρ = ``share`` (the authors' code, ``reg_ceof``)."""
        if not share or self.merged is self.own:
            return self
        rest = 1.0 - share
        both = rest * share * (self.cross + self.cross.T)
        merged = rest**2 * self.merged + both + share**2 * self.own
        return Moments(self.own, rest * self.cross + share * self.own, merged, self.count)

    def distance(self) -> float:
        """‖X̃ − X‖²_F."""
        if self.merged is self.own:
            return 0.0
        return max(0.0, float(self.merged.trace() - 2 * self.cross.trace() + self.own.trace()))


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


def _wide(x: Tensor) -> Tensor:
    """x as float64 rows (…, in) -> (m, in); on the CPU where the device has no float64 (Apple's)."""
    rows = x.detach().flatten(0, -2)
    return (rows.cpu() if rows.device.type == "mps" else rows).double()
