"""Folders that hold a LoRA in one file, as diffusers' training scripts leave them."""

from pathlib import Path

from iteris_sd.errors import UserError
from iteris_sd.files import visible
from iteris_sd.formats import peft_folder
from iteris_sd.formats.impostors import PICKLE

_USUAL = "pytorch_lora_weights.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def located(path: Path) -> Path:
    """The file that is meant by such a folder; anything else, PEFT's folders among it, stays itself."""
    try:
        found = _files(path, ".safetensors") if path.is_dir() and not peft_folder.places(path) else []
    except OSError:  # told by whoever reads it
        return path
    usual = path / _USUAL
    return usual if usual in found else found[0] if len(found) == 1 else path


def check(path: Path) -> None:
    """Raise UserError when a folder that is not PEFT's holds several files, or pickles alone."""
    if peft_folder.places(path):
        return
    found, pickles = _files(path, ".safetensors"), _files(path, *_PICKLED)
    if len(found) > 1:
        listed = ", ".join(file.name for file in found[:4]) + ("…" if len(found) > 4 else "")
        raise UserError(f"it holds several .safetensors files ({listed}); name the one that is the LoRA.")
    if pickles and not found:
        raise UserError(f"it holds {pickles[0].name}, a PyTorch pickle, and no .safetensors file; {PICKLE}.")


def _files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(
        file for file in visible(folder.iterdir()) if file.suffix.lower() in suffixes and file.is_file()
    )
