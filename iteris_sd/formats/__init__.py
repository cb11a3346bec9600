"""LoRA and embedding files: one module per dialect, one reader, one writer."""

from .folder import located
from .reader import LoraFile, read, read_embeddings
from .writer import LAYOUTS, write, write_embedding

__all__ = ["LAYOUTS", "LoraFile", "located", "read", "read_embeddings", "write", "write_embedding"]
