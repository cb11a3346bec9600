"""Write LoRA and embedding files for other tools; a file appears whole or not at all.

| layout    | who loads it                              | what                                                     |
|-----------|-------------------------------------------|----------------------------------------------------------|
| diffusers | diffusers, ComfyUI                        | one file, scale 1, one rank per component                |
| kohya     | A1111, Forge, ComfyUI, kohya's sd-scripts | one file, alpha = rank; learned tokens inside, if wanted |
| peft      | PEFT                                      | a folder with ``unet`` and ``text_encoder``              |
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from iteris_sd.errors import UserError
from iteris_sd.formats import diffusers, kohya, peft_files, peft_folder
from iteris_sd.lora import LoRA

LAYOUTS = ("diffusers", "kohya", "peft")


def write(
    path: str | Path,
    lora: LoRA,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    layout: str = "diffusers",
    tokens: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write ``lora`` in a layout, scale 1; dtype kept unless given. Returns the files written.

    ``path`` is a file, or a folder for ``peft``. ``tokens`` (vectors, dim) go into the file, which only ``kohya``'s
    layout has room for. The factors of a component are padded with zeros to one rank: most loaders, diffusers' for
    kohya's files among them, set one alpha for all, so that unequal ranks would be scaled unequally. ΔW is unchanged.

    Raises UserError when there is no such layout, a value does not fit ``dtype``, tokens have no room, or a file cannot
    be written.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise UserError(f"There is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    if tokens and layout != "kohya":
        raise UserError(
            f"Files in the layout {layout!r} have no room for learned tokens; write these beside it."
        )
    lora = _even(lora)
    if layout == "kohya":
        _save(path, kohya.name_tensors(lora, tokens), metadata, dtype)
        return [path]
    if layout == "diffusers":
        _save(path, diffusers.name_tensors(lora), metadata, dtype)
        return [path]
    written = []
    for component, part in lora.parts().items():
        weights, config = (path / component / name for name in (peft_files.WEIGHTS, peft_files.CONFIG))
        _save(weights, peft_folder.name_tensors(part), metadata, dtype)
        settings = peft_folder.settings(part, (metadata or {}).get("base"))
        _replace(config, (json.dumps(settings, indent=2) + "\n").encode())
        written += [weights, config]
    return written


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
