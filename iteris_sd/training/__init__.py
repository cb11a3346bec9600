"""DreamBooth-LoRA with textual inversion, from a folder of photos."""

from .photos import encode, read_photos
from .settings import Settings
from .trainer import Examples, Progress, Trained, train

__all__ = ["Examples", "Progress", "Settings", "Trained", "encode", "read_photos", "train"]
