"""LoRA and embedding files: one module per dialect, one reader, one writer; torch is loaded when they are."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import located
    from .reader import LoraFile, holds_tokens, read, read_embeddings
    from .writer import LAYOUTS, write, write_embedding

__all__ = [
    "LAYOUTS",
    "LoraFile",
    "holds_tokens",
    "located",
    "read",
    "read_embeddings",
    "write",
    "write_embedding",
]

_MODULES = {
    "folder": ("located",),
    "reader": ("LoraFile", "holds_tokens", "read", "read_embeddings"),
    "writer": ("LAYOUTS", "write", "write_embedding"),
}


def __getattr__(name: str) -> Any:
    """What is exported, from its module, when it is first asked for."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
