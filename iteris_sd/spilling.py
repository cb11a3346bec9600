"""How much memory paused work holds on to, and a place on disk for it when that is too much.

Work that stands still deep inside a library's calls keeps its activations in frames that nobody else can reach. But
every tensor is made by an operation of torch, and those can be watched: `Frontier` remembers, weakly, what each piece
of work has made. When the pieces together hold more than a bound, the one that pauses has its tensors' memory written
to a file and freed; the tensors stay, empty, and are filled again by the first operation that touches them.
"""

import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

SMALL = 64 * 1024  # bytes; what is smaller stays in memory, since a file has its price, too


@dataclass(frozen=True, eq=False)
class _Away:
    """Memory that lies in a file: whose it is, and where."""

    storage: torch.UntypedStorage
    offset: int
    size: int


class Frontier:
    """The tensors that pieces of work hold.

    ``peak``: the most bytes they held at any pause, those on disk included; ``spilled``: bytes written. ``bound``:
    above so many bytes the piece that pauses is spilled. Work is watched one piece at a time, each in its own thread,
    and told by any key.
    """

    def __init__(self, bound: int) -> None:
        self.peak, self.spilled = 0, 0
        self._bound = bound
        self._made: dict[Hashable, WeakTensorKeyDictionary] = {}
        self._away: dict[int, _Away] = {}
        self._file: IO[bytes] | None = None  # opened by the first spill: most work needs none
        self._end = 0

    @contextmanager
    def watched(self, key: Hashable) -> Iterator["_Watch"]:
        """Within the block, what this thread makes belongs to the piece ``key``."""
        with _Watch(self, self._made.setdefault(key, WeakTensorKeyDictionary())) as watch:
            yield watch
        self._made.pop(key, None)

    def paused(self, key: Hashable) -> None:
        """The piece is about to stand still: count what all hold, and spill it if that is too much."""
        held = {of: self._held(of) for of in self._made}
        here = sum(storage.nbytes() for one in held.values() for storage in one.values())
        on_disk = sum(self._away[i].size for one in held.values() for i in one if i in self._away)
        self.peak = max(self.peak, here + on_disk)
        if here > self._bound:
            self._spill([s for s in held[key].values() if s.nbytes() >= SMALL])

    def restore(self, tensors: Sequence[Any]) -> None:
        """Bring back the memory of those of these that lie in the file."""
        for tensor in tensors:
            if self._away and isinstance(tensor, Tensor):
                away = self._away.pop(_identity(tensor), None)
                if away is not None:
                    self._fill(away)

    def close(self) -> None:
        """Forget everything, and the file."""
        self._made.clear()
        self._away.clear()
        if self._file is not None:
            self._file.close()

    def _held(self, key: Hashable) -> dict[int, torch.UntypedStorage]:
        """The memory that a piece's living tensors share."""
        return {_identity(t): t.untyped_storage() for t in self._made[key]}

    def _spill(self, storages: Sequence[torch.UntypedStorage]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="iteris-")  # noqa: SIM115 - lives as long as this object
        for storage in storages:
            size = storage.nbytes()
            self._file.seek(self._end)
            # A copy: memory that numpy has seen cannot be freed any more.
            self._file.write(_bytes(storage).to("cpu", copy=True).numpy().data)
            self._away[storage._cdata] = _Away(storage, self._end, size)
            self._end += size
            self.spilled += size
            storage.resize_(0)
        self._away = {key: a for key, a in self._away.items() if a.storage.nbytes() == 0}

    def _fill(self, away: _Away) -> None:
        assert self._file is not None
        self._file.seek(away.offset)
        content = np.frombuffer(bytearray(self._file.read(away.size)), np.uint8)
        away.storage.resize_(away.size)
        _bytes(away.storage).copy_(torch.from_numpy(content))
        if not self._away:
            self._end = 0  # nothing lies in the file any more: begin anew


class _Watch(TorchDispatchMode):
    """Sees every operation of its thread: restores what it reads, remembers what it makes."""

    def __init__(self, frontier: Frontier, made: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._frontier, self._made, self._muted = frontier, made, False

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Within the block, what is made belongs to nobody."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        given = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)]
        self._frontier.restore(given)
        result = func(*args, **(kwargs or {}))
        if not self._muted:
            # What shares the memory of something not made here, as a weight's transpose does, is not ours to spill.
            foreign = {_identity(t) for t in given if t not in self._made}
            for tensor in tree_flatten(result)[0]:
                if isinstance(tensor, Tensor) and _identity(tensor) not in foreign:
                    self._made[tensor] = None
        return result


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """Memory as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
