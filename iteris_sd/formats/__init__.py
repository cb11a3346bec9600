"""LoRA and embedding files: one module per dialect, one reader, one writer."""

from .reader import LoraFile, read, read_embeddings
from .writer import LAYOUTS, write, write_embedding

__all__ = ["LAYOUTS", "LoraFile", "read", "read_embeddings", "write", "write_embedding"]
