"""Read LoRA and embedding files: header first, then the layout, then the tensors; faults are UserErrors."""

import hashlib
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats import (
    comfyui,
    diffusers,
    folder,
    kohya,
    old_diffusers,
    peft_config,
    peft_files,
    peft_folder,
    pivotal,
    refusing,
    tokens,
)
from iteris_sd.formats.header import FLOATS, WHOLE, Entry, Header, read_header
from iteris_sd.formats.layout import Dialect, Layout, Pair, Scale, sort
from iteris_sd.lora import LoRA, LowRank

DIALECTS = cast(Sequence[Dialect], (diffusers, kohya, comfyui, old_diffusers, peft_folder))  # with `pivotal`


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a LoRA file holds: the LoRA, learned tokens -> (vectors, dim), metadata, dialect, and the SHA-256 of its
    bytes."""

    lora: LoRA
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    dialect: str = diffusers.NAME
    sha256: str = ""


def read(path: str | Path) -> LoraFile:
    """Read a LoRA file, or a folder that PEFT or diffusers has saved one into.

    Tensors come in float32, or float64 where the file has it, scale applied. Raises UserError naming the file when it
    is missing, damaged, of an unknown kind, or out of bounds.
    """
    path = Path(path)
    with _naming(path):
        file = folder.located(path)
        if file.is_dir():
            return _read_folder(file)
        return _read_file(file)


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """Read a file of learned tokens: token -> its vectors (vectors, dim), in float32 at least.

    Diffusers' files name their tokens; those of A1111, OneTrainer and diffusers' advanced training hold one that is
    called as the file (`tokens`). Raises UserError naming the file when it is missing, damaged, holds other than
    tokens, or is out of bounds.
    """
    path = Path(path)
    with _naming(path):
        header = read_header(path)
        keys = tokens.named(header, path.stem)
        header.check_size(limits.MAX_EMBEDDING_BYTES)
        for token, key in keys.items():
            tokens.check(token, key, header)
        with safe_open(path, framework="pt") as file:
            return {token: torch.atleast_2d(_tensor(file, key)) for token, key in keys.items()}


def holds_tokens(path: str | Path) -> bool:
    """Whether a file is meant as learned tokens and nothing else, by the names of its tensors alone.

    Whether they can be used, `read_embeddings` says. False also for what is no safetensors file.
    """
    try:
        return tokens.meant(read_header(Path(path)).entries)
    except UserError:
        return False


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


def _read_folder(path: Path) -> LoraFile:
    folder.check(path)
    parts = [_read_file(place / peft_files.WEIGHTS) for place in peft_folder.adapters(path)]
    layers = [name for part in parts for name in part.lora]
    if len(layers) != len(set(layers)):
        raise UserError("it holds some layers twice, in several adapters; name one of its folders.")
    return LoraFile(
        LoRA(
            {name: adapter for part in parts for name, adapter in part.lora.items()},
            {name: kernel for part in parts for name, kernel in part.lora.kernels.items()},
        ),
        metadata={key: value for part in parts for key, value in part.metadata.items()},
        dialect=peft_folder.NAME,
        sha256=hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
    )


def _read_file(path: Path) -> LoraFile:
    header = read_header(path)
    layout = _layout(header)
    header.check_size(limits.MAX_FILE_BYTES)
    scales = _scales(path, layout, header.metadata)
    with safe_open(path, framework="pt") as file:
        layers = {n: _adapter(file, n, pair, scales.get(n, Scale())) for n, pair in layout.layers.items()}
        learned = {token: torch.atleast_2d(_tensor(file, key)) for token, key in layout.tokens.items()}
    shapes = {name: header.entries[pair.mid or pair.down].shape for name, pair in layout.layers.items()}
    kernels = {name: (shape[2], shape[3]) for name, shape in shapes.items() if len(shape) == 4}
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return LoraFile(LoRA(layers, kernels), learned, header.metadata, layout.dialects[0], digest)


def _layout(header: Header) -> Layout:
    """A LoRA file's layers and tokens. Raises UserError when it is something else, or its tensors cannot be used."""
    refusing.check(header.entries)
    tokens.refuse(header.entries)
    layout = sort(header.entries, [*DIALECTS, pivotal.spoken(header)])
    if not layout.layers:
        raise UserError("it holds learned tokens and no LoRA; add it to a concept as its token.")
    for name, pair in layout.layers.items():
        _check_shapes(name, pair, header.entries)
        for key in filter(None, (pair.down, pair.up, pair.mid)):
            header.check_type(key)
        if pair.alpha:
            header.check_type(pair.alpha, FLOATS + WHOLE)
    _check_unfolded(layout.layers.values(), header.entries)
    for token, key in layout.tokens.items():
        tokens.check(token, key, header)
    widths = {name: header.entries[pair.down].shape[1] for name, pair in layout.layers.items()}
    refusing.check_family(widths, header.metadata)
    return layout


def _scales(path: Path, layout: Layout, metadata: Mapping[str, str]) -> Mapping[str, Scale]:
    """The scale of each layer, as far as no tensor tells it. Raises UserError where it cannot be told."""
    if peft_folder.NAME in layout.dialects:
        if len(layout.dialects) > 1:
            raise UserError(
                f"it mixes the layouts {' and '.join(layout.dialects)}; which scale is whose is not told."
            )
        return peft_config.scales(layout.layers, peft_folder.config(path.parent))
    return diffusers.scales(layout.layers, metadata)


def _check_shapes(name: str, pair: Pair, entries: Mapping[str, Entry]) -> None:
    down, up = entries[pair.down].shape, entries[pair.up].shape
    linear = [len(shape) == 2 or tuple(shape[2:]) == (1, 1) for shape in (down, up)]
    if not (all(linear) or (len(down) == len(up) == 4 and linear[1])):
        raise UserError(
            f"the factors of {name} have shapes {down} and {up}; only LoRA on linear layers and convolutions is read."
        )
    if pair.mid is not None:
        _check_mid(name, entries[pair.mid].shape, down, up)
    elif down[0] != up[1]:
        raise UserError(f"the factors of {name} do not fit each other: down is {down} and up is {up}.")
    if not 1 <= up[1] <= limits.MAX_RANK:
        raise UserError(f"{name} has rank {up[1]}; from 1 to {limits.MAX_RANK} are read.")
    width = math.prod(down[1:] if pair.mid is None else (down[1], *entries[pair.mid].shape[2:]))
    if not 1 <= min(width, up[0]) <= max(width, up[0]) <= limits.MAX_WIDTH:
        raise UserError(f"{name} is {up[0]} × {width}; widths from 1 to {limits.MAX_WIDTH:,} are read.")
    if pair.alpha and entries[pair.alpha].shape not in ((), (1,)):
        raise UserError(f"{pair.alpha!r} should be one number, its shape is {entries[pair.alpha].shape}.")


def _check_mid(name: str, mid: Sequence[int], down: Sequence[int], up: Sequence[int]) -> None:
    """A Tucker factorisation: down and up with kernels of one pixel around a core."""
    fits = len(mid) == 4 and list(down[2:]) == [1, 1] and mid[1] == down[0] and mid[0] == up[1]
    if not fits or not 1 <= down[0] <= limits.MAX_RANK:
        raise UserError(
            f"the factors of {name} do not fit each other: down is {tuple(down)}, mid {tuple(mid)} and up {tuple(up)}."
        )


def _check_unfolded(pairs: Iterable[Pair], entries: Mapping[str, Entry]) -> None:
    """Raise UserError where Tucker cores, which are small in a file, stand for more than memory should hold."""
    cores = [(entries[pair.mid].shape, entries[pair.down].shape) for pair in pairs if pair.mid is not None]
    numbers = sum(math.prod(mid) // mid[1] * down[1] for mid, down in cores)
    if numbers > limits.MAX_UNFOLDED:
        raise UserError(
            f"its convolutions are products of three factors that unfold to {numbers:,} numbers, and at most "
            f"{limits.MAX_UNFOLDED:,} are read; save it again with two factors each, or train it with a smaller rank."
        )


def _adapter(file: safe_open, name: str, pair: Pair, scale: Scale) -> LowRank:
    """A layer's adapter, scale applied. Raises UserError when its ΔW may be beyond float32."""
    factors = [_tensor(file, key) for key in (pair.down, pair.up, pair.mid) if key]
    dtype = reduce(torch.promote_types, (factor.dtype for factor in factors))  # a file may mix them
    down, up, *core = (factor.to(dtype) for factor in factors)
    if core:
        down = torch.einsum("srhw,rc->schw", *core, down.flatten(1))
    adapter = LowRank(down.flatten(1), up.flatten(1))
    alpha = _tensor(file, pair.alpha).item() if pair.alpha else scale.alpha
    if alpha is not None:
        adapter = adapter.scaled(alpha / (adapter.rank**0.5 if scale.rank_stabilised else adapter.rank))
    largest = adapter.rank * float(adapter.down.abs().max()) * float(adapter.up.abs().max())
    if not largest <= torch.finfo(torch.float32).max:  # NaN neither
        told = "none" if alpha is None else f"{alpha:g}"
        raise UserError(
            f"what it adds to {name} is too large for float32 (its alpha is {told}); save it again with an alpha near "
            "its rank, or train it again."
        )
    return adapter


def _tensor(file: safe_open, key: str) -> Tensor:
    """The tensor ``key``, in float32 at least, and not the file's memory: that changes with the file, or goes.

    Nor does an error keep that: Windows removes no file that is mapped.

    Raises UserError when it holds NaN or infinity.
    """
    tensor = _copied(file.get_tensor(key))
    if not bool(tensor.isfinite().all()):
        raise UserError(f"its tensor {key!r} holds NaN or infinity; the training that made it has failed.")
    return tensor


def _copied(mapped: Tensor) -> Tensor:
    return mapped.to(torch.promote_types(mapped.dtype, torch.float32), copy=True)
