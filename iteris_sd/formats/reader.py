"""Read LoRA and embedding files: header first, then the dialect, then the tensors; faults are UserErrors."""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats import diffusers
from iteris_sd.formats.header import Entry, Header, read_header
from iteris_sd.formats.layout import Dialect, Layout, Pair
from iteris_sd.lora import LoRA, LowRank

DIALECTS: tuple[Dialect, ...] = (cast(Dialect, diffusers),)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a LoRA file holds: the LoRA, learned tokens -> (vectors, dim), metadata and dialect."""

    lora: LoRA
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    dialect: str = diffusers.NAME


def read(path: str | Path) -> LoraFile:
    """Read a LoRA file. Tensors come in float32, or float64 where the file has it, scale applied.

    Raises UserError naming the file when it is missing, damaged, of an unknown kind, or out of bounds.
    """
    path = Path(path)
    with _naming(path):
        header = read_header(path, limits.MAX_FILE_BYTES)
        dialect = _dialect(header)
        layout = dialect.parse(header.entries, header.metadata)
        for name, pair in layout.layers.items():
            _check_shapes(name, pair, header.entries)
        return _load(path, header, dialect.NAME, layout)


def read_embedding(path: str | Path) -> tuple[str, Tensor]:
    """Read a learned token: its name and its vectors (vectors, dim), in float32 at least.

    Raises UserError naming the file when it is missing, damaged, holds other than one token, or is out of
    bounds.
    """
    path = Path(path)
    with _naming(path):
        header = read_header(path, limits.MAX_EMBEDDING_BYTES)
        if len(header.entries) != 1:
            raise UserError(f"it holds {len(header.entries)} tensors; the file of a learned token holds one.")
        ((token, entry),) = header.entries.items()
        _check_token(token, entry)
        with safe_open(path, framework="pt") as file:
            return token, torch.atleast_2d(_tensor(file, token))


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Put the file's name before every message."""
    try:
        yield
    except UserError as error:
        message = str(error)
        raise UserError(f"{path.name} cannot be used: {message[:1].lower()}{message[1:]}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.name} cannot be used: its content is damaged ({error}).") from error


def _dialect(header: Header) -> Dialect:
    for dialect in DIALECTS:
        if dialect.matches(header.entries):
            return dialect
    known = ", ".join(dialect.NAME for dialect in DIALECTS)
    example = next(iter(header.entries))
    raise UserError(f"it is no LoRA of a known layout ({known}); its first tensor is called {example!r}.")


def _check_shapes(name: str, pair: Pair, entries: Mapping[str, Entry]) -> None:
    down, up = entries[pair.down].shape, entries[pair.up].shape
    if not (len(down) == len(up) == 2 or (len(down) == len(up) == 4 and up[2:] == (1, 1))):
        raise UserError(
            f"the factors of {name} have shapes {down} and {up}; only LoRA on linear layers and convolutions is read."
        )
    if down[0] != up[1]:
        raise UserError(f"the factors of {name} do not fit each other: down is {down} and up is {up}.")
    if not 1 <= down[0] <= limits.MAX_RANK:
        raise UserError(f"{name} has rank {down[0]}; from 1 to {limits.MAX_RANK} are read.")
    width = math.prod(down[1:])
    if not 1 <= min(width, up[0]) <= max(width, up[0]) <= limits.MAX_WIDTH:
        raise UserError(f"{name} is {up[0]} × {width}; widths from 1 to {limits.MAX_WIDTH:,} are read.")
    if pair.alpha_key and entries[pair.alpha_key].shape not in ((), (1,)):
        raise UserError(
            f"{pair.alpha_key!r} should be one number, its shape is {entries[pair.alpha_key].shape}."
        )


def _check_token(token: str, entry: Entry) -> None:
    vectors, dim = (
        entry.shape if len(entry.shape) == 2 else (1, *entry.shape) if len(entry.shape) == 1 else (0, 0)
    )
    if not (1 <= vectors <= limits.MAX_TOKEN_VECTORS and 1 <= dim <= limits.MAX_WIDTH):
        raise UserError(f"the token's tensor has shape {entry.shape}; (vectors, width) is expected.")
    if not 1 <= len(token) <= limits.MAX_TOKEN_CHARS or not token.isprintable() or token != token.strip():
        raise UserError(f"the name of its token, {token[:40]!r}, cannot be used in a prompt.")


def _load(path: Path, header: Header, dialect: str, layout: Layout) -> LoraFile:
    with safe_open(path, framework="pt") as file:
        layers = {name: _adapter(file, pair) for name, pair in layout.layers.items()}
        shapes = {name: header.entries[pair.down].shape for name, pair in layout.layers.items()}
        tokens = {token: torch.atleast_2d(_tensor(file, key)) for token, key in layout.tokens.items()}
    kernels = {name: (shape[2], shape[3]) for name, shape in shapes.items() if len(shape) == 4}
    return LoraFile(LoRA(layers, kernels), tokens, header.metadata, dialect)


def _adapter(file: safe_open, pair: Pair) -> LowRank:
    adapter = LowRank(_tensor(file, pair.down).flatten(1), _tensor(file, pair.up).flatten(1))
    alpha = _tensor(file, pair.alpha_key).item() if pair.alpha_key else pair.alpha
    if alpha is None:
        return adapter
    return adapter.scaled(alpha / (adapter.rank**0.5 if pair.rank_stabilised else adapter.rank))


def _tensor(file: safe_open, key: str) -> Tensor:
    """The tensor ``key``, in float32 at least. Raises UserError when it holds NaN or infinity."""
    tensor = file.get_tensor(key)
    if not bool(tensor.isfinite().all()):
        raise UserError(f"its tensor {key!r} holds NaN or infinity; the training that made it has failed.")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
