"""How much memory paused work holds on to, and a place on disk for it when that is too much.

Work that stands still deep inside a library's calls keeps its activations in frames that nobody else can reach. But
every tensor is made by an operation of torch, and those can be watched: `Frontier` remembers, weakly, what each piece
of work has made. When the pieces together hold more than a bound, the one that pauses has its tensors' memory written
to a file and freed; the tensors stay, empty, and are filled again by the first operation that touches them.
"""

import os
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from iteris_sd import limits, memory
from iteris_sd.errors import UserError

SMALL = 64 * 1024  # bytes; what is smaller stays in memory, since a file has its price, too


@dataclass(frozen=True, eq=False)
class _Away:
    """Where in the file memory lies, in bytes.

    `ref`: to that memory; as long as it is referred to, even so, no other gets the same address. Kept for what is in
    the file alone: of memory that has been freed it would leave a crumb, which keeps a heap from shrinking.
    """

    ref: StorageWeakRef
    offset: int
    size: int


def bound(device: torch.device) -> int:
    """How many bytes waiting work may hold on a device: half of what a GPU has left, since a file is a long way off
    there, `limits.MAX_FRONTIER_BYTES` elsewhere."""
    if device.type != "cuda":
        return limits.MAX_FRONTIER_BYTES
    return memory.free(device) // 2


def _folder() -> str | None:
    """Where large files may lie for a while: /tmp is memory itself on many a Linux. None: where the system says."""
    told = any(name in os.environ for name in ("TMPDIR", "TEMP", "TMP"))
    return None if told or not os.access("/var/tmp", os.W_OK) else "/var/tmp"


class Frontier:
    """The memory that pieces of work hold.

    ``peak``: the most bytes they held at any pause, those on disk included; ``spilled``: bytes written. ``most``: above
    so many bytes the piece that pauses is spilled; as `bound` has it for the device unless given. Work is watched one
    piece at a time, each in its own thread, and told by any key.
    """

    def __init__(self, most: int | None = None) -> None:
        self.peak, self.spilled = 0, 0
        self._most = most
        self._made: dict[Hashable, WeakTensorKeyDictionary] = {}
        self._held: dict[Hashable, int] = {}  # bytes in memory of each piece that stands still
        self._away: dict[int, _Away] = {}
        self._file: IO[bytes] | None = None  # opened by the first spill: most work needs none
        self._end = 0
        self._free: dict[int, list[int]] = {}  # places in the file that are not used any more, by their size

    @contextmanager
    def watched(self, key: Hashable) -> Iterator["_Watch"]:
        """Within the block, what this thread makes belongs to the piece ``key``."""
        with _Watch(self, self._made.setdefault(key, WeakTensorKeyDictionary())) as watch:
            yield watch
        failed = self._left(key)
        if failed is not None:
            raise failed

    def paused(self, key: Hashable) -> None:
        """The piece is about to stand still: count what all hold, and spill it if that is too much."""
        storages = self._living(key)
        self._held[key] = sum(storage.nbytes() for storage in storages)
        here = sum(self._held.values())
        self.peak = max(self.peak, here + sum(away.size for away in self._away.values()))
        if self._most is None:
            self._most = bound(storages[0].device if storages else torch.device("cpu"))
        if here > self._most:
            self._held[key] -= self._spill([s for s in storages if s.nbytes() >= SMALL and s.resizable()])

    def restore(self, tensors: Sequence[Any]) -> None:
        """Bring back the memory of those of these that lie in the file."""
        for tensor in tensors:
            if self._away and isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                away = self._away.pop(storage._cdata, None)
                if away is not None:
                    self._fill(storage, away)

    def close(self) -> None:
        """Forget everything, and the file; what outlives its work gets its memory back."""
        failures = [failed for key in list(self._made) if (failed := self._left(key)) is not None]
        if self._file is not None:
            self._file.close()
        if failures:
            raise failures[0]

    def _left(self, key: Hashable) -> Exception | None:
        """Forget a piece of work that has ended; what went wrong with what outlives it."""
        failed: Exception | None = None
        for storage in self._living(key):
            away = self._away.pop(storage._cdata, None)
            if away is not None:
                try:
                    self._fill(storage, away)
                except (RuntimeError, MemoryError, OSError) as error:  # the others can still be brought back
                    failed = error
        del self._made[key]
        self._held.pop(key, None)
        return failed

    def _living(self, key: Hashable) -> list[torch.UntypedStorage]:
        """The memory that a piece's tensors share; places in the file of what is no more are given back."""
        for address in [address for address, away in self._away.items() if away.ref.expired()]:
            away = self._away.pop(address)
            self._free.setdefault(away.size, []).append(away.offset)
        storages = (tensor.untyped_storage() for tensor in self._made[key])
        return list({storage._cdata: storage for storage in storages}.values())

    def _spill(self, storages: Sequence[torch.UntypedStorage]) -> int:
        """Write memory to the file and free it; returns the number of bytes."""
        before = self.spilled
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="iteris-", dir=_folder())  # noqa: SIM115 - lives with this object
        for storage in storages:
            size = storage.nbytes()
            unused = self._free.get(size)
            offset = unused.pop() if unused else self._end
            self._end = max(self._end, offset + size)
            self._write(storage, offset)
            self._away[storage._cdata] = _Away(StorageWeakRef(storage), offset, size)
            self.spilled += size
            storage.resize_(0)
        return self.spilled - before

    def _write(self, storage: torch.UntypedStorage, offset: int) -> None:
        """Raises UserError where the disk has no room."""
        assert self._file is not None
        try:
            self._file.seek(offset)
            # A copy: memory that numpy has seen cannot be freed any more.
            self._file.write(_bytes(storage).to("cpu", copy=True).numpy().data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"What waits in a sweep does not fit in memory, and could not be put on the disk either "
                f"({error.strerror or error}); make room there, take fewer samples, or merge fewer concepts."
            ) from error

    def _fill(self, storage: torch.UntypedStorage, away: _Away) -> None:
        assert self._file is not None
        self._file.seek(away.offset)
        content = np.frombuffer(bytearray(self._file.read(away.size)), np.uint8)
        storage.resize_(away.size)
        _bytes(storage).copy_(torch.from_numpy(content))
        self._free.setdefault(away.size, []).append(away.offset)


class _Watch(TorchDispatchMode):
    """Sees every operation of its thread: restores what it reads, remembers what it makes."""

    def __init__(self, frontier: Frontier, made: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._frontier, self._made, self._muted = frontier, made, False

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Within the block, what is made belongs to nobody; nothing that lies in the file may be read there."""
        on_top = _get_current_dispatch_mode() is self  # else it cannot be taken off, and only looks away
        if on_top:
            self.__exit__(None, None, None)
        self._muted = True
        try:
            yield
        finally:
            self._muted = False
            if on_top:
                self.__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        given = _tensors((*args, *(kwargs or {}).values()))
        self._frontier.restore(given)
        result = func(*args, **(kwargs or {}))
        if self._muted:
            return result
        # What shares the memory of something not made here, as a weight's transpose does, is not ours to spill.
        foreign = {_address(t) for t in given if t not in self._made}
        for tensor in _tensors((result,)):
            if _address(tensor) not in foreign:
                self._made[tensor] = None
        return result


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which may be tensors, or lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [one for one in value if isinstance(one, Tensor)]
    return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """Memory as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
