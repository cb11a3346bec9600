"""What a dialect tells the reader: which tensors of a file belong together, by the file's header alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Pair:
    """The tensors of one layer, by key, and its alpha: ΔW = alpha / rank · up @ down (alpha = rank if unset).

    ``alpha_key`` names a tensor of one number; ``alpha`` is a value found in the metadata;
    ``rank_stabilised`` divides by √rank instead.
    """

    down: str
    up: str
    alpha_key: str | None = None
    alpha: float | None = None
    rank_stabilised: bool = False


@dataclass(frozen=True)
class Layout:
    """Canonical layer name -> its tensors, and learned token -> the key of its vectors."""

    layers: Mapping[str, Pair]
    tokens: Mapping[str, str] = field(default_factory=dict)


class Dialect(Protocol):
    """One way of naming the tensors of a LoRA file; a module with these two functions is a dialect."""

    NAME: str

    def matches(self, keys: Iterable[str]) -> bool:
        """Whether a file with these keys is written in this dialect."""

    def parse(self, keys: Iterable[str], metadata: Mapping[str, str]) -> Layout:
        """Sort the keys into layers. Raises UserError for keys without partner or of unknown meaning."""
