"""The header of a safetensors file, checked before a single tensor is loaded.

Layout: 8 bytes, little-endian, length n; n bytes of JSON {name: {dtype, shape, data_offsets}}; the tensors'
bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats import impostors

FLOATS = ("F64", "F32", "F16", "BF16")
WHOLE = ("I64", "I32", "I16", "I8", "U8")
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}  # every type that safetensors has -> bits of one number


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds, and how many bytes the file has."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int

    def check_size(self, max_bytes: int) -> None:
        """Raise UserError when the file is too large to be read; last, as what it is says more than its size."""
        if self.size > max_bytes:
            raise UserError(f"it has {self.size:,} bytes and at most {max_bytes:,} are read.")

    def check_type(self, key: str, types: tuple[str, ...] = FLOATS) -> None:
        """Raise UserError when the numbers of a tensor are of none of these types."""
        dtype = self.entries[key].dtype
        if dtype not in types:
            raise UserError(
                f"its tensor {key!r} is of type {dtype}; {', '.join(types)} are understood: save it again in one of "
                "them."
            )


def read_header(path: Path) -> Header:
    """Read and check the header of the file at ``path``, whatever it holds and however large it is.

    Raises UserError, one sentence without the file's name, when the file is missing, no safetensors file, or damaged.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError("it is not a file.")
        with path.open("rb") as file:
            length = _length(file.read(impostors.START_BYTES), size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"it cannot be read ({error.strerror or error}).") from error
    return _parse(raw, size)


def _length(start: bytes, size: int) -> int:
    """The length of the header of a file that starts so; raises UserError when it is no safetensors file."""
    if len(start) < 10:
        raise UserError("it is empty or cut off; download it again.")
    length = int.from_bytes(start[:8], "little")
    believable = 2 <= length <= limits.MAX_HEADER_BYTES
    # A length is eight bytes of any value, those of a pickle's beginning among them; the brace behind it decides.
    if not (believable and start[8:].lstrip()[:1] == b"{"):
        impostors.check(start)
    if not believable:
        raise UserError(
            "its header length makes no sense; it is no safetensors file, or is damaged: download it again."
        )
    if length > size - 8:
        raise UserError("it is cut off inside its header; download it again.")
    return length


def _parse(raw: bytes, size: int) -> Header:
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError("its header is not JSON; it is no safetensors file, or is damaged.") from error
    if not isinstance(table, dict):
        raise UserError("its header is not a table; it is no safetensors file, or is damaged.")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError("its metadata is not a table of strings; the file is damaged.")
    if not 1 <= len(table) <= limits.MAX_TENSORS:
        raise UserError(f"it holds {len(table):,} tensors; from 1 to {limits.MAX_TENSORS:,} are read.")
    for name in table:
        if len(name) > limits.MAX_KEY_CHARS:
            raise UserError(
                f"it holds a tensor whose name has {len(name):,} characters, {name[:40] + '…'!r}; at most "
                f"{limits.MAX_KEY_CHARS} are read: it is no LoRA, or is damaged."
            )
    data_bytes = size - 8 - len(raw)
    return Header({name: _entry(name, value, data_bytes) for name, value in table.items()}, metadata, size)


def _entry(name: str, value: Any, data_bytes: int) -> Entry:
    """One tensor's description, checked against the bytes that are there."""
    badly = f"its header describes the tensor {name!r} badly; the file is damaged."
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers_ok = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(badly) from error
    if not numbers_ok or len(shape) > limits.MAX_DIMENSIONS or not isinstance(dtype, str):
        raise UserError(badly)
    if dtype not in _BITS:
        raise UserError(f"its tensor {name!r} is of type {dtype[:20]!r}, which safetensors does not have.")
    if end > data_bytes:
        raise UserError(f"it is cut off inside the tensor {name!r}; download it again.")
    if 8 * (end - begin) != prod(shape) * _BITS[dtype]:
        raise UserError(badly)
    return Entry(dtype, shape)
