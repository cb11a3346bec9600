"""Write LoRA and embedding files in the diffusers/PEFT layout; a file appears whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from iteris_sd.errors import UserError
from iteris_sd.formats import diffusers
from iteris_sd.lora import LoRA


def write(
    path: str | Path, lora: LoRA, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write ``lora`` so that diffusers, A1111 and ComfyUI load it at scale 1; dtype kept unless given.

    Within a component the factors are padded with zeros to one rank: most loaders set one alpha per file, so
    that unequal ranks would be scaled unequally. ΔW is unchanged.

    Raises UserError when a value does not fit ``dtype`` or the file cannot be written.
    """
    _save(path, diffusers.name_tensors(_even(lora)), metadata, dtype)


def write_embedding(path: str | Path, token: str, vectors: Tensor, dtype: torch.dtype | None = None) -> None:
    """Write a learned token's vectors (vectors, dim) or (dim,) for diffusers' ``load_textual_inversion``."""
    _save(path, {token: torch.atleast_2d(vectors)}, None, dtype)


def _even(lora: LoRA) -> LoRA:
    """The same LoRA with one rank per component."""
    ranks = {component: max(a.rank for a in part.values()) for component, part in lora.parts().items()}
    return LoRA({name: a.padded(ranks[name.partition(".")[0]]) for name, a in lora.items()}, lora.kernels)


def _save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    dtype: torch.dtype | None,
) -> None:
    # Clones, because safetensors refuses tensors that share memory, as a tensor used for two layers would.
    ready = {key: t.detach().to("cpu", dtype).contiguous().clone() for key, t in tensors.items()}
    for key, tensor in ready.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{key} does not fit {tensor.dtype}: it would hold NaN or infinity; use float32.")
    _replace(Path(path), save(ready, {"format": "pt", **(metadata or {})}))


def _replace(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step, through a temporary file beside it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).") from error
