"""LoRA and embedding files: one module per dialect, one reader, one writer."""

from .reader import LoraFile, read, read_embedding
from .writer import write, write_embedding

__all__ = ["LoraFile", "read", "read_embedding", "write", "write_embedding"]
