"""The header of a safetensors file, checked before a single tensor is loaded.

Layout: 8 bytes, little-endian, length n; n bytes of JSON {name: {dtype, shape, data_offsets}}; the tensors'
bytes.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from iteris_sd import limits
from iteris_sd.errors import UserError

FLOATS: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # type -> bytes of one number
WHOLE: Mapping[str, int] = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_PICKLE = (
    "a pickle can run any code when it is opened, so only .safetensors files are; if you trust it, convert it where "
    "you trained it: torch.load, then safetensors.torch.save_file"
)
_IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<!doctype html", "a web page, not the file itself; download it again from the page's download link"),
    (b"<html", "a web page, not the file itself; download it again from the page's download link"),
    (b"pk\x03\x04", f"a zip archive or a PyTorch pickle; {_PICKLE}"),
    *((bytes([0x80, n]), f"a PyTorch pickle; {_PICKLE}") for n in (2, 3, 4, 5)),
)


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path, max_bytes: int, types: Mapping[str, int] = FLOATS) -> Header:
    """Read and check the header of the file at ``path``, of at most ``max_bytes``.

    Raises UserError, one sentence without the file's name, when the file is missing, no safetensors file,
    damaged, too large, or holds tensors of other ``types``.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError("it is not a file.")
        if size > max_bytes:
            raise UserError(f"it has {size:,} bytes and at most {max_bytes:,} are read.")
        with path.open("rb") as file:
            start = file.read(64)
            _reject_impostors(start)
            length = struct.unpack("<Q", start[:8])[0]
            if not 2 <= length <= min(size - 8, limits.MAX_HEADER_BYTES):
                raise UserError("its header length makes no sense; it is no safetensors file, or is cut off.")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"it cannot be read ({error.strerror or error}).") from error
    return _parse(raw, size - 8 - length, types)


def _reject_impostors(start: bytes) -> None:
    for magic, what in _IMPOSTORS:
        if start.lstrip().lower().startswith(magic):
            raise UserError(f"it is {what}.")
    if len(start) < 10:
        raise UserError("it is empty or cut off; download it again.")


def _parse(raw: bytes, data_bytes: int, types: Mapping[str, int]) -> Header:
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
    return Header({name: _entry(name, value, data_bytes, types) for name, value in table.items()}, metadata)


def _entry(name: str, value: Any, data_bytes: int, types: Mapping[str, int]) -> Entry:
    """One tensor's description, checked against the bytes that are there."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers_ok = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its header describes the tensor {name!r} badly; the file is damaged.") from error
    if not numbers_ok:
        raise UserError(f"its header describes the tensor {name!r} badly; the file is damaged.")
    if dtype not in types:
        raise UserError(f"its tensor {name!r} is of type {dtype}; {', '.join(types)} are understood.")
    if end > data_bytes:
        raise UserError(f"it is cut off inside the tensor {name!r}; download it again.")
    if end - begin != prod(shape) * types[dtype]:
        raise UserError(f"its header describes the tensor {name!r} badly; the file is damaged.")
    return Entry(dtype, shape)
